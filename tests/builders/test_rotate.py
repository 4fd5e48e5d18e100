"""Rotations: orthogonal, Hadamard where there is one, and the same logits once they are merged."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from arch_cases import CASES, SMALL, VOCAB
from made_weights import MadeWeights, logits_of, made_weights

from builders.hadamard import hadamard, rotation
from builders.rotate import rotate
from edge_runtime.engine.ops import Input, Norm
from edge_runtime.errors import Unsupported

TOKENS = np.random.default_rng(3).integers(3, VOCAB, (2, 20)).astype(np.int32)
EXACT = [case for case in CASES if not case.model_type.startswith("gemma")]  # those have post norms


@pytest.mark.parametrize("n", [1, 2, 4, 12, 20, 24, 28, 36, 44, 48, 60, 64, 80, 256, 288, 2048])
def test_hadamard_matrices_are_signs_with_orthogonal_rows(n: int) -> None:
    h = hadamard(n)
    assert (np.abs(h) == 1).all()
    np.testing.assert_array_equal(h @ h.T, n * np.eye(n))


@pytest.mark.parametrize("n", [1, 6, 48, 100, 172, 192, 5632])
def test_rotations_of_any_size_are_orthogonal_and_repeat_with_the_seed(n: int) -> None:
    q = rotation(n, 7)
    assert np.abs(q @ q.T - np.eye(n)).max() < 1e-12
    np.testing.assert_array_equal(q, rotation(n, 7))
    assert n < 6 or not np.array_equal(q, rotation(n, 8))


def test_a_lone_outlier_is_spread_evenly() -> None:
    x = np.zeros(64)
    x[5] = 8.0
    np.testing.assert_allclose(np.abs(x @ rotation(64, 0)), 1.0, rtol=1e-12)


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_rotated_weights_give_the_same_logits(case) -> None:
    weights = made_weights({"model_type": case.model_type, **SMALL, **case.config}, case.context)
    rotated = rotate(weights, seed=4)
    want, got = logits_of(weights, TOKENS), logits_of(rotated, TOKENS)
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()
    matrices = {n for n, s in weights.program.tensors.items() if s.role != "vector"}
    assert matrices <= rotated.changed
    for name in matrices:
        assert not np.allclose(rotated(name), weights(name), rtol=0.1)


@pytest.mark.parametrize("case", [c for c in CASES if c.model_type.startswith("gemma")], ids=str)
def test_post_norms_are_refused(case) -> None:
    weights = made_weights({"model_type": case.model_type, **SMALL, **case.config}, case.context)
    with pytest.raises(Unsupported, match=r"post norm.*without rotation"):
        rotate(weights)


def test_a_tied_head_is_untied_unless_the_final_norm_is_constant() -> None:
    weights = made_weights({"model_type": "llama", **SMALL, "tie_word_embeddings": True})
    program = rotate(weights).program
    assert program.ops[-1].weight == "head"
    assert (program.tensors["embed"].role, program.tensors["head"].role) == ("embedding", "head")
    weights.tensors["norm"][:] = 1.7
    rotated = rotate(weights)
    assert rotated.program == weights.program
    want, got = logits_of(weights, TOKENS), logits_of(rotated, TOKENS)
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()


def changed_ops(weights: MadeWeights, change) -> MadeWeights:
    ops = tuple(change(op) for op in weights.program.ops)
    return MadeWeights(msgspec.structs.replace(weights.program, ops=ops), weights.tensors)


def test_layer_norms_and_biased_norms_are_refused() -> None:
    weights = made_weights({"model_type": "llama", **SMALL})
    for changes in ({"kind": "layer"}, {"bias": "norm"}):
        other = changed_ops(
            weights, lambda op, c=changes: msgspec.structs.replace(op, **c) if isinstance(op, Norm) else op
        )
        with pytest.raises(Unsupported, match="RMS"):
            rotate(other)


def test_a_norm_used_on_heads_and_on_the_stream_is_refused() -> None:
    config = {"model_type": "qwen3", **SMALL, "head_dim": 48}
    weights = made_weights(config)
    other = changed_ops(
        weights,
        lambda op: (
            msgspec.structs.replace(op, weight="norm")
            if isinstance(op, Norm) and op.weight == "layers.1.q_norm"
            else op
        ),
    )
    with pytest.raises(Unsupported, match="both on the residual stream and elsewhere"):
        rotate(other)


def test_a_program_of_input_rows_is_refused() -> None:
    weights = made_weights({"model_type": "llama", **SMALL})
    other = changed_ops(weights, lambda op: Input(out=op.out) if op is weights.program.ops[0] else op)
    with pytest.raises(Unsupported, match="embedding"):
        rotate(other)


def test_blocks_and_rows_are_those_of_the_whole() -> None:
    rotated = rotate(made_weights({"model_type": "qwen2", **SMALL}))
    for name in ("embed", "layers.0.v", "layers.0.down", "layers.0.o", "layers.0.v.bias", "norm", "head"):
        whole = rotated(name)
        np.testing.assert_allclose(rotated.block(name, 0, 1), whole[:1], rtol=1e-5, atol=1e-7)
        ids = np.array([0]) if len(whole) == 1 else np.array([5, 1, 5])
        np.testing.assert_allclose(rotated.rows(name, ids), whole[ids], rtol=1e-5, atol=1e-7)
        assert rotated.stored(name, "f32") is None
