"""A provider of weights that several workers may ask: it answers one at a time.

A provider may remember what it made last (rotated matrices are made whole), and need not know of threads.
"""

from __future__ import annotations

import threading

from builders.sources.matrix import Stored
from builders.weights import Model
from edge_runtime.engine.formats import Array


class SerialWeights:
    """`base` behind a lock."""

    def __init__(self, base: Model) -> None:
        self.program = base.program
        self._base = base
        self._lock = threading.Lock()

    def __call__(self, name: str) -> Array:
        with self._lock:
            return self._base(name)

    def block(self, name: str, start: int, stop: int) -> Array:
        with self._lock:
            return self._base.block(name, start, stop)

    def rows(self, name: str, ids: Array) -> Array:
        with self._lock:
            return self._base.rows(name, ids)

    def stored(self, name: str, fmt: str) -> Stored | None:
        with self._lock:
            return self._base.stored(name, fmt)
