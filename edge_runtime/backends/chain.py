"""Greedy tokens one after another, by steps of any executor."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import numpy as np

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadRequest


class _Forward(Protocol):
    def forward(self, batch: StepBatch) -> Array: ...


def run_chain(executor: _Forward, batch: StepBatch, count: int) -> Array:
    """See `Executor.chain`; raises as `forward` does."""
    check_chain(batch)
    step = replace(batch, tokens=batch.tokens.copy(), positions=batch.positions.copy())
    out = np.empty((count, len(batch.tokens)), np.int32)
    for row in out:
        row[:] = executor.forward(step).argmax(axis=1)
        step.tokens[:] = row
        step.positions[:] += 1
    return out


def check_chain(batch: StepBatch) -> None:
    """Raises BadRequest unless every sequence has one token, not of a tree, and one row of logits."""
    if batch.parents is not None or batch.places is not None:
        raise BadRequest("a chain follows positions; it takes no tree (parents, places)")
    if not len(batch.tokens) == len(batch.logit_rows) == len(batch.page_tables):
        raise BadRequest(
            f"a chain takes one token and one row of logits of each sequence; got {len(batch.tokens)} "
            f"tokens, {len(batch.logit_rows)} rows, {len(batch.page_tables)} sequences"
        )
