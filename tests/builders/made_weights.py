"""Random weights for an architecture's program, as a provider, and logits of a program on the reference."""

from __future__ import annotations

import numpy as np

from builders.archs import read_program
from builders.statistics import InputStatistics
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.formats import Array
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program


class MadeWeights:
    """`builders.weights.Weights` of arrays in memory."""

    def __init__(self, program: Program, tensors: dict[str, Array]) -> None:
        self.program, self.tensors = program, tensors

    def __call__(self, name: str) -> Array:
        return self.tensors[name]

    def block(self, name: str, start: int, stop: int) -> Array:
        return self.tensors[name][start:stop]

    def stored(self, name: str, fmt: str) -> None:
        return None

    def rows(self, name: str, ids: Array) -> Array:
        return self.tensors[name][ids]


def made_weights(config: dict, context: int | None = None, seed: int = 5) -> MadeWeights:
    architecture = read_program(config, context=context)
    rng = np.random.default_rng(seed)
    found = {}
    for name, spec in architecture.program.tensors.items():
        made = architecture.sources[name].constant
        values = rng.normal(size=(spec.rows, spec.cols)) / np.sqrt(spec.cols) if made is None else made
        if made is None and spec.role == "vector":
            values = 1.0 + 0.3 * rng.normal(size=(1, spec.cols))
        found[name] = np.asarray(values, np.float32).reshape(spec.rows, spec.cols)
    return MadeWeights(architecture.program, found)


def logits_of(weights, tokens: Array) -> Array:
    """Reference logits (batch, length, vocab) of token ids (batch, length), f32 cache."""
    batch, length = tokens.shape
    pages = -(-length // 16)
    kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=batch * pages)
    step = StepShape(context=length, sequences=batch, tokens=batch * length, logits=batch * length)
    executor = ReferenceExecutor(weights.program, weights, kv, step)
    found = executor.forward(
        StepBatch(
            tokens=tokens.reshape(-1).astype(np.int32),
            positions=np.tile(np.arange(length, dtype=np.int32), batch),
            sequence=np.repeat(np.arange(batch, dtype=np.int32), length),
            page_tables=np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
            logit_rows=np.arange(batch * length, dtype=np.int32),
        )
    )
    executor.close()
    return found.reshape(batch, length, -1)


def made_statistics(cols: int, tokens: int = 400, seed: int = 1, spread: float = 1.0) -> InputStatistics:
    """Of correlated inputs whose channels differ in size by factors of about e^spread."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(cols, cols)) / np.sqrt(cols) + np.eye(cols)
    size = np.exp(spread * rng.normal(size=cols))
    x = (rng.normal(size=(tokens, cols)) @ mixing * size).astype(np.float32)
    return InputStatistics(tokens, x.T @ x / tokens, np.abs(x).max(0), np.abs(x).mean(0), x[:256])
