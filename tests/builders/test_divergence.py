"""The divergence of answers against the definition in numpy, in f64."""

from __future__ import annotations

import numpy as np
import pytest
from arch_cases import SMALL, VOCAB
from made_weights import MadeWeights, made_weights

from edge_runtime.engine.formats import Array

torch = pytest.importorskip("torch")
from builders.divergence import Answers, load_head  # noqa: E402
from builders.torch_device import repeatable  # noqa: E402

TOKENS = 37
CONFIG = {"model_type": "llama", **SMALL}


def log_probability(weights: MadeWeights, rows: Array) -> Array:
    head = weights(weights.program.heads[0].weight)
    z = (rows @ head.T).astype(np.float64)
    z -= z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


@pytest.mark.parametrize("items", [1, 5 * VOCAB, 1 << 20], ids=["by tokens", "a short block last", "whole"])
def test_kl_is_the_mean_over_tokens_whatever_the_blocks(items: int) -> None:
    model, other = made_weights(CONFIG), made_weights(CONFIG, seed=6)
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, TOKENS, SMALL["hidden_size"])).astype(np.float32)
    p, q = log_probability(model, x), log_probability(other, y)
    want = (np.exp(p) * (p - q)).sum(-1).mean()
    heads = [load_head(weights, "cpu") for weights in (model, other)]
    found = set()
    for kept in (False, True):
        answers = Answers(model.program, heads[0], torch.from_numpy(x), items, kept=kept)
        found.add(answers.kl(heads[1], torch.from_numpy(y)))
        with repeatable("cpu", 2) as workers:
            found.add(answers.kl(heads[1], torch.from_numpy(y), workers.map))
        assert answers.kl(heads[0], torch.from_numpy(x)) == 0.0
    assert len(found) == 1
    assert found.pop() == pytest.approx(want, rel=1e-5)
