"""SIGTERM, as `timeout`, systemd and preempted machines send it, ends a command as Ctrl-C does."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminable() -> Iterator[list[int]]:
    """SIGTERM raises KeyboardInterrupt, so that all is cleared away that is cleared away then. Yields a list
    that holds the signal once it came. A handler that is there already is left alone."""
    told: list[int] = []

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # timeout(1) sends two; the second must not stop the clearing
        told.append(number)
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_DFL or threading.current_thread() is not threading.main_thread():
        yield told
        return
    signal.signal(signal.SIGTERM, end)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)
