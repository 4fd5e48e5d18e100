"""8-bit activations: where Round ops stand, the scales that calibration gives, and what they mean."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from arch_cases import CASES, SMALL, VOCAB
from made_weights import made_statistics, made_weights

from builders.activations import round_activations, static_scale
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.ops import Linear, Logits, Norm, Round
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig

torch = pytest.importorskip("torch")
TorchProgram = pytest.importorskip("builders.torch_program").TorchProgram
TOKENS = np.random.default_rng(3).integers(3, VOCAB, (2, 20)).astype(np.int32)


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("case", CASES[:6], ids=str)
def test_linears_read_what_the_weight_format_would_make_of_each_token(case, kind: str) -> None:
    """Against a hook that rounds every linear's input with the codec of int8_row or fp8_e4m3_row."""
    weights = made_weights({"model_type": case.model_type, **SMALL, **case.config}, case.context)
    fmt = get_format("int8_row" if kind == "int8" else "fp8_e4m3_row")

    def hook(op: Linear, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(fmt.decode(fmt.encode(flat), *flat.shape)).reshape(x.shape)

    def run(program: Program, hook: Any = None) -> Array:
        torch_program = TorchProgram(program, lambda name: torch.from_numpy(weights(name)))
        with torch.no_grad():
            hidden = torch_program.hidden(torch.from_numpy(TOKENS).long(), hook)
            return torch_program.logits(hidden).numpy()

    want = run(weights.program, hook)
    got = run(round_activations(weights.program, kind))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert np.abs(got - run(weights.program)).max() > 1e-3 * np.abs(want).max()


def test_a_value_is_rounded_once_and_in_place_where_only_linears_read_it() -> None:
    program = made_weights({"model_type": "llama", **SMALL}).program
    rounded = round_activations(program, "int8")
    rounds = [op for op in rounded.ops if isinstance(op, Round)]
    assert len(rounds) == 4 * 3  # q/k/v, o, gate/up, down in each of three layers
    assert all(op.x == op.out and op.scale is None for op in rounds)
    assert rounded.buffers == program.buffers
    assert not isinstance(rounded.ops[-2], Round)  # the head reads what it did
    assert isinstance(rounded.ops[-1], Logits)


def test_a_value_that_others_read_too_is_kept() -> None:
    program = made_weights({"model_type": "llama", **SMALL}).program
    direct = tuple(
        msgspec.structs.replace(op, x="hidden") if isinstance(op, Linear) and op.x == "normed" else op
        for op in program.ops
    )
    rounded = round_activations(msgspec.structs.replace(program, ops=direct), "int8")
    assert {op.out for op in rounded.ops if isinstance(op, Round)} == {"hidden.rounded", "mixed", "gate"}
    assert {op.x for op in rounded.ops if isinstance(op, Linear)} == {"hidden.rounded", "mixed", "gate"}
    assert all(op.x == "hidden" for op in rounded.ops if isinstance(op, Norm))


@pytest.mark.parametrize(("kind", "largest"), [("int8", 127), ("fp8_e4m3", 448)])
def test_static_scales_are_those_of_the_observer(kind: str, largest: int) -> None:
    program = made_weights({"model_type": "llama", **SMALL}).program
    made = {op.weight: made_statistics(program.tensors[op.weight].cols, seed=i)
            for i, op in enumerate(program.ops) if isinstance(op, Linear)}  # fmt: skip
    rounded = round_activations(program, kind, made.get)
    follows = {a: b for a, b in zip(rounded.ops, rounded.ops[1:], strict=False) if isinstance(a, Round)}
    for op, linear in follows.items():
        assert op.scale == pytest.approx(made[linear.weight].absmax.max() / largest)
    clipped = round_activations(program, kind, made.get, "percentile")
    inputs = made["layers.0.q"]
    low, high = np.percentile(inputs.rows, [0.1, 99.9])
    first = next(op for op in clipped.ops if isinstance(op, Round))
    assert first.scale == pytest.approx(max(-low, high) / largest, rel=1e-4)


def test_inputs_that_are_all_zero_get_a_scale_that_can_divide() -> None:
    zero = np.zeros(4, np.float32)
    silent = InputStatistics(3, np.zeros((4, 4), np.float32), zero, zero, zero[None])
    assert static_scale(silent, "int8", "minmax", Linear(x="a", out="b", weight="w")) > 0


def test_a_linear_without_statistics_is_named() -> None:
    program = made_weights({"model_type": "llama", **SMALL}).program
    with pytest.raises(BadConfig, match=r"layers\.0\.q.*dynamic"):
        round_activations(program, "int8", lambda name: None)
