"""Stream: the events of one request, as an iterator that can be left at any time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from edge_runtime.serving.request import Token


class Stream:
    """Events up to the one with a finish_reason. Closing, or dropping, it earlier cancels the request.

    `wait` is called, again and again, while there is no event: it runs a step or waits for another thread's.
    """

    def __init__(
        self, number: int, events: deque[Token], wait: Callable[[], None], cancel: Callable[[int], bool]
    ) -> None:
        self.request = number
        self._events = events
        self._wait = wait
        self._cancel = cancel
        self._done = False

    def __iter__(self) -> Stream:
        return self

    def __next__(self) -> Token:
        if self._done:
            raise StopIteration
        try:
            while not self._events:
                self._wait()
        except BaseException:  # an interrupt too: nobody reads on
            self.close()
            raise
        event = self._events.popleft()
        self._done = event.finish_reason is not None
        return event

    def close(self) -> None:
        """Cancel the request unless it has ended."""
        if not self._done:
            self._done = True
            self._cancel(self.request)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
