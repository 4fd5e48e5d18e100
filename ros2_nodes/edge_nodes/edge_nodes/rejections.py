"""Why goals were not accepted, on a topic and on the log: the action protocol has no room for a reason."""

from __future__ import annotations

import time
from typing import Any

from edge_interfaces.msg import Rejection

_LOG_SECONDS = 1.0  # a flood of goals is one line a second


class Rejections:
    def __init__(self, node: Any) -> None:
        self._node = node
        self._publisher = node.create_publisher(Rejection, "~/rejections", 10)
        self._logged = float("-inf")

    def publish(self, action: str, code: str, reason: str) -> None:
        """code: as Rejection.msg lists them."""
        message = Rejection(action=action, code=code, reason=reason)
        message.header.stamp = self._node.get_clock().now().to_msg()
        self._publisher.publish(message)
        now = time.monotonic()  # rclpy's own throttle looks up the caller's file first, a third of a refusal
        if now - self._logged >= _LOG_SECONDS:
            self._logged = now
            self._node.get_logger().warning(f"goal of {action} rejected: {reason}")
