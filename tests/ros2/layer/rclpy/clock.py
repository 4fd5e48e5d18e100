"""The node's clock: system time, as rclpy's ROS clock without /clock."""

from __future__ import annotations

import time as _time

from rclpy.time import Time


class Clock:
    def now(self) -> Time:
        return Time(nanoseconds=_time.time_ns())


ROSClock = Clock
