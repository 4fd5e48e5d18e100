"""Device memory of a part on the cuda backend: figures worked out by hand, and what holds for any part."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_engine import toy_program

from edge_runtime.engine.device_code import has_kernels, matrix_kernels
from edge_runtime.engine.device_memory import (
    device_regions,
    device_scratch_nbytes,
    step_layout,
    table_width,
)
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.launches import PrepareLaunch
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.memory import buffers_nbytes, memory_plan, part_nbytes, weights_nbytes
from edge_runtime.engine.ops import Activation, Input, Logits
from edge_runtime.engine.packing import cuda_packing
from edge_runtime.engine.plan import KvPlan, StepShape, TensorPlan
from edge_runtime.engine.program import Program, TensorSpec

KV = KvPlan(k="int8", v="int8", page_tokens=16, pages=12)
STEP = StepShape(context=64, sequences=3, tokens=20, logits=5)


def head_program(width: int = 40, vocab: int = 50) -> Program:
    """Without a cache: rows come with each step."""
    return Program(
        ops=(Input(out="x"), Activation(x="x", out="x", kind="silu"), Logits(x="x", weight="w")),
        tensors={"w": TensorSpec(vocab, width, "head")},
        buffers={"x": width},
        cache=(),
        vocab_size=vocab,
        max_context=64,
    )


def test_figures_by_hand() -> None:
    """Width 32, hidden 64, head 8, 4 heads over 2, vocabulary 64: each region rounded up to 64 bytes."""
    want = {
        "answer": 64,  # a status and five ids: 24 bytes
        "codes": 64 * 128 * 2,  # a tile of 64 tokens; 64 columns are padded to 128, of f16 at most
        "scales": 64 * 8 * 4,  # a group of 16 has one
        "sums": 64 * 8 * 4,
        "angles": 20 * 2 * 4 * 4,
        "partial": 8 * 4 * (1 * 8 + 4) * 4,  # of 8 tokens, 4 heads: one chunk of 8 sums; its softmax in 4
        "rows": 5 * 32 * 4,
        "logits": 5 * 64 * 4,
        "keys": 8 * 5 * 72,
        "top": 2 * 4 * 5 * 72,
        "history": 4 * 64 * 5,
        "move": 576,  # 4 * (2 * 64 + 4) = 528
    }
    found = device_regions(toy_program(), KV, STEP)
    assert {name: found[name] for name in want} == want
    # counts in 16 items, arrays of 20 tokens in 32 each
    offsets, _ = step_layout(toy_program(), KV, STEP)
    assert [offsets[n] for n in ("counts", "tokens", "positions", "logit_rows")] == [0, 16, 48, 16 + 6 * 32]
    assert "inputs" not in found, "this program looks its tokens up"
    assert device_regions(head_program(), KV, STEP)["inputs"] == 20 * 40 * 4


def test_long_contexts_take_more_chunks() -> None:
    program = toy_program(context=2048)
    step = msgspec.structs.replace(STEP, context=1500)
    # six chunks of 256: 6 * 8 sums, 12 of softmax
    assert device_regions(program, KV, step)["partial"] == 8 * 4 * (6 * 8 + 12) * 4
    assert table_width(program, KV, step) == 94
    assert table_width(program, msgspec.structs.replace(KV, page_tokens=32), step) == 47
    assert table_width(toy_program(), KV, step) == 4, "no longer than the program's context"


shapes = st.builds(
    StepShape,
    context=st.integers(1, 700),
    sequences=st.integers(1, 9),
    tokens=st.integers(1, 130),
    logits=st.integers(1, 70),
)


@given(shapes, st.sampled_from([16, 32]))
def test_the_record_of_a_step(step: StepShape, page_tokens: int) -> None:
    """Arrays begin on 64 bytes, none lies on another, page tables are last and whole."""
    program, kv = toy_program(context=512), msgspec.structs.replace(KV, page_tokens=page_tokens)
    offsets, length = step_layout(program, kv, step)
    sizes = {"counts": 16, "logit_rows": step.logits, "adapters": 2 * step.sequences}
    sizes["page_tables"] = step.sequences * -(-min(step.context, 512) // page_tokens)
    sizes |= {n: step.tokens for n in offsets if n not in sizes}
    assert {"tokens", "positions", "sequence", "places", "parents", "bends"} <= set(sizes)
    ends = sorted((at, at + sizes[name], name) for name, at in offsets.items())
    assert ends[0] == (0, 16, "counts") and ends[-1][2] == "page_tables"
    assert all(at % 16 == 0 for at, _, _ in ends)
    assert all(end <= at for (_, end, _), (at, _, _) in pairwise(ends))
    assert ends[-1][1] <= length < ends[-1][1] + 16
    assert device_regions(program, kv, step)["step"] == 4 * length


@given(shapes, st.sampled_from(["context", "sequences", "tokens", "logits"]), st.integers(1, 40))
def test_more_never_takes_less(step: StepShape, name: str, more: int) -> None:
    program = toy_program(context=512)
    larger = msgspec.structs.replace(step, **{name: getattr(step, name) + more})
    a, b = device_regions(program, KV, step), device_regions(program, KV, larger)
    assert a.keys() == b.keys() and all(a[region] <= b[region] for region in a)
    assert all(nbytes % 64 == 0 and nbytes > 0 for nbytes in a.values())
    assert device_scratch_nbytes(program, KV, step) == sum(a.values())


@pytest.mark.parametrize("name", sorted(n for n in FORMATS if has_kernels(n)))
def test_inputs_of_every_format_fit(name: str) -> None:
    """Regions are sized without knowing the formats, so for the greatest need of any."""
    program = toy_program(width=96)
    formats = {n: "f32" if s.role == "vector" else name for n, s in program.tensors.items()}
    regions = device_regions(program, KV, STEP)
    kind = matrix_kernels(name).kind
    launches = [x for x in lower(program, formats, KV).launches if isinstance(x, PrepareLaunch)]
    assert launches
    for launch in launches:
        assert launch.kind == kind
        columns = -(-launch.width // 128) * 128
        unit = matrix_kernels(name).unit
        assert columns >= -(-launch.width // unit) * unit, "what a product reads is there"
        size = 1 if kind.startswith("int") else 2
        assert 64 * columns * size <= regions["codes"]
        groups = columns // int(kind[3:]) if kind.startswith("int") else 1
        assert 64 * groups * 4 <= regions["scales"] and 64 * groups * 4 <= regions["sums"]


@pytest.mark.parametrize("make", [toy_program, head_program])
def test_the_planner_adds_up_the_same(make: Any) -> None:
    program = make()
    tensors = {
        name: TensorPlan("f32", "rows")
        if spec.role == "vector"
        else TensorPlan("int4_g64", cuda_packing("int4_g64"))
        for name, spec in program.tensors.items()
    }
    kv = KV if program.cache else msgspec.structs.replace(KV, pages=0)
    plan = memory_plan(program, tensors, kv, STEP, threads=3, total=1 << 30, reserve=1 << 20, backend="cuda")
    regions = device_regions(program, kv, STEP)
    assert (
        plan.buffers == sum(regions.values()) == buffers_nbytes(program, kv, STEP, threads=0, backend="cuda")
    )
    assert (plan.weights, plan.kv) == (weights_nbytes(program, tensors), cache_nbytes(program, kv, STEP))
    whole = part_nbytes(program, tensors, kv, STEP, threads=1, backend="cuda")
    assert whole == plan.weights + plan.kv + plan.buffers
    other = memory_plan(program, tensors, kv, STEP, threads=3, total=1 << 30, reserve=1 << 20)
    assert other.buffers != plan.buffers and other.weights == plan.weights
