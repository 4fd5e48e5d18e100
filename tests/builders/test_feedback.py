"""Quantization in order: statistics of the quantized model and its drift, against two whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from arch_cases import SMALL, VOCAB
from hf_folders import write_model
from killed_build import options_of
from made_weights import MadeWeights, made_weights

from builders import pipeline
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.ops import Embed, Input, Linear, Logits
from edge_runtime.errors import BadConfig, Unsupported, ValueOutOfRange

torch = pytest.importorskip("torch")
feedback = pytest.importorskip("builders.feedback")
TorchProgram = pytest.importorskip("builders.torch_program").TorchProgram
WINDOWS = np.random.default_rng(3).integers(3, VOCAB, (12, 40)).astype(np.int32)
ALONE = feedback.FeedbackOptions(device="cpu", cores=1)
CONFIGS = {
    "llama": {"model_type": "llama", **SMALL},
    "tied": {"model_type": "qwen3", **SMALL, "head_dim": 8, "tie_word_embeddings": True},
    "gemma2": {
        "model_type": "gemma2",
        **SMALL,
        "head_dim": 8,
        "query_pre_attn_scalar": 12,
        "sliding_window": 6,
    },
}


def coarse(weights: MadeWeights, seen: dict[str, InputStatistics | None], algorithm: str = "rtn"):
    """A choice that rounds matrices to int4_g32 and the rest to int8_row, and keeps what it was told."""
    chosen = {}

    def choose(name: str, inputs: InputStatistics | None) -> Array:
        assert name not in seen
        seen[name] = inputs
        matrix = weights.program.tensors[name].role == "matrix"
        fmt, how = (
            get_format("int4_g32" if matrix else "int8_row"),
            get_algorithm(algorithm if matrix else "rtn"),
        )
        w = weights(name)
        chosen[name] = fmt.decode(how.quantize(w, fmt, inputs, AlgorithmOptions()), *w.shape)
        return chosen[name]

    return choose, chosen


def reads(weights: MadeWeights, tensors: dict[str, Array], name: str) -> Array:
    """Inputs (tokens, n) of one linear (or the head) in the whole model with those tensors, f64."""
    run = TorchProgram(weights.program, lambda n: torch.from_numpy(tensors[n]))
    found = []

    def hook(op: Linear, x: torch.Tensor) -> torch.Tensor:
        if op.weight == name:
            found.append(x)
        return x

    with torch.no_grad():
        hidden = run.hidden(torch.from_numpy(WINDOWS).long(), hook)
    x = found[0] if found else hidden
    return x.reshape(-1, x.shape[-1]).double().numpy()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_once_in_order_with_the_inputs_that_it_will_get(kind: str, tmp_path: Path) -> None:
    weights, seen = made_weights(CONFIGS[kind]), {}
    program = weights.program
    choose, chosen = coarse(weights, seen)
    feedback.quantize_in_order(weights, WINDOWS, choose, tmp_path, ALONE)
    order = [op.weight for op in program.ops if isinstance(op, Embed | Linear | Logits)]
    assert list(seen) == list(dict.fromkeys(order))
    assert seen["embed"] is None
    after = dict(weights.tensors)
    after["embed"] = chosen["embed"]
    group: list[str] = []
    for name, inputs in seen.items():
        if inputs is None:
            continue
        if not (group and seen[group[0]] is inputs):  # the first of those that read the same values
            for other in group:
                after[other] = chosen[other]
            group = []
        group.append(name)
        if name.endswith((".q", ".o", "1.down", "head")):
            f, x = (reads(weights, tensors, name) for tensors in (weights.tensors, after))
            moment = x.T @ x / len(x)
            assert np.abs(inputs.hessian - moment).max() <= 1e-4 * np.abs(moment).max()
            assert np.abs(inputs.drift - (f - x).T @ x / len(x)).max() <= 1e-4 * np.abs(moment).max()
            assert np.abs(inputs.drift).max() > 1e-3 * np.abs(moment).max() or name == "layers.0.q"
            assert inputs.count == WINDOWS.size
            np.testing.assert_allclose(inputs.absmax, np.abs(x).max(axis=0), rtol=1e-3)
    assert not list(tmp_path.iterdir())


def test_exact_weights_do_not_drift(tmp_path: Path) -> None:
    weights, drifts = made_weights(CONFIGS["llama"]), []

    def choose(name: str, inputs: InputStatistics | None) -> Array:
        if inputs is not None:
            drifts.append(np.abs(inputs.drift).max())
        return weights(name)

    feedback.quantize_in_order(weights, WINDOWS, choose, tmp_path, ALONE)
    assert len(drifts) == 22
    assert max(drifts) == 0.0


def test_rows_on_disk_are_rows_in_memory(tmp_path: Path) -> None:
    weights, found = made_weights(CONFIGS["llama"]), []
    for memory in (0, 1 << 30):
        choose, chosen = coarse(weights, {}, "gptq")
        options = feedback.FeedbackOptions(device="cpu", cores=2, memory=memory)
        feedback.quantize_in_order(weights, WINDOWS, choose, tmp_path, options)
        found.append(chosen)
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_gptq_with_feedback_is_nearer_to_the_f32_model(tmp_path: Path) -> None:
    """Mean squared error of the logits' input, against GPTQ on the f32 model's inputs: at least 10% less."""
    weights = made_weights(CONFIGS["llama"])
    exact = reads(weights, weights.tensors, "head")

    def plain(name: str, inputs: InputStatistics | None) -> Array:
        if inputs is None or weights.program.tensors[name].role != "matrix":
            return coarse_choice(name, None)
        x = reads(weights, weights.tensors, name).astype(np.float32)
        own = InputStatistics(len(x), x.T @ x / len(x), np.abs(x).max(0), np.abs(x).mean(0), x[:256])
        return coarse_choice(name, own)

    error = {}
    for kind in ("feedback", "plain"):
        coarse_choice, chosen = coarse(weights, {}, "gptq")
        choose = coarse_choice if kind == "feedback" else plain
        feedback.quantize_in_order(weights, WINDOWS, choose, tmp_path, ALONE)
        error[kind] = np.square(reads(weights, weights.tensors | chosen, "head") - exact).mean()
    assert error["feedback"] < 0.9 * error["plain"]


def test_a_table_that_is_the_head_too_is_rounded_by_what_the_head_reads(tmp_path: Path) -> None:
    """Against rounding it to nearest, as embeddings alone are: at least 20% less error of the head."""
    weights = made_weights(CONFIGS["tied"])
    x = reads(weights, weights.tensors, "the head").astype(np.float32)
    own = InputStatistics(len(x), x.T @ x / len(x), np.abs(x).max(0), np.abs(x).mean(0), x[:256])
    fmt, w, error = get_format("int4_g32"), weights("embed"), {}
    for kind in ("known", "nearest"):
        asked, found = [], {}

        def known(name: str, kind: str = kind, asked: list[str] = asked) -> InputStatistics | None:
            asked.append(name)
            return own if kind == "known" else None

        def choose(name: str, inputs: InputStatistics | None, found: dict[str, Array] = found) -> Array:
            if name == "embed":
                made = get_algorithm("gptq").quantize(w, fmt, inputs, AlgorithmOptions())
                found[name] = fmt.decode(made, *w.shape)
            return found.get(name, weights(name))

        feedback.quantize_in_order(weights, WINDOWS, choose, tmp_path, ALONE, known=known)
        assert asked == ["embed"]
        error[kind] = np.square((found["embed"] - w) @ x.T).mean()
    assert error["known"] < 0.8 * error["nearest"]


def test_values_that_are_no_numbers_are_named(tmp_path: Path) -> None:
    weights = made_weights(CONFIGS["llama"])
    with pytest.raises(ValueOutOfRange, match=r"segment 1 .*NaN"):
        feedback.quantize_in_order(
            weights, WINDOWS, lambda n, i: weights(n) * np.float32(np.nan), tmp_path, ALONE
        )
    assert not list(tmp_path.iterdir())


def test_a_program_of_rows_is_refused(tmp_path: Path) -> None:
    weights = made_weights(CONFIGS["llama"])
    first = weights.program.ops[0]
    ops = tuple(Input(out=op.out) if op is first else op for op in weights.program.ops)
    rows = MadeWeights(msgspec.structs.replace(weights.program, ops=ops), weights.tensors)
    with pytest.raises(Unsupported, match="rows"):
        feedback.quantize_in_order(rows, WINDOWS, lambda n, i: weights(n), tmp_path, ALONE)


@pytest.mark.parametrize("algorithm", ["gptq", "awq+gptq"])
def test_an_engine_built_with_feedback_is_the_same_every_time_and_another_one(
    algorithm: str, tmp_path: Path
) -> None:
    model, engines = write_model(tmp_path / "toy"), {}
    for name in ("plain", "first", "second"):
        options = options_of(model, tmp_path / f"{name}.edge", auto=False)
        pipeline.build(replace(options, algorithm=algorithm, feedback=name != "plain"))
        engines[name] = (tmp_path / f"{name}.edge").read_bytes()
    assert engines["first"] == engines["second"] != engines["plain"]
    assert len(engines["first"]) == len(engines["plain"])


def test_feedback_without_calibration_is_refused(tmp_path: Path) -> None:
    options = options_of(write_model(tmp_path / "toy"), tmp_path / "m.edge", auto=False)
    with pytest.raises(BadConfig, match="--feedback"):
        pipeline.build(replace(options, algorithm="rtn", feedback=True))
