"""The torch meaning of a Program against the numpy reference, for every trait that architectures have."""

from __future__ import annotations

import numpy as np
import pytest
from arch_cases import CASES, GEMMA, SMALL, VOCAB

from builders.archs import read_program
from builders.segments import cut, linear_groups
from edge_runtime.backends import numpy_ops
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.ops import Gather, Input, Linear, Logits, Round
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program, TensorSpec

torch = pytest.importorskip("torch")
torch_program = pytest.importorskip("builders.torch_program")
Past, TorchProgram = torch_program.Past, torch_program.TorchProgram


@pytest.mark.parametrize("case", CASES, ids=str)
def test_torch_means_what_the_reference_means(case) -> None:
    config = {"model_type": case.model_type, **SMALL, **case.config}
    program = read_program(config, context=case.context).program
    weights = _random_weights(config, case.context)
    tokens = np.random.default_rng(3).integers(3, VOCAB, (2, 20)).astype(np.int32)
    run = TorchProgram(program, lambda name: torch.from_numpy(weights[name]))
    with torch.no_grad():
        logits = run(torch.from_numpy(tokens).long()).numpy()
    want = _reference(program, weights, tokens)
    assert np.abs(logits - want).max() <= 2e-4 * np.abs(want).max()


@pytest.mark.parametrize("kind", ["fp8_e4m3", "int8"])
@pytest.mark.parametrize("scale", [None, 0.03])
def test_rounded_and_reordered_inputs(kind: str, scale: float | None) -> None:
    """To the bit as the runtime's codecs, and the gradient passes a rounding as if it were not there."""
    program = Program(
        ops=(
            Input(out="x"),
            Gather(x="x", out="y", order="o"),
            Round(x="y", out="y", format=kind, scale=scale),
            Logits(x="y", weight="head"),
        ),
        tensors={"o": TensorSpec(1, 40, "vector"), "head": TensorSpec(9, 40, "head")},
        buffers={"x": 67, "y": 40},
        cache=(),
        vocab_size=9,
        max_context=8,
    )
    rng = np.random.default_rng(4)
    x = rng.standard_normal((2, 5, 67)).astype(np.float32) * np.exp(rng.standard_normal((2, 5, 1))).astype(
        "f4"
    )
    x[0, 1] = 0
    order = rng.integers(0, 67, 40)
    weights = {"o": order[None].astype(np.float32), "head": np.ones((9, 40), np.float32)}
    run = TorchProgram(program, lambda name: torch.from_numpy(weights[name]))
    rows = torch.from_numpy(x).requires_grad_()
    buffers = {"x": rows}
    run.run(program.ops[:-1], buffers)
    want = numpy_ops.rounded(x.reshape(10, 67)[:, order], kind, scale)
    assert np.array_equal(buffers["y"].detach().numpy().reshape(10, 40), want)
    buffers["y"].sum().backward()
    assert rows.grad is not None
    assert np.array_equal(rows.grad.numpy(), np.broadcast_to(np.bincount(order, minlength=67), x.shape))


def test_segments_in_turn_are_the_program() -> None:
    config = {"model_type": "gemma2", **SMALL, **GEMMA, "tie_word_embeddings": True}
    program = read_program(config).program
    weights = _random_weights(config, None)
    tokens = torch.arange(12).reshape(2, 6) + 3
    run = TorchProgram(program, lambda name: torch.from_numpy(weights[name]))
    with torch.no_grad():
        whole = run.hidden(tokens)
        kept: dict[str, torch.Tensor] = {}
        for segment in cut(program):
            buffers = {name: kept[name] for name in segment.reads}
            run.run(segment.ops(program), buffers, tokens)
            kept = buffers
    assert torch.equal(whole, kept["normed"])
    assert all(len(s.reads) == 1 for s in cut(program)[1:])  # only the residual stream is carried on


PIECES = ("untied-gqa", "window", "tight-caps", "pattern-cap", "multipliers", "partial", "no-rope")


@pytest.mark.parametrize("case", [c for c in CASES if c.name in PIECES and c.context is None], ids=str)
def test_a_text_read_piece_by_piece_is_the_whole_text(case) -> None:
    config = {"model_type": case.model_type, **SMALL, **case.config}
    program = read_program(config).program
    weights = _random_weights(config, None)
    tokens = torch.from_numpy(np.random.default_rng(4).integers(3, VOCAB, (2, 20)))
    run = TorchProgram(program, lambda name: torch.from_numpy(weights[name]))
    past = Past(20)
    with torch.no_grad():
        whole = run.hidden(tokens)
        pieces = [run.hidden(piece, past=past) for piece in tokens.split([7, 1, 1, 11], dim=1)]
    assert past.tokens == 20
    found = torch.cat(pieces, dim=1)
    assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


def test_linears_that_read_the_same_values_are_one_group() -> None:
    program = read_program({"model_type": "llama", **SMALL}).program
    groups = [g for s in cut(program) for g in linear_groups(program, s)]
    assert groups[:4] == [
        ("layers.0.q", "layers.0.k", "layers.0.v"),
        ("layers.0.o",),
        ("layers.0.gate", "layers.0.up"),
        ("layers.0.down",),
    ]
    assert sum(map(len, groups)) == sum(isinstance(op, Linear) for op in program.ops)


def test_a_hook_replaces_what_a_linear_reads() -> None:
    program = read_program({"model_type": "llama", **SMALL}).program
    weights = _random_weights({"model_type": "llama", **SMALL}, None)
    run = TorchProgram(program, lambda name: torch.from_numpy(weights[name]))
    tokens, seen = torch.arange(4)[None] + 3, []

    def silence(op: Linear, x: torch.Tensor) -> torch.Tensor:
        seen.append(op.weight)
        return x * 0 if op.weight.endswith(".down") else x

    with torch.no_grad():
        assert not torch.equal(run.hidden(tokens, silence), run.hidden(tokens))
    assert seen[:3] == ["layers.0.q", "layers.0.k", "layers.0.v"]


def _random_weights(config, context) -> dict[str, np.ndarray]:
    architecture = read_program(config, context=context)
    rng = np.random.default_rng(5)
    found = {}
    for name, spec in architecture.program.tensors.items():
        made = architecture.sources[name].constant
        values = rng.normal(size=(spec.rows, spec.cols)) / np.sqrt(spec.cols) if made is None else made
        if made is None and spec.role == "vector":
            values = 1.0 + 0.1 * rng.normal(size=(1, spec.cols))
        found[name] = np.asarray(values, np.float32).reshape(spec.rows, spec.cols)
    return found


def _reference(program, weights, tokens) -> np.ndarray:
    batch, length = tokens.shape
    pages = -(-length // 16)
    kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=batch * pages)
    step = StepShape(context=length, sequences=batch, tokens=batch * length, logits=batch * length)
    executor = ReferenceExecutor(program, weights.__getitem__, kv, step)
    step_batch = StepBatch(
        tokens=tokens.reshape(-1),
        positions=np.tile(np.arange(length, dtype=np.int32), batch),
        sequence=np.repeat(np.arange(batch, dtype=np.int32), length),
        page_tables=np.arange(batch * pages, dtype=np.int32).reshape(batch, pages),
        logit_rows=np.arange(batch * length, dtype=np.int32),
    )
    return executor.forward(step_batch).reshape(batch, length, -1)
