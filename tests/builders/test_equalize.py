"""Merged channel scales: the same function before rounding, for every trait of the architectures."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from arch_cases import CASES, GEMMA, SMALL, VOCAB
from made_weights import MadeWeights, logits_of, made_statistics, made_weights

from builders.equalize import ScaledWeights, equalize, scale_groups
from builders.quantize import AlgorithmOptions, get_algorithm
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.ops import Activation, Linear, Norm

TOKENS = np.random.default_rng(3).integers(3, VOCAB, (2, 20)).astype(np.int32)


def scaled_at_random(weights: MadeWeights) -> ScaledWeights:
    rng, scaled = np.random.default_rng(7), ScaledWeights(weights)
    for group in scale_groups(weights.program)[0]:
        cols = weights.program.tensors[group.linears[0]].cols
        s = np.exp(rng.normal(size=cols)).astype(np.float32)
        scaled.scale(group, s if group.ties is None else s[group.ties])
    return scaled


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaled_weights_give_the_same_logits(case) -> None:
    weights = made_weights({"model_type": case.model_type, **SMALL, **case.config}, case.context)
    scaled = scaled_at_random(weights)
    want, got = logits_of(weights, TOKENS), logits_of(scaled, TOKENS)
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()
    for name in scaled.changed:
        assert not np.array_equal(scaled(name), weights(name))
    assert {n for n in weights.tensors if not np.array_equal(scaled(n), weights(n))} == scaled.changed


def test_groups_of_a_decoder() -> None:
    groups, left = scale_groups(made_weights({"model_type": "llama", **SMALL}).program)
    assert [(g.linears, g.sources) for g in groups[:4]] == [
        (("layers.0.q", "layers.0.k", "layers.0.v"), ("layers.0.attention_norm",)),
        (("layers.0.o",), ("layers.0.v",)),
        (("layers.0.gate", "layers.0.up"), ("layers.0.mlp_norm",)),
        (("layers.0.down",), ("layers.0.up",)),
    ]
    assert (groups[-1].linears, groups[-1].sources) == (("head",), ("norm",))
    assert not left
    np.testing.assert_array_equal(groups[1].ties[:24], [*range(8)] * 3)  # six heads of 8, two kv heads
    assert groups[1].ties.max() == 15


def test_a_tied_head_is_left_alone_and_said_so() -> None:
    config = {"model_type": "gemma2", **SMALL, **GEMMA, "tie_word_embeddings": True}
    weights = made_weights(config)
    _, left = scale_groups(weights.program)
    assert [(u.linears, u.reason) for u in left] == [(("embed",), "embed is used elsewhere too")]
    assert "embed" not in scaled_at_random(weights).changed


def test_what_cannot_be_scaled_is_left_alone() -> None:
    """A norm shared by two layers, and an activation that is neither gated nor relu."""
    program = made_weights({"model_type": "llama", **SMALL}).program
    shared = [
        msgspec.structs.replace(op, weight="layers.0.mlp_norm")
        if isinstance(op, Norm) and op.weight == "layers.1.mlp_norm"
        else op
        for op in program.ops
    ]
    ungated = [msgspec.structs.replace(op, up=None) if isinstance(op, Activation) else op for op in shared]
    groups, left = scale_groups(msgspec.structs.replace(program, ops=tuple(ungated)))
    reasons = {u.linears[0]: u.reason for u in left}
    assert reasons["layers.0.gate"] == reasons["layers.1.gate"] == "layers.0.mlp_norm is used elsewhere too"
    assert reasons["layers.0.down"] == "they come from an op: activation"
    assert not {"layers.0.gate", "layers.1.up", "layers.0.down"} & {n for g in groups for n in g.linears}


def test_an_ungated_relu_is_scaled_through() -> None:
    weights = made_weights({"model_type": "llama", **SMALL})
    ops = tuple(
        msgspec.structs.replace(op, kind="relu", up=None) if isinstance(op, Activation) else op
        for op in weights.program.ops
    )
    plain = MadeWeights(msgspec.structs.replace(weights.program, ops=ops), weights.tensors)
    scaled = scaled_at_random(plain)
    assert "layers.0.gate" in scaled.changed
    want, got = logits_of(plain, TOKENS), logits_of(scaled, TOKENS)
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()


def test_blocks_and_rows_are_those_of_the_whole() -> None:
    scaled = scaled_at_random(made_weights({"model_type": "qwen2", **SMALL}))
    for name in ("layers.0.v", "layers.0.down", "layers.0.v.bias", "layers.0.attention_norm", "head"):
        whole = scaled(name)
        np.testing.assert_array_equal(scaled.block(name, 0, 1), whole[:1])
        ids = np.array([0]) if len(whole) == 1 else np.array([5, 1, 5])
        np.testing.assert_array_equal(scaled.rows(name, ids), whole[ids])
        if len(whole) > 1:
            np.testing.assert_array_equal(scaled.block(name, 3, 9), whole[3:9])


def test_rows_that_absorb_a_scale_matter_by_it() -> None:
    """Gradients by an output that is r times as large are r times smaller."""
    weights = ScaledWeights(made_weights({"model_type": "llama", **SMALL}))
    groups, _ = scale_groups(weights.program)
    group = next(g for g in groups if weights.program.tensors[g.sources[0]].role != "vector")
    source = group.sources[0]
    matter = np.ones(weights.program.tensors[source].rows, np.float32)
    assert np.array_equal(weights.row_importance(source, matter), matter)
    s = np.full(weights.program.tensors[group.linears[0]].cols, 4, np.float32)
    before = weights(source).copy()
    weights.scale(group, s)
    assert np.array_equal(weights(source), before / 4)
    assert np.array_equal(weights.row_importance(source, matter), 16 * matter)


@pytest.mark.parametrize("name", ["awq", "smoothquant", "awq+gptq"])
def test_an_algorithms_scales_are_merged_and_tied_where_heads_are(name: str) -> None:
    weights = made_weights({"model_type": "llama", **SMALL})
    program = weights.program
    fmt = {"matrix": "int4_g32", "head": "int8_row", "embedding": "int8_row", "vector": "f32"}
    formats = {n: get_format(fmt[s.role]) for n, s in program.tensors.items()}
    stats = {op.weight: made_statistics(program.tensors[op.weight].cols, spread=1.5)
             for op in program.ops if isinstance(op, Linear)}  # fmt: skip
    scaled = equalize(weights, get_algorithm(name), formats, stats.get, AlgorithmOptions())
    assert {"layers.0.q", "layers.0.o", "layers.0.down"} <= scaled.scales.keys()
    o = scaled.scales["layers.0.o"].reshape(2, 3, 8)
    assert (o == o[:, :1]).all()
    want, got = logits_of(weights, TOKENS), logits_of(scaled, TOKENS)
    assert np.abs(got - want).max() <= 3e-4 * np.abs(want).max()
    found = scaled.inputs("layers.0.down", stats["layers.0.down"])
    s = scaled.scales["layers.0.down"]
    np.testing.assert_allclose(found.hessian, stats["layers.0.down"].hessian / s / s[:, None], rtol=1e-5)
    assert scaled.inputs("embed", None) is None
