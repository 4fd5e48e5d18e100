"""Attention over quantized pages in the emulator: against the definition, and the same bits whatever the
form, the step around a token and the order in which it came.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import pytest
from emulation import Emulated, Guarded, compile_kernels, guarded
from kv_cases import CLASSES, Side, Step, Tokens, scattered

from edge_runtime.backends import numpy_ops
from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array

CHUNK = 256  # EDGE_ATTENTION_CHUNK
WARPS = 4
SAME = [(name, name) for name in CLASSES]
MIXED = [("int8", "int4"), ("f16", "int8"), ("int4", "fp8"), ("fp8", "f16")]
DIMS = (5, 8, 16, 24, 80, 96, 128, 256)
ENDS = (5, 256)


@lru_cache(maxsize=4)
def library(head_dim: int) -> Emulated:
    """Kernels of a head_dim; of 64 those of all pairs, with and without soft cap."""
    lines = ['#include "attention.cuh"']
    lines.append(f"EDGE_KERNEL(merge, 128, EdgeAttention, edge::attention_merge<{head_dim}>)")
    for k, v in SAME + MIXED if head_dim == 64 else SAME:
        for tiles in (1, 2):
            for capped in (False, True) if head_dim == 64 and k == v else (False,):
                types = f"{CLASSES[k]}, {CLASSES[v]}, {head_dim}, {tiles}, {str(capped).lower()}"
                for form in ("split", "looped"):
                    name = _symbol(form, k, v, tiles, capped)
                    lines.append(f"EDGE_KERNEL({name}, 128, EdgeAttention, edge::attention_{form}<{types}>)")
    return Emulated(compile_kernels("\n".join(lines)))


def _symbol(form: str, k: str, v: str, tiles: int, capped: bool) -> str:
    return f"{form}_{k}_{v}_{tiles}_{int(capped)}"


class Cache:
    """One slot of a cache, with random keys and values where `fill` put them."""

    def __init__(
        self,
        k: str,
        v: str,
        *,
        head_dim: int = 64,
        kv_heads: int = 2,
        page_tokens: int = 16,
        pages: int = 64,
        seed: int = 0,
    ) -> None:
        self.kv_heads, self.head_dim, self.page_tokens = kv_heads, head_dim, page_tokens
        self.k, self.v = (Side(name, pages, kv_heads, page_tokens, head_dim) for name in (k, v))
        self.rng = np.random.default_rng(seed)

    def random(self, count: int) -> tuple[Array, Array]:
        """Keys and values f32 (count, kv_heads, head_dim), of sizes that differ from row to row."""
        shape = (count, self.kv_heads, self.head_dim)
        keys, values = (
            self.rng.standard_normal(shape) * np.exp(self.rng.normal(0, 0.7, (*shape[:2], 1))) for _ in "kv"
        )
        return np.float32(keys), np.float32(values)

    def write(self, table: Array, places: Array, keys: Array, values: Array) -> None:
        places = np.asarray(places)
        for side, rows in ((self.k, keys), (self.v, values)):
            side.write(table[places // self.page_tokens], places % self.page_tokens, rows)

    def fill(self, table: Array, places: Array) -> None:
        self.write(table, places, *self.random(len(places)))


class Attention:
    """Runs kernels over a cache; checks guards after each launch."""

    def __init__(
        self, cache: Cache, share: int = 3, *, window: int = 0, softcap: float = 0.0, scale: float = 0.0
    ) -> None:
        self.cache, self.share = cache, share
        self.window, self.softcap = window, softcap
        self.scale = scale or cache.head_dim**-0.5
        self.heads = cache.kv_heads * share
        self.status = 0

    def queries(self, count: int, seed: int = 1, size: float = 1.0) -> Array:
        rng = np.random.default_rng(seed)
        return np.float32(rng.standard_normal((count, self.heads, self.cache.head_dim)) * size)

    def run(self, form: str, q: Array, tokens: Tokens, tiles: int = 1, spare: int = 0) -> Array:
        """f32 (T, heads, head_dim) of a bucket with `spare` rows more than tokens."""
        cache, count = self.cache, len(q)
        head_dim, bucket = cache.head_dim, count + spare
        step = Step(tokens, bucket)
        chunks = int(tokens.positions.max()) // CHUNK + 2
        floats = bucket * self.heads * (chunks * head_dim + (2 * chunks + 3) // 4 * 4)
        rows = np.append(q, np.full((spare, *q.shape[1:]), np.nan, np.float32), axis=0)
        memory = [Guarded.of(rows), guarded(rows.nbytes), guarded(4 * floats)]
        memory[1].data[:] = memory[2].data[:] = 0xFF
        record = rec.Attend(
            step=step.record,
            k=cache.k.record,
            v=cache.v.record,
            q=memory[0].address,
            out=memory[1].address,
            partial=memory[2].address if form == "split" else None,
            heads=self.heads,
            kv_heads=cache.kv_heads,
            page_tokens=cache.page_tokens,
            chunks=chunks,
            window=self.window,
            scale=self.scale,
            softcap=self.softcap,
        )
        kernels = library(head_dim)
        name = _symbol(form, cache.k.name, cache.v.name, tiles, self.softcap != 0)
        parts = -(-self.share // (16 * tiles))
        if form == "split":
            kernels.launch(name, (bucket * parts, cache.kv_heads, -(-chunks // WARPS)), record)
            kernels.launch("merge", (bucket, self.heads), record)
        else:
            most = max(1, 16 * tiles // self.share)
            kernels.launch(name, (-(-bucket // (WARPS * most)) * most * parts, cache.kv_heads), record)
        for each in (*memory, cache.k, cache.v, step):
            each.check()
        self.status = step.status
        out = memory[1].view(np.float32, rows.shape)
        assert np.isnan(out[count:]).all()  # rows of no token are left alone
        return out[:count].copy()

    def all_forms(self, q: Array, tokens: Tokens, spare: int = 3) -> Array:
        """What every form gives, after proof that all give the same bits and none finds fault."""
        first = self.run("split", q, tokens, 1, spare)
        assert self.status == 0
        for form, tiles in (("split", 2), ("looped", 1), ("looped", 2)):
            other = self.run(form, q, tokens, tiles, spare)
            assert self.status == 0
            assert_same(other, first, (form, tiles))
        return first

    def compare(self, got: Array, q: Array, tokens: Tokens) -> None:
        """Against numpy_ops.attention of each token by itself over the decoded rows.

        Kernels round q and weights to f16 (2^-11 each), and int4 with its zero to 2^-11 of 46 of its steps:
        so a score errs by at most e = 2^-10 |scale| sum |q| (|k| + 23 steps), weights by a factor
        exp(2 max e), and the mixture by 2^-9 of the weighted sizes and steps of values.
        """
        cache = self.cache
        for t in range(len(q)):
            places = tokens.seen(t, self.window)
            table = tokens.page_tables[tokens.sequence[t]]
            at = table[places // cache.page_tokens], places % cache.page_tokens
            keys, values = cache.k.read(*at), cache.v.read(*at)
            key_sizes, value_sizes = (
                np.abs(rows) + 23 * side.steps(*at) for rows, side in ((keys, cache.k), (values, cache.v))
            )
            want = numpy_ops.attention(
                q[t : t + 1],
                keys,
                values,
                tokens.positions[t : t + 1],
                int(tokens.positions[t]) - len(places) + 1,
                scale=self.scale,
                window=self.window or None,
                softcap=self.softcap or None,
            ).reshape(self.heads, -1)
            for head in range(self.heads):
                k, k_sizes, v_sizes = (
                    rows[:, head // self.share].astype(np.float64) for rows in (keys, key_sizes, value_sizes)
                )
                scores = k @ q[t, head].astype(np.float64) * self.scale
                sizes = k_sizes @ np.abs(q[t, head]).astype(np.float64) * abs(self.scale)
                if self.softcap:
                    scores = self.softcap * np.tanh(scores / self.softcap)
                weights = np.exp(scores - scores.max())
                mixed = (weights / weights.sum()) @ v_sizes
                error = 2.0**-10 * sizes[weights > 1e-9 * weights.max()].max()
                limit = (np.expm1(2 * error) + 2.0**-9) * mixed + 1e-6 * v_sizes.max()
                wrong = np.abs(got[t, head] - want[head]) > limit
                assert not wrong.any(), (t, head, got[t, head][wrong][:4], want[head][wrong][:4])


def assert_same(got: Array, want: Array, what: object = "") -> None:
    differ = np.argwhere(got.view(np.uint32) != want.view(np.uint32))
    assert not len(differ), (what, differ[:4].tolist(), len(differ))


def several(cache: Cache, lengths: tuple[int, ...], chunks: tuple[int, ...]) -> Tokens:
    """The last `chunks[s]` tokens of each sequence, whose keys and values are all there."""
    table = scattered(cache.rng, list(lengths), cache.page_tokens)
    for row, length in zip(table, lengths, strict=True):
        cache.fill(row, np.arange(length))
    positions = [np.arange(n - c, n) for n, c in zip(lengths, chunks, strict=True)]
    return Tokens(np.concatenate(positions), np.repeat(np.arange(len(lengths)), chunks), table)


def test_the_record_has_the_size_of_the_header() -> None:
    assert library(64).record_bytes("merge") == ctypes.sizeof(rec.Attend)


@pytest.mark.parametrize(("k", "v"), SAME + MIXED)
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_pairs_of_formats(k: str, v: str, page_tokens: int) -> None:
    cache = Cache(k, v, page_tokens=page_tokens)
    tokens = several(cache, (300, 40, 1), (9, 3, 1))
    attention = Attention(cache)
    q = attention.queries(13)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize(
    ("head_dim", "k", "v"),
    [(n, *same) for i, n in enumerate(DIMS) for same in (SAME if n in ENDS else SAME[i % 2 :: 2])],
)
def test_head_dims(head_dim: int, k: str, v: str) -> None:
    """Each format at the least, at the greatest and at every other between: each has kernels of its own."""
    cache = Cache(k, v, head_dim=head_dim)
    tokens = several(cache, (275, 20), (7, 2))
    attention = Attention(cache, 2)
    q = attention.queries(9)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize("share", [1, 2, 5, 8, 16, 17, 33])
def test_heads_that_share_keys(share: int) -> None:
    cache = Cache("int8", "int4", kv_heads=1 if share > 5 else 3)
    tokens = several(cache, (270, 33), (6, 20))
    attention = Attention(cache, share)
    q = attention.queries(26)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize("window", [1, 5, 16, 17, 40, 255, 256, 257, 300, 999])
def test_windows(window: int) -> None:
    cache = Cache("f16", "int8", page_tokens=32)
    tokens = several(cache, (530, 41), (20, 8))
    attention = Attention(cache, 4, window=window)
    q = attention.queries(28)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize("window", [3, 20, 300])
def test_pages_below_a_window_may_be_gone(window: int) -> None:
    cache = Cache("int4", "fp8")
    tokens = several(cache, (600, 100), (4, 1))
    attention = Attention(cache, window=window)
    q = attention.queries(5)
    whole = attention.all_forms(q, tokens)
    for sequence, least in ((0, 596), (1, 99)):
        gone = max(0, least - window + 1) // cache.page_tokens
        tokens.page_tables[sequence, :gone] = -(1 << 20)
    assert_same(attention.all_forms(q, tokens), whole)


@pytest.mark.parametrize(("k", "v"), SAME)
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_soft_caps(k: str, v: str, softcap: float) -> None:
    cache = Cache(k, v)
    tokens = several(cache, (270, 20), (5, 2))
    attention = Attention(cache, softcap=softcap)
    q = attention.queries(7, size=3.0)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize("scale", [-0.3, 1.0])
def test_scales(scale: float) -> None:
    cache = Cache("fp8", "fp8")
    tokens = several(cache, (20,), (5,))
    attention = Attention(cache, scale=scale)
    q = attention.queries(5, size=0.3)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize(("k", "v"), SAME)
def test_a_token_does_not_see_its_step(k: str, v: str) -> None:
    """Alone, among others of its sequence, and among other sequences: the same bits."""
    cache = Cache(k, v)
    tokens = several(cache, (290, 300, 31), (11, 1, 4))
    attention = Attention(cache)
    q = attention.queries(16)
    together = attention.all_forms(q, tokens)
    for t in range(16):
        assert_same(attention.run("split", q[t : t + 1], tokens.only([t])), together[t : t + 1], t)
    order = np.random.default_rng(3).permutation(16)
    assert_same(attention.all_forms(q[order], tokens.only(order)), together[order])


@pytest.mark.parametrize(("k", "v"), SAME)
@pytest.mark.parametrize("window", [0, 70])
def test_prompts_in_chunks_and_token_by_token(k: str, v: str, window: int) -> None:
    """Keys beyond a token's position, written or not, leave its numbers as they are."""
    length, start = 280, 230
    cache = Cache(k, v, kv_heads=1)
    table = scattered(cache.rng, [length], 16)
    keys, values = cache.random(length)
    attention = Attention(cache, 2, window=window)
    q = attention.queries(length)
    one_by_one = np.empty_like(q)
    cache.write(table[0], np.arange(start), keys[:start], values[:start])
    for t in range(start, length):
        cache.write(table[0], np.array([t]), keys[t : t + 1], values[t : t + 1])
        one_by_one[t] = attention.run("split", q[t : t + 1], Tokens([t], [0], table))[0]
        assert attention.status == 0
    for size in (7, length - start):
        for first in range(start, length, size):
            positions = np.arange(first, min(first + size, length))
            tokens = Tokens(positions, np.zeros_like(positions), table)
            assert_same(attention.all_forms(q[positions], tokens), one_by_one[positions], (size, first))


