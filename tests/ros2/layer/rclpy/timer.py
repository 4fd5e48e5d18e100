"""Timers on the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


class Timer:
    def __init__(self, node: Any, period: float, callback: Callable[[], Any], group: Any) -> None:
        self.timer_period_ns = int(period * 1e9)
        self.callback = callback
        self.callback_group = group
        self._node = node
        self._due = time.monotonic_ns() + self.timer_period_ns
        self._cancelled = False

    def time_until_next_call(self) -> int:
        """Nanoseconds; none are left where it is due."""
        return 1 << 62 if self._cancelled else max(0, self._due - time.monotonic_ns())

    @property
    def ready(self) -> bool:
        return not self._cancelled and time.monotonic_ns() >= self._due

    def take(self) -> Callable[[], Any] | None:
        if not self.ready:
            return None
        now = time.monotonic_ns()
        self._due += self.timer_period_ns
        if self._due < now:  # calls that were missed are not made up for, as in rcl
            behind = (now - self._due) // max(1, self.timer_period_ns) + 1
            self._due += behind * self.timer_period_ns
        return self.callback

    def cancel(self) -> None:
        self._cancelled = True

    def reset(self) -> None:
        self._cancelled = False
        self._due = time.monotonic_ns() + self.timer_period_ns
        self._node.wake()

    def is_canceled(self) -> bool:
        return self._cancelled

    def destroy(self) -> None:
        self._cancelled = True
