"""What a step's tokens are chosen from: as little of its logits as its samplers need."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from edge_runtime.backends.protocol import TOP, Executor, StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.serving.sampling import Sampler, TopTokens

# Likeliest tokens int32 (L,), the few likeliest of each row (L, k), or logits f32 (L, vocab)
Rows = Array | TopTokens


def run_step(executor: Executor, batch: StepBatch, samplers: Seq[tuple[Sampler, int]]) -> Rows:
    """Run a step for samplers, each of which looks at so many of its rows of logits, in order.

    One that must see all logits has them copied for all; what is chosen does not depend on it. The rows are
    views that the next step overwrites. Raises as `Executor.forward`.
    """
    most = 1
    for sampler, _ in samplers:
        few = sampler.candidates
        if few is None or few > TOP:
            return executor.forward(batch)
        most = max(most, few)
    if most == 1:
        return executor.likeliest(batch)
    top = TopTokens(*executor.top(batch, most))
    at = 0
    for sampler, count in samplers:
        if not sampler.settles(top[at : at + count]):
            return executor.forward(batch)  # the same keys and values again
        at += count
    return top
