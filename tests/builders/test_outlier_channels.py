"""Why K per channel exists: a model with large K channels, which int4 with a scale a token ruins.

A rotary pair of K channels of each kv head is scaled up and the same pair of Q channels down. Attention sees
the products alone, so at f32 the model is the same, but a token's row then has one scale for small and large.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from builders.archs import read_program
from builders.comparison import Comparison
from builders.evaluate import compare_models, read_text
from builders.sources import open_source, read_vocabulary
from builders.weights import CheckpointWeights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Attention, Linear
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import Program

TEXT = Path(__file__).resolve().parents[1] / "text" / "story.txt"
FACTOR = 64.0  # a power of two: products in f32 keep their bits


class WithOutliers:
    """Weights whose K channels `pair` are FACTOR times as large, and Q channels as much smaller."""

    def __init__(self, weights: CheckpointWeights, channel: int = 1) -> None:
        self.program: Program = weights.program
        self._weights = weights
        self._factors: dict[str, Array] = {}
        attention = next(op for op in self.program.ops if isinstance(op, Attention))
        pair = [channel, channel + attention.head_dim // 2]
        for op in self.program.ops:
            if isinstance(op, Linear) and op.out in ("q", "k"):
                factors = np.ones((self.program.tensors[op.weight].rows, 1), np.float32)
                for i in pair:
                    factors[i :: attention.head_dim] = FACTOR if op.out == "k" else 1 / FACTOR
                self._factors[op.weight] = factors
                assert op.bias is None

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        values = self._weights.block(name, start, stop)
        return values * self._factors[name][start:stop] if name in self._factors else values

    def rows(self, name: str, ids: Array) -> Array:
        assert name not in self._factors
        return self._weights.rows(name, ids)


def measured(model: Path, *caches: str) -> dict[str, Comparison]:
    """Figures of the model with outliers for each "K,V", against the plain model with an f32 cache."""
    found = {}
    with open_source(model) as source:
        weights = CheckpointWeights(read_program(source.config), source)
        vocabulary = read_vocabulary(source, weights.program.vocab_size)
        text = read_text(source, vocabulary, TEXT, limit=400, window=min(weights.program.max_context, 400))
        for cache in caches:
            k, v = cache.split(",")
            kv = KvPlan(k=k, v=v, page_tokens=16, pages=1)
            found[cache] = compare_models(weights, WithOutliers(weights), kv, text)
    return found


def test_per_channel_stands_outliers_that_ruin_per_token(real_model: Path) -> None:
    """Measured on both models: KL of int4 2.8 and 3.2 nats, of int4c 0.004 and 0.008; int8 0.5 and 0.8, int8c
    0.0001.
    """
    found = measured(real_model, "f32,f32", "f16,f16", "int8,f16", "int8c,f16", "int4,f16", "int4c,f16")
    exact = found["f32,f32"].perplexity_f32
    assert found["f32,f32"].kl_mean == 0.0 and found["f32,f32"].perplexity == exact
    assert found["f16,f16"].kl_mean < 1e-5
    assert found["int8c,f16"].kl_mean < 5e-4 and found["int8,f16"].kl_mean > 0.2
    assert found["int4c,f16"].kl_mean < 0.03 and found["int4,f16"].kl_mean > 1.5
    assert abs(found["int4c,f16"].perplexity / exact - 1) < 0.03 and found["int4,f16"].perplexity / exact > 10
    assert found["int4c,f16"].top1_agreement > 0.95 and found["int4,f16"].top1_agreement < 0.4
