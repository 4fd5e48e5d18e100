"""A context: one DDS participant, the arguments of the process, and its end by a signal."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rclpy.arguments import Arguments, parse_arguments
from rclpy.impl import dds

_handling: list[Context] = []  # contexts that a signal ends
_before: dict[int, Any] = {}  # handlers that were there


class Context:
    def __init__(self) -> None:
        self.participant: Any = None
        self.arguments = Arguments()
        self._ids = itertools.count(1)
        self._seed = secrets.token_bytes(8)
        self._callbacks: list[Callable[[], None]] = []
        self._lock = threading.RLock()  # a signal may come while it is held

    def init(self, args: Sequence[str] | None = None, *, domain_id: int | None = None) -> None:
        if self.participant is not None:
            raise RuntimeError("Context.init() must only be called once")
        self.arguments = parse_arguments(args or [])
        domain = int(os.environ.get("ROS_DOMAIN_ID", "0") or 0) if domain_id is None else domain_id
        self.participant = dds.Participant(domain)

    def ok(self) -> bool:
        return self.participant is not None

    def shutdown(self) -> None:
        with self._lock:
            self.participant = None
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            callback()

    def try_shutdown(self) -> None:
        if self.ok():
            self.shutdown()

    def on_shutdown(self, callback: Callable[[], None]) -> None:
        self._callbacks.append(callback)

    def next_id(self) -> str:
        """16 bytes of hex joined by dots, as endpoints of a service carry."""
        number = self._seed + next(self._ids).to_bytes(8, "big")
        return ".".join(f"{byte:x}" for byte in number)


def install_signal_handlers(context: Context) -> None:
    """SIGINT and SIGTERM end the context; what SIGINT did before happens as well, as in rclpy."""
    if threading.current_thread() is not threading.main_thread():
        return
    _handling.append(context)
    _before.update({number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)})
    before = _before[signal.SIGINT]

    def end(number: int, frame: Any) -> None:
        for each in _handling:
            each.try_shutdown()
        _handling.clear()
        if number == signal.SIGINT and callable(before) and before is not end:
            before(number, frame)

    signal.signal(signal.SIGINT, end)
    signal.signal(signal.SIGTERM, end)


def uninstall_signal_handlers() -> None:
    """What was there before is there again."""
    if threading.current_thread() is threading.main_thread():
        while _before:
            signal.signal(*_before.popitem())
