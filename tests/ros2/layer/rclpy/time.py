"""A moment of the node's clock."""

from __future__ import annotations

from typing import Any

from builtin_interfaces.msg import Time as TimeMsg


class Time:
    def __init__(self, *, seconds: int | float = 0, nanoseconds: int = 0) -> None:
        self.nanoseconds = int(seconds * 10**9) + int(nanoseconds)

    def to_msg(self) -> Any:
        seconds, nanoseconds = divmod(self.nanoseconds, 10**9)
        return TimeMsg(sec=seconds, nanosec=nanoseconds)

    @classmethod
    def from_msg(cls, message: Any) -> Time:
        return cls(seconds=message.sec, nanoseconds=message.nanosec)
