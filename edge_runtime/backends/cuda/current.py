"""A CUDA context made current in the calling thread, and what was current before put back."""

from __future__ import annotations

import threading
from collections.abc import Callable


class CurrentContext(threading.local):
    """`with current:` around calls of the driver, from any thread; re-entrant, and inner ones cost little.

    Pushed and popped rather than set: the thread may belong to somebody with a context of their own.
    """

    def __init__(self, push: Callable[[], object], pop: Callable[[], object]) -> None:
        self._push, self._pop = push, pop  # each thread runs this anew
        self.depth = 0

    def __enter__(self) -> None:
        if self.depth == 0:
            self._push()
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1
        if self.depth == 0:
            self._pop()
