"""Where real rclpy keeps its C part; here only the error that it raises."""

from __future__ import annotations

from types import SimpleNamespace


class RCLError(RuntimeError):
    """What rcl refuses."""


rclpy_implementation = SimpleNamespace(RCLError=RCLError)
