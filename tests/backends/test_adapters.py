"""Low-rank adapters: equal to merged weights within a bound, and to the bit whatever shares the step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_programs import PAGES, Array, decoded, ids, instruction_sets, llama, packed, step

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import Backend, Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.adapter import MAX_RANK, Adapter, LowRank
from edge_runtime.engine.memory import adapter_nbytes
from edge_runtime.engine.ops import Linear, Logits
from edge_runtime.errors import BackendUnavailable, BadRequest, NumericError

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

BOTH = pytest.mark.parametrize("backend", [BACKEND, REFERENCE], ids=["cpu", "reference"])
TABLES = np.array([PAGES[0], PAGES[1], (8, 9, 10, 11)], np.int32)


def matrices(part: Part) -> list[str]:
    return [op.weight for op in part.program.ops if isinstance(op, Linear | Logits)]


def low_rank(part: Part, ranks: dict[str, int], seed: int = 0, strength: float = 0.5) -> Adapter:
    """Random updates that change outputs about as much as `strength` of the weights do."""
    rng = np.random.default_rng(seed)
    made = {}
    for name, rank in ranks.items():
        spec = part.program.tensors[name]
        a = rng.standard_normal((rank, spec.cols)) * spec.cols**-0.5
        b = rng.standard_normal((spec.rows, rank)) * rank**-0.5
        made[name] = LowRank(a.astype(np.float16), b.astype(np.float16), strength * (1 + 0.1 * len(made)))
    return made


def everywhere(part: Part, rank: int, seed: int = 0) -> Adapter:
    return low_rank(part, dict.fromkeys(matrices(part), rank), seed)


def merged(part: Part, adapter: Adapter) -> Part:
    """The same part with W + scale * b @ a in f32, made in f64."""
    weights = dict(part.weights)
    for name, low in adapter.items():
        update = low.b.astype(np.float64) @ low.a.astype(np.float64)
        weights[name] = packed((decoded(weights[name]) + low.scale * update).astype(np.float32), "f32")
    return replace(part, weights=weights)


def using(batch: StepBatch, adapters: Iterable[int]) -> StepBatch:
    """The step with one more sequence and the adapter of each."""
    return replace(batch, page_tables=TABLES, adapters=np.array([*adapters], np.int32))


def answer(part: Part, batch: StepBatch, *adapters: Adapter, **options: Any) -> Array:
    executor = BACKEND.load(part, **options)
    for number, adapter in enumerate(adapters):
        assert executor.add_adapter(adapter) == number
    logits = executor.forward(batch).copy()
    executor.close()
    return logits


RANKS = [1, 4, 8, 17, 70]


@BOTH
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("shape", [(32, 4, 2), (20, 3, 1)])
def test_an_adapter_is_its_merged_weights(backend: Backend, rank: int, shape: tuple[int, int, int]) -> None:
    """On both backends within f32 rounding of the merged weights on the reference."""
    head_dim, heads, kv_heads = shape
    part = llama("f32", head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    adapter = everywhere(part, rank)
    batch = step((0, 0, ids(21)), (1, 0, ids(6, 6)))
    want = REFERENCE.load(merged(part, adapter)).forward(batch)
    plain = REFERENCE.load(part).forward(batch)
    assert np.abs(want - plain).max() > 0.1 * np.abs(plain).max()  # or this test shows nothing
    executor = backend.load(part)
    number = executor.add_adapter(adapter)
    got = executor.forward(using(batch, [number, number, -1]))
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    executor.close()


@pytest.mark.parametrize("fmt", ["int4_g64", "int8_row", "nf4_g64", "f16", "fp8_e4m3_row"])
def test_on_quantized_weights_near_the_reference(fmt: str) -> None:
    part = llama(fmt)
    adapter = everywhere(part, 9)
    batch = using(step((0, 0, ids(12))), [0, -1, -1])
    oracle = REFERENCE.load(part)
    oracle.add_adapter(adapter)
    want = oracle.forward(batch)
    limit = 0.08 if fmt.startswith("int") else 1e-5
    assert np.abs(answer(part, batch, adapter) - want).max() <= limit * np.abs(want).max()


@BOTH
def test_single_tensors(backend: Backend) -> None:
    """Each linear alone, the head among them: nothing but the named tensor changes."""
    part = llama("f32", layers=1)
    batch = step((0, 0, ids(9)))
    for name in matrices(part):
        adapter = low_rank(part, {name: 5}, strength=2.0)
        executor = backend.load(part)
        got = executor.forward(using(batch, [executor.add_adapter(adapter), -1, -1]))
        want = REFERENCE.load(merged(part, adapter)).forward(batch)
        assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max(), name
        assert np.abs(want - REFERENCE.load(part).forward(batch)).max() > 1e-3 * np.abs(want).max(), name
        executor.close()


@pytest.mark.parametrize("fmt", ["int4_g64", "f16", "int8_row"])
def test_a_token_does_not_depend_on_what_shares_the_step(fmt: str) -> None:
    """Three sequences with two adapters and none: alone, together, in chunks, on every path."""
    part = llama(fmt, kv="int8")
    first, second = everywhere(part, 6, 1), low_rank(part, {"0.q": 20, "1.down": 3, "head": 12}, 2)
    texts = {0: ids(17, 1), 1: ids(11, 2), 2: ids(14, 3)}
    chosen = [0, -1, 1]
    want = {
        s: answer(part, using(step((s, 0, text)), chosen), first, second, simd="scalar")
        for s, text in texts.items()
    }
    for simd in instruction_sets():
        for threads in (1, 2, 3):
            for s, text in texts.items():
                got = answer(
                    part, using(step((s, 0, text)), chosen), first, second, simd=simd, threads=threads
                )
                assert np.array_equal(got, want[s]), (simd, threads, s)
    executor = BACKEND.load(part, threads=2)
    executor.add_adapter(first)
    executor.add_adapter(second)
    rng = np.random.default_rng(5)
    for _ in range(6):
        at = dict.fromkeys(texts, 0)
        while any(at[s] < len(texts[s]) for s in texts):
            runs = []
            for s in rng.permutation(3).tolist():
                size = int(rng.integers(0, 10))
                if size and at[s] < len(texts[s]):
                    runs.append((s, at[s], texts[s][at[s] : at[s] + size]))
            if not runs:
                continue
            batch = using(step(*runs), chosen)
            wanted = np.flatnonzero(rng.random(len(batch.tokens)) < 0.6).astype(np.int32)
            got = executor.forward(replace(batch, logit_rows=wanted)).copy()
            whole = np.concatenate([want[s][p : p + len(text)] for s, p, text in runs])
            assert np.array_equal(got, whole[wanted])
            for s, p, text in runs:
                at[s] = p + len(text)
    executor.close()


def test_tokens_without_an_adapter_are_those_of_a_plain_session() -> None:
    part = llama("int4_g64", kv="int8")
    batch = step((0, 0, ids(13)), (1, 0, ids(8, 4)))
    want = answer(part, batch)
    for numbers in ([-1, -1, -1], [-1, 0, 1], [0, -1, 0]):
        got = answer(part, using(batch, numbers), everywhere(part, 8), everywhere(part, 3, 9), threads=2)
        rows = [t for t in range(21) if numbers[int(batch.sequence[t])] == -1]
        assert np.array_equal(got[rows], want[rows])
    # And after one was used in the step before, and after it was dropped
    executor = BACKEND.load(part, threads=2)
    number = executor.add_adapter(everywhere(part, 8))
    assert not np.array_equal(executor.forward(using(batch, [number, number, -1])), want)
    assert np.array_equal(executor.forward(batch), want)
    executor.drop_adapter(number)
    assert np.array_equal(executor.forward(batch), want)
    executor.close()


def test_the_comparison_to_the_bit_has_power() -> None:
    """Merged weights sum in another order: near, but not equal."""
    part = llama("f32")
    adapter, batch = everywhere(part, 8), step((0, 0, ids(20)))
    got, want = answer(part, using(batch, [0, -1, -1]), adapter), answer(merged(part, adapter), batch)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()
    assert not np.array_equal(got, want)


def test_the_head_caps_what_the_adapter_added() -> None:
    part = llama("f32", softcap=2.0)
    adapter = low_rank(part, {"head": 4}, strength=30.0)
    batch = using(step((0, 0, ids(9))), [0, -1, -1])
    got = answer(part, batch, adapter)
    oracle = REFERENCE.load(part)
    oracle.add_adapter(adapter)
    assert np.abs(got).max() <= 2.0
    # Before the cap the values are some 30 times larger, and so is their rounding
    assert np.abs(got - oracle.forward(batch)).max() <= 30 * 2.0 * 1e-5


# --- loading and freeing -----------------------------------------------------------------------------------


@BOTH
def test_numbers_and_memory(backend: Backend) -> None:
    part = llama("int4_g64")
    executor = backend.load(part, threads=2)
    empty = executor.memory_bytes
    adapters = [everywhere(part, 4, 1), low_rank(part, {"0.up": 9}, 2), everywhere(part, 7, 3)]
    assert [executor.add_adapter(a) for a in adapters] == [0, 1, 2]
    if backend is BACKEND:
        sizes = [adapter_nbytes(part.program, part.step, {n: w.rank for n, w in a.items()}) for a in adapters]
    else:
        sizes = [sum(low.nbytes for low in a.values()) for a in adapters]
    assert executor.memory_bytes == empty + sum(sizes)
    batch = step((0, 0, ids(7)))
    want = [executor.forward(using(batch, [n, -1, -1])).copy() for n in range(3)]
    executor.drop_adapter(1)
    assert executor.memory_bytes == empty + sizes[0] + sizes[2]
    assert np.array_equal(executor.forward(using(batch, [2, -1, -1])), want[2])
    for call in (
        lambda: executor.forward(using(batch, [1, -1, -1])),
        lambda: executor.forward(using(batch, [-1, 1, -1])),
    ):
        with pytest.raises(BadRequest, match="uses adapter 1, which is not loaded"):
            call()
    assert executor.add_adapter(adapters[0]) == 1  # the number is free again
    assert np.array_equal(executor.forward(using(batch, [1, -1, -1])), want[0])
    for number in (0, 1, 2):
        executor.drop_adapter(number)
    assert executor.memory_bytes == empty
    for number in (0, 5, -1):
        with pytest.raises(BadRequest, match=f"adapter {number} is not loaded"):
            executor.drop_adapter(number)
    executor.close()
    with pytest.raises(BackendUnavailable, match="closed"):
        executor.add_adapter(adapters[0])
    with pytest.raises(BackendUnavailable, match="closed"):
        executor.drop_adapter(0)
    assert executor.memory_bytes == 0


@BOTH
def test_an_adapter_is_copied(backend: Backend) -> None:
    part = llama("f16")
    adapter = everywhere(part, 5)
    executor = backend.load(part)
    number = executor.add_adapter(adapter)
    batch = using(step((0, 0, ids(7))), [number, -1, -1])
    want = executor.forward(batch).copy()
    for low in adapter.values():
        low.a[:] = np.nan
        low.b[:] = np.nan
    assert np.array_equal(executor.forward(batch), want)
    executor.close()


def changed(adapter: Adapter, name: str, **planes: Any) -> Adapter:
    low = adapter[name]
    return {**adapter, name: LowRank(**({"a": low.a, "b": low.b, "scale": low.scale} | planes))}


@BOTH
def test_bad_adapters_are_refused(backend: Backend) -> None:
    part = llama("f16")
    good = everywhere(part, 5)
    low = good["0.q"]
    holed = low.a.copy()
    holed[2, 3] = np.nan
    endless = low.b.copy()
    endless[0, 0] = np.inf
    wide = MAX_RANK + 1
    rows, cols = part.program.tensors["0.q"].rows, part.program.tensors["0.q"].cols
    executor = backend.load(part)
    before = executor.memory_bytes
    for bad, message in (
        ({}, "has no updates"),
        ({"0.w": low}, r"'0.w', which is no linear's weight; did you mean '0\.[a-z]+'"),
        ({"embed": low}, "'embed', which is no linear's weight"),
        ({"0.norm": low}, "'0.norm', which is no linear's weight"),
        (changed(good, "0.q", a=low.a.astype(np.float32)), "a of '0.q' is 2-D float32, expected 2-D float16"),
        (changed(good, "0.q", b=low.b[0]), "b of '0.q' is 1-D float16"),
        (changed(good, "0.q", a=low.a[:, 1:]), r"a of '0.q' is \(5, 119\), expected \(5, 120\)"),
        (changed(good, "0.q", b=low.b[1:]), r"b of '0.q' is \(127, 5\), expected \(128, 5\)"),
        (changed(good, "0.q", b=low.b[:, 1:]), r"b of '0.q' is \(128, 4\), expected \(128, 5\)"),
        (changed(good, "0.q", a=low.a[:0], b=low.b[:, :0]), "rank 0, expected 1 to 512"),
        (
            changed(good, "0.q", a=np.zeros((wide, cols), np.float16), b=np.zeros((rows, wide), np.float16)),
            "rank 513, expected 1 to 512",
        ),
        (changed(good, "0.q", a=holed), "a of '0.q' holds NaN or Inf"),
        (changed(good, "0.q", b=endless), "b of '0.q' holds NaN or Inf"),
        (changed(good, "0.q", scale=float("nan")), "scale of '0.q' is nan"),
    ):
        with pytest.raises(BadRequest, match=message):
            executor.add_adapter(bad)
    assert executor.memory_bytes == before
    batch = step((0, 0, ids(3)))
    for bad, message in (
        (np.array([-2, -1, -1], np.int32), "sequence 0 uses adapter -2"),
        (np.array([-1, -1], np.int32), "adapters has 2 entries for 3 sequences"),
        (np.array([-1.0, -1, -1]), "adapters is 1-D float64"),
        (np.full((3, 1), -1, np.int32), "adapters is 2-D int32"),
    ):
        with pytest.raises(BadRequest, match=message):
            executor.forward(replace(batch, page_tables=TABLES, adapters=bad))
        assert len(executor.hidden) == 0
    executor.forward(batch)
    executor.close()


@BOTH
def test_an_adapter_that_overflows_is_caught_in_the_step(backend: Backend) -> None:
    part = llama("int4_g64")
    huge = low_rank(part, {"0.down": 4})
    huge = changed(huge, "0.down", b=np.full_like(huge["0.down"].b, 60000), scale=3e38)
    executor = backend.load(part)
    number = executor.add_adapter(huge)
    batch = step((0, 0, ids(4)))
    with pytest.raises(NumericError):
        executor.forward(using(batch, [number, -1, -1]))
    executor.forward(batch)
    executor.close()


def test_the_largest_rank() -> None:
    part = llama("f16", layers=1)
    adapter = low_rank(part, {"0.k": MAX_RANK, "0.v": MAX_RANK - 1})
    batch = using(step((0, 0, ids(9))), [0, -1, -1])
    oracle = REFERENCE.load(part)
    oracle.add_adapter(adapter)
    want = oracle.forward(batch)
    got = answer(part, batch, adapter, threads=2)
    assert np.abs(got - want).max() <= 1e-5 * np.abs(want).max()


def test_nothing_is_written_outside_an_adapters_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.backends import cpu_adapters

    guard = 4096
    blocks: list[tuple[Array, int, int]] = []

    def guarded(nbytes: int) -> Array:
        block = np.full(nbytes + 2 * guard + 64, 0xA5, np.uint8)
        start = guard + (-(block.ctypes.data + guard)) % 64
        block[start : start + nbytes] = 0
        blocks.append((block, start, nbytes))
        return block[start : start + nbytes]

    monkeypatch.setattr(cpu_adapters, "allocate", guarded)
    part = llama("int4_g32", head_dim=20, heads=3, kv_heads=1)
    executor = BACKEND.load(part, threads=2)
    numbers = [executor.add_adapter(everywhere(part, rank)) for rank in (3, 16)]
    weights = [b[0][b[1] : b[1] + b[2]].copy() for b in blocks]
    for first in (0, 16, 32):
        executor.forward(using(step((0, first, ids(16, first)), (1, first, ids(16, first))), [*numbers, -1]))
    for (block, start, nbytes), before, rank in zip(blocks, weights, (3, 16), strict=True):
        assert (block[:start] == 0xA5).all() and (block[start + nbytes :] == 0xA5).all()
        _, stride = memory_layout(part, rank)
        scratch = part.step.tokens * stride * 4
        assert np.array_equal(block[start : start + nbytes - scratch], before[: nbytes - scratch])
    executor.close()


def memory_layout(part: Part, rank: int) -> tuple[dict[int, int], int]:
    from edge_runtime.engine.memory import low_rank_layout

    return low_rank_layout(part.program, dict.fromkeys(matrices(part), rank))
