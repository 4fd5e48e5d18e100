"""Inbox: what comes on a topic waits here, bounded: the oldest is dropped, what is stale is never served."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Inbox(Generic[T]):
    """serve(item, done): called on the inbox's thread with one item at a time; `done` asks for the next.

    max_age(): seconds after which an item is of no use, None for never; asked anew each time.
    """

    def __init__(
        self,
        depth: int,
        serve: Callable[[T, Callable[[], None]], None],
        max_age: Callable[[], float | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._items: deque[tuple[float, T]] = deque()
        self._depth = depth
        self._serve = serve
        self._max_age = max_age
        self._clock = clock
        self._change = threading.Condition()
        self._busy = False
        self._closed = False
        self.dropped = 0
        self.expired = 0
        self._thread = threading.Thread(target=self._run, name="inbox", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Never waits."""
        with self._change:
            if len(self._items) >= self._depth:
                self._items.popleft()
                self.dropped += 1
            self._items.append((self._clock(), item))
            self._change.notify_all()

    def close(self) -> None:
        """Forget what waits. An item that is being served is not waited for."""
        with self._change:
            self._closed = True
            self._items.clear()
            self._change.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _done(self) -> None:
        with self._change:
            self._busy = False
            self._change.notify_all()

    def _run(self) -> None:
        while True:
            with self._change:
                while not self._closed and (self._busy or not self._items):
                    self._change.wait()
                if self._closed:
                    return
                came, item = self._items.popleft()
                limit = self._max_age()
                if limit is not None and self._clock() - came > limit:
                    self.expired += 1
                    continue
                self._busy = True
            self._serve(item, self._done)