@pytest.mark.parametrize(("k", "v", "window"), [*[(k, v, 0) for k, v in SAME], ("int8", "int4", 6)])
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_paths_of_trees_are_plain_sequences(k: str, v: str, window: int, page_tokens: int) -> None:
    cache = Cache(k, v, page_tokens=page_tokens)
    attention = Attention(cache, window=window)
    for seed, length in ((0, 250), (1, 13), (2, 0), (3, 255)):
        rng = np.random.default_rng(seed)
        count = 14
        table = scattered(cache.rng, [length + 40, length + 40], page_tokens)
        past = cache.random(length)
        keys, values = cache.random(count)
        if length:
            for row in table:
                cache.write(row, np.arange(length), *past)
        parents = np.array([-1 if i == 0 or rng.random() < 0.1 else rng.integers(i) for i in range(count)])
        positions = np.full(count, length)
        for i, parent in enumerate(parents.tolist()):
            positions[i] = length if parent < 0 else positions[parent] + 1
        places = length + rng.permutation(count + 4)[:count]
        if (places < positions).any():  # a node never lies below what it sees; here: below its root
            places = np.maximum(places, length)
        cache.write(table[0], places, keys, values)
        tokens = Tokens(positions, np.zeros(count), table, parents=parents, places=places)
        q = attention.queries(count, seed)
        got = attention.all_forms(q, tokens)
        attention.compare(got, q, tokens)
        for t in range(count):
            path = [t]
            while parents[path[0]] >= 0:
                path.insert(0, int(parents[path[0]]))
            at = np.arange(length, length + len(path))
            cache.write(table[1], at, keys[path], values[path])
            plain = Tokens(at, np.ones_like(at), table)
            form = ("split", "looped")[t % 2]
            assert_same(attention.run(form, q[path], plain, 1 + t // 2 % 2), got[path], (seed, t))


def test_the_comparisons_have_power() -> None:
    """A key that changes, a neighbour's key instead, and a step of the last bit are all seen."""
    cache = Cache("int8", "int8")
    tokens = several(cache, (300,), (2,))
    attention = Attention(cache)
    q = attention.queries(2)
    before = attention.all_forms(q, tokens)
    cache.k.planes["q"][tokens.page_tables[0, 3], 0, 5] ^= 1
    after = attention.all_forms(q, tokens)
    with pytest.raises(AssertionError):
        assert_same(after, before)
    assert_same(after[:, attention.share :], before[:, attention.share :])  # of the other kv head
    with pytest.raises(AssertionError):
        attention.compare(after * np.float32(1.1), q, tokens)
    with pytest.raises(AssertionError):
        attention.compare(after[::-1], q, tokens)


@pytest.mark.parametrize(("k", "v"), SAME)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e4])
def test_sizes(k: str, v: str, size: float) -> None:
    """Queries of any size, and keys and values of any that the format holds."""
    cache = Cache(k, v)
    table = scattered(cache.rng, [40], 16)
    keys, values = cache.random(40)
    wide = 1e25 if k in ("int8", "fp8") and size < 1 else 1.0
    cache.write(table[0], np.arange(40), keys * np.float32(wide), values * np.float32(wide))
    attention = Attention(cache, scale=min(0.125 / wide / size, 1e30))
    q = attention.queries(3, size=size)
    tokens = Tokens([37, 38, 39], [0, 0, 0], table)
    attention.compare(attention.all_forms(q, tokens), q, tokens)


