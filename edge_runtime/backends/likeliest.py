"""The likeliest tokens of rows of logits that lie in the host's memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from edge_runtime.backends.protocol import TOP, StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadRequest


class _Forward(Protocol):
    def forward(self, batch: StepBatch) -> Array: ...


class HostLogits:
    """What an `Executor` has beside `forward` where that leaves logits in the host's memory."""

    def likeliest(self: _Forward, batch: StepBatch) -> Array:
        """See `Executor.likeliest`."""
        return likeliest_of(self.forward(batch))

    def top(self: _Forward, batch: StepBatch, k: int) -> tuple[Array, Array]:
        """See `Executor.top`."""
        return top_of(self.forward(batch), k)

    def warm_up(self, sizes: Sequence[int], chains: Sequence[int] = ()) -> None:
        """Nothing: what a step needs is there from the load on."""


def likeliest_of(logits: Array) -> Array:
    """The likeliest token of each row of logits f32 (L, vocab), equals by their lowest id: int32 (L,).

    -1 for a row that holds NaN or Inf.
    """
    best: Array = logits.argmax(axis=-1).astype(np.int32)
    finite = np.isfinite(logits)
    if not finite.all():
        best[~finite.all(axis=-1)] = -1
    return best


def top_of(logits: Array, k: int) -> tuple[Array, Array]:
    """The k likeliest tokens of each row of logits f32 (L, vocab): ids int32 and logits f32 (L, k).

    In descending order, equals by their lowest id. A row that holds NaN or Inf has ids -1 and logits NaN.
    Raises BadRequest on a k that no `Executor.top` takes.
    """
    rows, vocab = logits.shape
    if not 1 <= k <= min(TOP, vocab):
        raise BadRequest(f"the {k} likeliest tokens of {vocab}; expected 1 to {min(TOP, vocab)}")
    finite: Array = np.isfinite(logits)
    good = np.flatnonzero(finite.all(axis=-1))
    if len(good) < rows:
        ids, found = np.full((rows, k), -1, np.int32), np.full((rows, k), np.nan, np.float32)
        ids[good], found[good] = top_of(logits[good], k)
        return ids, found
    ids = np.empty((rows, k), np.int32)
    for i, row in enumerate(logits):
        ids[i] = top_indices(row, k)
    return ids, logits[np.arange(rows)[:, None], ids]


def top_indices(values: Array, n: int) -> Array:
    """Indices of the n greatest, greatest first, ties by lowest index."""
    if n <= 0:
        return np.zeros(0, np.int64)
    if n >= len(values):
        return np.argsort(-values, kind="stable")
    least = np.partition(values, -n)[-n]
    found = np.flatnonzero(values >= least)  # ascending, so that a stable sort settles ties
    return found[np.argsort(-values[found], kind="stable")][:n]
