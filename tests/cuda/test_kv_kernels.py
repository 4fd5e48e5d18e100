"""Angles, rotation, the store of keys and values, and moves of rows, in the emulator: to the codecs' bits."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import pytest
from emulation import Emulated, Guarded, compile_kernels
from kv_cases import CLASSES, Side, Step, Tokens, scattered

from edge_runtime.backends import numpy_ops
from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array

DIMS = (5, 8, 16, 24, 64, 80, 96, 128, 256)
PAIRS = [("f16", "int4"), ("int8", "fp8"), ("int4", "int8"), ("fp8", "f16"), ("int4", "int4")]
KV_HEADS = 2
LENGTHS = [37, 70, 5]


def _symbol(kind: str, k: str, v: str, head_dim: int) -> str:
    return f"{kind}_{k}_{v}_{head_dim}"


@lru_cache(maxsize=1)
def library() -> Emulated:
    lines = ['#include "kv_move.cuh"', '#include "rope_append.cuh"']
    lines.append("EDGE_KERNEL(angles, 128, EdgeAngles, edge::angles)")
    for head_dim in DIMS:
        lines.append(f"EDGE_KERNEL(rope_{head_dim}, 128, EdgeRopeAppend, edge::rope<{head_dim}>)")
        for k, v in PAIRS:
            types = f"{CLASSES[k]}, {CLASSES[v]}, {head_dim}"
            name = _symbol("append", k, v, head_dim)
            lines.append(f"EDGE_KERNEL({name}, 128, EdgeRopeAppend, edge::rope_append<{types}>)")
            name = _symbol("move", k, v, head_dim)
            lines.append(f"EDGE_KERNEL({name}, 32, EdgeMove, edge::kv_move<{types}>)")
    return Emulated(compile_kernels("\n".join(lines)))


def bits(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32).view(np.uint32)


def angles_of(positions: Array, inv_freq: Array, scale: float) -> Array:
    """cos and sin as numpy_ops.rope has them, f32 (tokens, 2 * freqs)."""
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    both = np.concatenate([np.cos(angle), np.sin(angle)], axis=1) * np.float64(np.float32(scale))
    return both.astype(np.float32)


def test_records_have_the_size_of_the_headers() -> None:
    kernels = library()
    assert kernels.record_bytes("angles") == ctypes.sizeof(rec.Angles)
    assert kernels.record_bytes("rope_64") == ctypes.sizeof(rec.Append)
    assert kernels.record_bytes(_symbol("move", "int4", "int4", 64)) == ctypes.sizeof(rec.Move)


@pytest.mark.parametrize("freqs", [1, 5, 32, 64])
@pytest.mark.parametrize("scale", [1.0, 1.2079441])
def test_angles_are_exact_to_f32(freqs: int, scale: float) -> None:
    rng = np.random.default_rng(freqs)
    positions = np.append(rng.integers(0, 1 << 20, 40), [0, 1, 2, (1 << 20) - 1]).astype(np.int32)
    inv_freq = (10000.0 ** -(np.arange(freqs) / freqs)).astype(np.float32)
    step = Step(Tokens(positions, np.zeros_like(positions), np.zeros((1, 1))), bucket=50)
    frequencies, out = Guarded.of(inv_freq), Guarded(50 * 2 * freqs * 4)
    before = out.data.copy()
    record = rec.Angles(
        step=step.record, inv_freq=frequencies.address, angles=out.address, freqs=freqs, scale=scale
    )
    library().launch("angles", -(-50 * freqs // 128), record)
    want = angles_of(positions, inv_freq, scale)
    got = out.view(np.float32, (50, 2 * freqs))[: len(positions)]
    # numpy's own cos is not rounded exactly either: neighbours are let pass where f64 lies half way
    steps = np.abs(bits(got).astype(np.int64) - bits(want).astype(np.int64))
    assert steps.max() <= 1 and (steps != 0).mean() < 1e-3
    assert np.array_equal(out.data[want.nbytes :], before[want.nbytes :])
    for memory in (frequencies, out, step):
        memory.check()


class Appended:
    """One launch of rope_append over three sequences, and what a reference makes of it."""

    def __init__(
        self,
        k: str,
        v: str,
        head_dim: int,
        *,
        heads: int = 3,
        freqs: int | None = None,
        page_tokens: int = 16,
        keys: Array | None = None,
        values: Array | None = None,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        table = scattered(rng, LENGTHS, page_tokens)
        pages = int(table.max()) + 1
        tokens = Tokens(
            np.array([35, 36, 69, 0, 4]),
            np.array([0, 0, 1, 2, 2]),
            table,
            places=np.array([35, 36, 69, 0, 3]),
        )
        self.step = Step(tokens, bucket=8)
        shape = (8, KV_HEADS, head_dim)
        spread = np.exp(rng.uniform(-8, 6, (8, KV_HEADS, 1)))
        self.key, self.value = (
            np.asarray(rng.standard_normal(shape) * spread if x is None else x, np.float32)
            for x in (keys, values)
        )
        q = rng.standard_normal((8, heads, head_dim)).astype(np.float32)
        freqs = head_dim // 2 if freqs is None else freqs
        inv_freq = (500.0 ** -(np.arange(freqs) / max(freqs, 1))).astype(np.float32)
        table_of_angles = angles_of(np.append(tokens.positions, [9, 9, 9]), inv_freq, 1.0)
        self.memory = {n: Guarded.of(a) for n, a in (("q", q), ("key", self.key), ("value", self.value))}
        self.memory["angles"] = Guarded.of(table_of_angles if freqs else np.zeros(1, np.float32))
        self.k, self.v = (Side(name, pages, KV_HEADS, page_tokens, head_dim) for name in (k, v))
        record = rec.Append(
            step=self.step.record,
            k=self.k.record,
            v=self.v.record,
            q=self.memory["q"].address if heads else None,
            key=self.memory["key"].address,
            value=self.memory["value"].address,
            angles=self.memory["angles"].address if freqs else None,
            heads=heads,
            kv_heads=KV_HEADS,
            freqs=freqs,
            page_tokens=page_tokens,
        )
        grid = (8, -(-(heads + 2 * KV_HEADS) // 4))
        library().launch(_symbol("append", k, v, head_dim), grid, record)
        for each in (*self.memory.values(), self.k, self.v, self.step):
            each.check()
        self.q = self.memory["q"].view(np.float32, (8, heads, head_dim))
        self.rotated = self.memory["key"].view(np.float32, shape)
        # The reference rotates in f32, each product rounded by itself
        self.want_q, self.want_key = q.copy(), self.key.copy()
        for rows in (self.want_q, self.want_key) if freqs else ():
            if rows.shape[1]:
                flat = rows[:5].reshape(5, -1)
                rows[:5] = numpy_ops.rope(flat, tokens.positions, inv_freq, head_dim, 1.0).reshape(
                    rows[:5].shape
                )
        self.rows = table[tokens.sequence, tokens.places // page_tokens], tokens.places % page_tokens

    def check_stored(self) -> None:
        """All planes have the bytes that the codecs give, and no others were written."""
        for side, data in ((self.k, self.rotated), (self.v, self.value)):
            want = Side(side.name, *side.shape)
            want.write(*self.rows, data[:5])
            for name, plane in want.planes.items():
                a, b = side.planes[name].view(np.uint8), plane.view(np.uint8)
                assert np.array_equal(a, b), (side.name, name, np.argwhere(a != b)[:5])


@pytest.mark.parametrize("head_dim", DIMS)
@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_rows_are_stored_as_the_codecs_would(k: str, v: str, head_dim: int) -> None:
    for page_tokens in (16, 32):
        done = Appended(k, v, head_dim, page_tokens=page_tokens, seed=head_dim)
        assert done.step.status == 0
        done.check_stored()
        limit = 1e-6 * np.abs(done.key).max()
        assert np.abs(done.rotated - done.want_key).max() <= limit
        assert np.abs(done.q - done.want_q).max() <= 2e-6
        assert np.array_equal(bits(done.rotated[5:]), bits(done.key[5:]))  # beyond the step's tokens


@pytest.mark.parametrize("freqs", [0, 1, 7, 24])
@pytest.mark.parametrize("heads", [0, 6])
def test_part_of_a_head_may_rotate(freqs: int, heads: int) -> None:
    done = Appended("int8", "fp8", 64, heads=heads, freqs=freqs)
    assert np.abs(done.rotated - done.want_key).max() <= 1e-6 * np.abs(done.key).max()
    assert heads == 0 or np.abs(done.q - done.want_q).max() <= 2e-6
    assert np.array_equal(bits(done.rotated[..., 2 * freqs :]), bits(done.key[..., 2 * freqs :]))
    done.check_stored()


def _hard_rows(seed: int, head_dim: int, top: float) -> Array:
    """Zeros of both signs, one value alone, ties, denormals, and values at the end of the range."""
    rng = np.random.default_rng(seed)
    x = np.zeros((8, KV_HEADS, head_dim), np.float32)
    x[0, 1] = -0.0
    x[1, 0, head_dim // 2] = 3.0
    x[1, 1, head_dim - 1] = -1e-42
    x[2] = rng.integers(-254, 255, (KV_HEADS, head_dim)) / 2
    x[2, :, 0] = 127.0
    x[3] = rng.standard_normal((KV_HEADS, head_dim)) * 1e-39
    x[4, 0] = rng.uniform(-top, top, head_dim)
    x[4, 0, 0] = top
    x[4, 1] = np.abs(rng.standard_normal(head_dim)) + 7
    return x


@pytest.mark.parametrize("head_dim", [8, 64, 80])
@pytest.mark.parametrize("name", CLASSES)
def test_hard_rows(name: str, head_dim: int) -> None:
    top = {"f16": 65504.0, "int4": 15000.0}.get(name, float(np.finfo(np.float32).max))
    x = _hard_rows(3, head_dim, top)
    good = np.ones_like(x)
    for k, v in PAIRS:
        if name in (k, v):
            done = Appended(
                k, v, head_dim, freqs=0, keys=x if k == name else good, values=x if v == name else good
            )
            assert done.step.status == 0
            done.check_stored()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_poison_is_reported(k: str, v: str, value: float) -> None:
    good = np.ones((8, KV_HEADS, 64), np.float32)
    for at in ((0, 0, 0), (4, 1, 63), (2, 0, 31)):
        bad = good.copy()
        bad[at] = value
        assert Appended(k, v, 64, keys=bad, values=good).step.status == rec.NOT_FINITE
        assert Appended(k, v, 64, keys=good, values=bad).step.status == rec.NOT_FINITE
    bad = good.copy()
    bad[5] = value  # beyond the step's tokens
    assert Appended(k, v, 64, keys=bad, values=bad).step.status == 0


@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_what_a_format_cannot_hold_is_reported(k: str, v: str) -> None:
    good = np.ones((8, KV_HEADS, 64), np.float32)
    bad = good.copy()
    bad[3, 1, 5] = -65505.0
    for keys, values, name in ((bad, good, k), (good, bad, v)):
        want = rec.OUT_OF_RANGE if name in ("f16", "int4") else 0
        assert Appended(k, v, 64, freqs=0, keys=keys, values=values).step.status == want


def test_the_end_of_int4() -> None:
    """Attention decodes groups whose scale is at most 2113: 31 of them end f16."""
    good = np.ones((8, KV_HEADS, 64), np.float32)
    for scale, want in ((2112, 0), (2114, rec.OUT_OF_RANGE)):
        bad = good.copy()
        bad[3, 1, 5] = 15 * scale
        assert Appended("int4", "int8", 64, freqs=0, keys=bad, values=good).step.status == want


@pytest.mark.parametrize("head_dim", [5, 64, 80])
def test_rotation_alone(head_dim: int) -> None:
    rng = np.random.default_rng(1)
    positions = np.array([0, 3, 99], np.int32)
    inv_freq = (10000.0 ** -(np.arange(head_dim // 2) / (head_dim // 2))).astype(np.float32)
    x = rng.standard_normal((4, 5, head_dim)).astype(np.float32)
    step = Step(Tokens(positions, np.zeros(3), np.zeros((1, 1))), bucket=4)
    q, table = Guarded.of(x), Guarded.of(angles_of(np.append(positions, 0), inv_freq, 1.0))
    record = rec.Append(step=step.record, q=q.address, angles=table.address, heads=5, freqs=head_dim // 2)
    library().launch(f"rope_{head_dim}", (4, 2), record)
    want = numpy_ops.rope(x[:3].reshape(3, -1), positions, inv_freq, head_dim, 1.0).reshape(3, 5, head_dim)
    got = q.view(np.float32, (4, 5, head_dim))
    assert np.abs(got[:3] - want).max() <= 2e-6
    assert np.array_equal(bits(got[3]), bits(x[3]))
    for memory in (q, table, step):
        memory.check()


@pytest.mark.parametrize("head_dim", [5, 64, 80])
@pytest.mark.parametrize(("k", "v"), PAIRS)
def test_moves(k: str, v: str, head_dim: int) -> None:
    """Ascending rows, some of which land where an earlier one was taken from, across pages."""
    rng = np.random.default_rng(2)
    table = scattered(rng, [64], 16)[0]
    k_side, v_side = sides = tuple(Side(name, 5, KV_HEADS, 16, head_dim) for name in (k, v))
    places = np.arange(64)
    for side in sides:
        side.write(table[places // 16], places % 16, rng.standard_normal((64, KV_HEADS, head_dim)))
    before = [{n: p.copy() for n, p in side.planes.items()} for side in sides]
    sources, targets = (
        np.array([10, 14, 17, 18, 33, 50], np.int32),
        np.array([9, 10, 14, 15, 33, 40], np.int32),
    )
    arrays = [Guarded.of(a) for a in (table.astype(np.int32), sources, targets)]
    record = rec.Move(
        k=k_side.record,
        v=v_side.record,
        pages=arrays[0].address,
        sources=arrays[1].address,
        targets=arrays[2].address,
        count=len(sources),
        kv_heads=KV_HEADS,
        page_tokens=16,
    )
    library().launch(_symbol("move", k, v, head_dim), 2 * KV_HEADS, record)
    for side, old in zip(sides, before, strict=True):
        side.check()
        for name, plane in side.planes.items():
            want = old[name].copy()
            want[table[targets // 16], :, targets % 16] = old[name][table[sources // 16], :, sources % 16]
            assert np.array_equal(plane.view(np.uint8), want.view(np.uint8)), (side.name, name)