@pytest.mark.parametrize(("k", "v"), SAME + MIXED)
def test_poison_is_reported_and_stays_with_its_token(k: str, v: str) -> None:
    cache = Cache(k, v)
    tokens = several(cache, (300,), (6,))
    attention = Attention(cache)
    good = attention.queries(6)
    want = attention.all_forms(good, tokens)
    for value in (np.nan, np.inf, -np.inf):
        for head, dim in ((0, 0), (4, 63)):
            q = good.copy()
            q[3, head, dim] = value
            for form in ("split", "looped"):
                for tiles in (1, 2):
                    got = attention.run(form, q, tokens, tiles)
                    assert attention.status == rec.NOT_FINITE
                    assert_same(np.delete(got, 3, 0), np.delete(want, 3, 0))
    # A key that only the last three see
    page, slot = tokens.page_tables[0, 297 // 16], 297 % 16
    for side in (cache.k, cache.v):
        plane = side.planes.get("scale", side.planes.get("w"))
        assert plane is not None
        kept = plane[page, 1, slot].copy()
        plane[page, 1, slot] = np.nan
        for form in ("split", "looped"):
            got = attention.run(form, good, tokens, 2)
            assert attention.status == rec.NOT_FINITE
            assert_same(got[:3, :3], want[:3, :3])
        plane[page, 1, slot] = kept
    assert_same(attention.all_forms(good, tokens), want)


def test_scores_beyond_f32_are_reported() -> None:
    for k, v in SAME:
        cache = Cache(k, v)
        table = scattered(cache.rng, [20], 16)
        keys, values = cache.random(20)
        size = np.float32(1e30 if k in ("int8", "fp8") else 3e4)
        keys = -np.clip(np.abs(keys), 0, 2) * size  # all scores are -Inf
        cache.write(table[0], np.arange(20), keys, values)
        attention = Attention(cache)
        q = np.abs(attention.queries(1)) * np.float32(1e36)
        for form in ("split", "looped"):
            attention.run(form, q, Tokens([19], [0], table))
            assert attention.status == rec.NOT_FINITE, (k, form)
