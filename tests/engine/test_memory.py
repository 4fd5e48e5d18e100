"""The memory plan against sums made by hand, and the refusal with both figures."""

from __future__ import annotations

import pytest

from edge_runtime.engine.kv import cache_arrays, cache_nbytes, kv_format
from edge_runtime.engine.memory import (
    adapter_nbytes,
    check_fits,
    low_rank_layout,
    memory_plan,
    scratch_nbytes,
    weights_nbytes,
)
from edge_runtime.engine.ops import Attention, Embed, KvAppend, Linear, Logits
from edge_runtime.engine.plan import KvPlan, StepShape, TensorPlan
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import BadConfig, DoesNotFit

STEP = StepShape(context=64, sequences=1, tokens=8, logits=1)
KV = KvPlan(k="int8", v="int4", page_tokens=16, pages=4)


def one_layer() -> Program:
    program = Program(
        ops=(
            Embed(out="hidden", weight="embedding"),
            Linear(x="hidden", out="k", weight="k"),
            Linear(x="hidden", out="v", weight="k"),
            KvAppend(k="k", v="v", layer=0),
            Attention(q="hidden", out="mixed", layer=0, heads=4, kv_heads=2, head_dim=64, scale=0.125),
            Logits(x="mixed", weight="embedding"),
        ),
        tensors={"embedding": TensorSpec(100, 256, "embedding"), "k": TensorSpec(128, 256, "matrix")},
        buffers={"hidden": 256, "k": 128, "v": 128, "mixed": 256},
        cache=(CacheSlot(2, 64),),
        vocab_size=100,
        max_context=128,
    )
    program.check()
    return program


def test_weights_are_the_planes_to_the_byte() -> None:
    plan = {"embedding": TensorPlan("int8_row", "rows"), "k": TensorPlan("int4_g64", "rows")}
    embedding = 100 * 256 + 448  # 100 f32 scales = 400 bytes, rounded up to 64
    k = 128 * 256 // 2 + 128 * (256 // 64) * 2
    assert weights_nbytes(one_layer(), plan) == embedding + k


def test_kv_arena_by_hand() -> None:
    rows = 4 * 16 * 2  # pages, tokens, kv heads
    k = rows * (64 + 4)  # int8 codes and an f32 scale
    v = rows * (32 + 2 * (2 + 1))  # nibbles, two groups of f16 scale and u8 zero point
    assert cache_nbytes(one_layer(), KV, STEP) == k + v
    assert {(a.which, a.plane) for a in cache_arrays(one_layer(), KV)} == {
        ("k", "q"), ("k", "scale"), ("v", "q"), ("v", "scale"), ("v", "zero"),
    }  # fmt: skip


def test_scratch_grows_with_threads_only_by_attention() -> None:
    program = one_layer()
    tiles, queries = 2 * 16 * 64, 2 * 4  # keys and values; heads of a kv head times tokens of a block
    floats = tiles + queries * (2 * 64 + 32 + 1) + 8  # the last 8 round up to 64 bytes
    assert scratch_nbytes(program, STEP, 3) - scratch_nbytes(program, STEP, 2) == floats * 4


def test_adapter_by_hand() -> None:
    program = one_layer()
    offsets, stride = low_rank_layout(program, {"k": 5, "embedding": 12})
    # k and v read one buffer and run together, so their A x lie side by side; the head's is alone
    assert offsets == {1: 0, 2: 8, 5: 0} and stride == 16
    a = (8 * 256 + 16 * 256) * 2  # ranks padded to 8
    b = (5 * 128 + 12 * 112) * 2  # rows padded to 16
    assert adapter_nbytes(program, STEP, {"k": 5, "embedding": 12}) == a + b + STEP.tokens * 16 * 4


def test_plan_adds_up_and_refuses_with_both_figures() -> None:
    plan = {"embedding": TensorPlan("f16", "rows"), "k": TensorPlan("f16", "rows")}
    memory = memory_plan(one_layer(), plan, KV, STEP, threads=2, total=1 << 20, reserve=1 << 19, context=100)
    assert memory.need == memory.weights + memory.kv + memory.buffers + 100
    assert memory.have == 1 << 19
    check_fits(memory, memory.need, "a test")
    with pytest.raises(DoesNotFit, match="MemAvailable gives") as caught:
        check_fits(memory, memory.need - 1, "MemAvailable")
    assert (caught.value.need, caught.value.have) == (memory.need, memory.need - 1)
    assert caught.value.exit_code == 2


def test_unknown_kv_format_names_the_nearest() -> None:
    with pytest.raises(BadConfig, match="did you mean 'int8'"):
        kv_format("int9")
