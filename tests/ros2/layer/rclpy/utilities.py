"""The context that is meant where none is named."""

from __future__ import annotations

from typing import Any

_default: Any = None


def get_default_context() -> Any:
    global _default
    if _default is None:
        from rclpy.context import Context

        _default = Context()
    return _default


def ok(*, context: Any = None) -> bool:
    return (context or get_default_context()).ok()


def try_shutdown(*, context: Any = None) -> None:
    chosen = context or get_default_context()
    if chosen.ok():
        chosen.shutdown()
    if context is None:
        from rclpy.context import uninstall_signal_handlers

        uninstall_signal_handlers()
