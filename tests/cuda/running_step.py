"""The running step of a test, as kernels find it in device memory."""

from __future__ import annotations

import numpy as np
from emulation import Guarded

from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array


class RunningStep:
    """`tokens` tokens and a row of logits for each of `logit_rows`; `status` is what kernels have raised."""

    def __init__(self, tokens: int, logit_rows: tuple[int, ...] = ()) -> None:
        counts = np.zeros(rec.COUNTS, np.int32)
        counts[rec.TOKENS], counts[rec.LOGITS] = tokens, len(logit_rows)
        self._counts = Guarded.of(counts)
        self._status = Guarded.of(np.zeros(1, np.uint32))
        self._logit_rows = Guarded.of(np.array(logit_rows or (0,), np.int32))
        self._ids = Guarded.of(np.full(max(tokens, 1), 7, np.int32))
        self._positions = Guarded.of(np.arange(max(tokens, 1), dtype=np.int32) * 10)
        self._places = Guarded.of(np.arange(max(tokens, 1), dtype=np.int32) * 10)

    @property
    def record(self) -> rec.Step:
        return rec.Step(
            counts=self._counts.address,
            tokens=self._ids.address,
            positions=self._positions.address,
            places=self._places.address,
            logit_rows=self._logit_rows.address,
            status=self._status.address,
        )

    @property
    def status(self) -> int:
        return int(self._status.view(np.uint32)[0])

    @property
    def counts(self) -> Array:
        return self._counts.view(np.int32)

    @property
    def tokens(self) -> Array:
        return self._ids.view(np.int32)

    @property
    def positions(self) -> Array:
        return self._positions.view(np.int32)

    @property
    def places(self) -> Array:
        return self._places.view(np.int32)

    def check(self) -> None:
        for memory in (self._counts, self._status, self._logit_rows, self._ids, self._positions):
            memory.check()
        self._places.check()


def rows_of(seed: int, tokens: int, width: int, spread: float = 3.0) -> Array:
    """f32 (tokens, width) whose magnitudes differ from value to value and from token to token."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width)) * np.exp(rng.uniform(-spread, spread, (tokens, 1)))
    return np.asarray(x * np.exp(rng.standard_normal((tokens, width))), np.float32)
