"""The exactness contract: a token's numbers are equal to the bit whatever shares the step."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import (
    PAGES,
    ids,
    instruction_sets,
    llama,
    packed,
    part_of,
    run,
    step,
    vector,
)

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import KV_FORMATS, kv_format
from edge_runtime.engine.layout import lay_out
from edge_runtime.engine.ops import Activation, Add, Embed, KvAppend, Linear, Logits, Norm
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

SIMD = instruction_sets()


EXACT = ["int4_g64", "int4_g32_zp", "int8_row", "int8_g128", "nf4_g64", "f16", "fp8_e4m3_row"]
EXACT += ["nf4_g64_f32", "nf4_g64_dq", "fp8_e4m3_g128", "int8_row_o128"]


@pytest.mark.parametrize("name", FORMATS)
def test_instruction_sets_agree_to_the_bit(name: str) -> None:
    part = llama(name, kv=list(KV_FORMATS)[len(name) % len(KV_FORMATS)], softcap=5.0, window=19)
    batch = step((0, 0, ids(23)), (1, 0, ids(5, 6)))
    want = run(part, batch, simd="scalar")
    for simd in SIMD:
        assert np.array_equal(run(part, batch, simd=simd).view(np.int32), want.view(np.int32)), simd


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_chunks_batches_and_threads_agree_to_the_bit(name: str, kv: str) -> None:
    part = llama(name, kv=kv, head_dim=64 if kv == "int4" else 32, softcap=3.0)
    text, other = ids(27), ids(13, 9)
    want = run(part, step((0, 0, text)))
    for threads in (2, 3):
        assert np.array_equal(run(part, step((0, 0, text)), threads=threads), want)
    executor = BACKEND.load(part, threads=2)
    for size in (1, 7):
        for sequence in (0, 1):  # the other sequence's pages lie elsewhere
            parts = [
                executor.forward(step((sequence, i, text[i : i + size]))).copy() for i in range(0, 27, size)
            ]
            assert np.array_equal(np.concatenate(parts), want)
    # Another sequence in the same step, before, between and after
    executor.forward(step((1, 0, other[:5])))
    first = executor.forward(step((1, 5, other[5:9]), (0, 0, text[:20]))).copy()
    second = executor.forward(step((0, 20, text[20:]), (1, 9, other[9:]))).copy()
    assert np.array_equal(np.concatenate([first[4:], second[:7]]), want)
    executor.close()


def test_the_comparison_to_the_bit_has_power() -> None:
    """The reference sums in another order: near, but not equal, or the tests above would prove nothing."""
    part, batch = llama("f32"), step((0, 0, ids(20)))
    got, want = run(part, batch), REFERENCE.load(part).forward(batch)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert not np.array_equal(got, want)


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("head_dim", [48, 64, 9])
def test_cache_bytes_are_the_codecs(kv: str, head_dim: int) -> None:
    """What kv_append writes is the numpy codec's to the bit: zeros, outliers, denormals and ties too."""
    rng = np.random.default_rng(8)
    heads, tokens = 2, 20
    width = heads * head_dim
    x = rng.standard_normal((width, width), dtype=np.float32)
    x[1] = 0
    x[2, :head_dim] = 1e-42
    x[3] *= 1000
    x[4] = np.abs(x[4])
    x[5] = -np.abs(x[5])
    x[6] = np.arange(width) / 2  # ties
    x[7] *= np.float32(1e-7)
    x[8, 0] = 60000
    x = x.astype(np.float32)
    program = Program(
        ops=(Embed(out="x", weight="x"), KvAppend(k="x", v="x", layer=0), Logits(x="x", weight="x")),
        tensors={"x": TensorSpec(width, width, "head")},
        buffers={"x": width},
        cache=(CacheSlot(heads, head_dim),),
        vocab_size=width,
        max_context=64,
    )
    part = part_of(program, {"x": packed(x, "f32")}, kv=kv)
    executor = BACKEND.load(part)
    executor.forward(step((0, 0, np.arange(tokens if width >= tokens else width))))
    count = min(tokens, width)
    want = kv_format(kv).encode(x[:count].reshape(count * heads, head_dim))
    for name, plane in want.items():
        for which in ("k", "v"):
            pages = executor._arena.cache(0, which, name)
            for t in range(count):
                got = pages[PAGES[0][t // 16], :, t % 16]
                assert np.array_equal(got, plane[t * heads : (t + 1) * heads]), (name, t)
    executor.close()


def test_buffers_that_share_bytes_in_other_widths() -> None:
    """`narrow` is dead when `x` is written over it; no token may run ahead into rows still to be read."""
    rng = np.random.default_rng(9)
    shapes = {"a": (70, 32), "b": (70, 96), "c": (40, 32), "d": (40, 96), "e": (70, 40)}
    tensors = {name: TensorSpec(r, c, "matrix") for name, (r, c) in shapes.items()}
    tensors["n"] = TensorSpec(1, 96, "vector")
    weights = {n: packed(rng.standard_normal(s, dtype=np.float32), "f32") for n, s in shapes.items()}
    weights["n"] = vector(np.ones(96))
    program = Program(
        ops=(
            Embed(out="narrow", weight="a"),
            Embed(out="h", weight="b"),
            Activation(x="narrow", out="t", kind="relu"),
            Norm(x="h", out="x", weight="n", eps=1e-5),
            Linear(x="t", out="y", weight="c"),
            Linear(x="x", out="z", weight="d"),
            Linear(x="x", out="unread", weight="d"),  # may share bytes with the next one's
            Linear(x="x", out="w", weight="d"),
            Add(a="y", b="z", out="y"),
            Add(a="y", b="w", out="y"),
            Logits(x="y", weight="e"),
        ),
        tensors=tensors,
        buffers={"narrow": 32, "h": 96, "t": 32, "x": 96, "y": 40, "z": 40, "w": 40, "unread": 40},
        cache=(),
        vocab_size=70,
        max_context=64,
    )
    part, batch = part_of(program, weights), step((0, 0, ids(32)))
    offsets = lay_out(part.program, part.step).offsets
    assert offsets["narrow"] == offsets["x"]  # or this test shows nothing
    want = REFERENCE.load(part).forward(batch)
    for threads in (1, 3):
        assert np.abs(run(part, batch, threads=threads) - want).max() <= 1e-5 * np.abs(want).max()
