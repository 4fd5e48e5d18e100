"""K per channel: numbers against a direct sum, and the exactness contract wherever a step begins or ends."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_programs import PAGES, Array, ids, instruction_sets, llama, packed, part_of, run, step

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import Backend, Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import CHANNEL_FORMATS, K_FORMATS, KV_FORMATS
from edge_runtime.engine.ops import Attention, Embed, KvAppend, Linear, Logits
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import BadRequest, NumericError, Unsupported

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

SIMD = instruction_sets()
SCALE = 0.01
PAIRS = [f"{k},{v}" for k in CHANNEL_FORMATS for v in KV_FORMATS]


def attend_part(head_dim: int, kv: str, page_tokens: int) -> tuple[Part, Array]:
    """Token t's logits are attention of 2 heads over x (64, 2 * head_dim), which is q, k and v alike."""
    rng = np.random.default_rng(3)
    width = 2 * head_dim
    x = rng.standard_normal((64, width), dtype=np.float32)
    x[:, 3] *= 12  # a channel of the kind that KIVI is for
    x[5] = 0
    x[:, 1] = 0  # a channel of zeros: its scale is 0
    x[16:32, 2] = 1e-42
    eye = np.zeros((64, width), np.float32)
    eye[:width] = np.eye(width)[: min(64, width)]
    program = Program(
        ops=(
            Embed(out="x", weight="x"),
            KvAppend(k="x", v="x", layer=0),
            Attention(q="x", out="m", layer=0, heads=2, kv_heads=2, head_dim=head_dim, scale=SCALE),
            Logits(x="m", weight="eye"),
        ),
        tensors={"x": TensorSpec(64, width, "embedding"), "eye": TensorSpec(64, width, "head")},
        buffers={"x": width, "m": width},
        cache=(CacheSlot(2, head_dim),),
        vocab_size=64,
        max_context=64,
    )
    weights = {"x": packed(x, "f32"), "eye": packed(eye, "f32")}
    return part_of(program, weights, kv=kv, page_tokens=page_tokens), x


def stored(name: str, x: Array, page_tokens: int) -> Array:
    """x (tokens, heads, head_dim) as a cache of that name gives it back; per channel its whole pages."""
    fmt = get_format(K_FORMATS[name])
    if name not in CHANNEL_FORMATS:
        rows = x.reshape(-1, x.shape[2])
        return fmt.decode(fmt.encode(rows), *rows.shape).reshape(x.shape)
    out = x.copy()
    for first in range(0, len(x) - page_tokens + 1, page_tokens):
        for head in range(x.shape[1]):
            page = np.ascontiguousarray(x[first : first + page_tokens, head].T)
            out[first : first + page_tokens, head] = fmt.decode(fmt.encode(page), *page.shape).T
    return out


def attended(x: Array, keys: Array, values: Array, page_tokens: int, own: bool) -> Array:
    """Causal attention in f64; `own`: a token sees its own page's keys from x rather than from `keys`."""
    out = np.empty_like(x, np.float64)
    for t in range(len(x)):
        seen = keys[: t + 1].astype(np.float64)
        if own:
            start = t // page_tokens * page_tokens
            seen[start:] = x[start : t + 1]
        scores = SCALE * np.einsum("jhc,hc->hj", seen, x[t].astype(np.float64))
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        out[t] = np.einsum("hj,jhc->hc", shares, values[: t + 1].astype(np.float64))
    return out


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("head_dim", [16, 20, 9])
@pytest.mark.parametrize("kv", ["int8c,f32", "int4c,f32", "int4c,int4"])
def test_attention_is_the_direct_sum(kv: str, head_dim: int, page_tokens: int) -> None:
    part, x = attend_part(head_dim, kv, page_tokens)
    heads = x.reshape(64, 2, head_dim)[:60]
    k, v = kv.split(",")
    keys, values = stored(k, heads, page_tokens), stored(v, heads, page_tokens)
    want = attended(heads, keys, values, page_tokens, own=True).reshape(60, -1)
    limit = 2e-6 * np.abs(want).max()
    for backend in (BACKEND, REFERENCE):
        executor = backend.load(part)
        got = [
            executor.forward(step((0, a, np.arange(a, b)))).copy() for a, b in ((0, 21), (21, 22), (22, 50))
        ]
        got.append(executor.forward(step((0, 50, np.arange(50, 60)))).copy())
        assert np.abs(np.concatenate(got)[:, : want.shape[1]] - want).max() <= limit
        executor.close()
    # Or the bound could not tell which keys a token sees
    for wrong in (
        attended(heads, keys, values, page_tokens, own=False),
        attended(heads, heads, values, 16, True),
    ):
        assert np.abs(wrong.reshape(60, -1) - want).max() > 30 * limit


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("head_dim", [32, 20])
@pytest.mark.parametrize("kv", CHANNEL_FORMATS)
def test_pages_hold_the_codecs_bytes(kv: str, head_dim: int, page_tokens: int) -> None:
    part, x = attend_part(head_dim, kv, page_tokens)
    fmt = get_format(CHANNEL_FORMATS[kv])
    executor = BACKEND.load(part, threads=2)
    for first in range(0, 64, 30):
        executor.forward(step((0, first, np.arange(first, min(64, first + 30)))))
    for i in range(64 // page_tokens):
        for head in range(2):
            page = x[i * page_tokens : (i + 1) * page_tokens, head * head_dim : (head + 1) * head_dim].T
            for name, plane in fmt.encode(np.ascontiguousarray(page)).items():
                assert np.array_equal(executor._arena.cache(0, "k", name)[PAGES[0][i], head], plane), name
    executor.close()


@pytest.mark.parametrize("kv", PAIRS)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(32, 4, 2), (20, 3, 1)])
def test_whole_program_equals_reference(kv: str, head_dim: int, heads: int, kv_heads: int) -> None:
    part = llama("f32", kv=kv, head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    executor, oracle = BACKEND.load(part, threads=2), REFERENCE.load(part)
    for batch in (step((0, 0, ids(21)), (1, 0, ids(9, 6))), step((1, 9, ids(9, 2)), (0, 21, ids(14, 3)))):
        want = oracle.forward(batch)
        # A key or value on a rounding edge may land one step apart
        assert np.abs(executor.forward(batch) - want).max() <= 5e-3 * np.abs(want).max()
    executor.close()


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("window", [1, 7, 16, 21, 40])
def test_windows(window: int, page_tokens: int) -> None:
    part = llama("f32", kv="int4c,f32", window=window, softcap=2.0, page_tokens=page_tokens)
    executor, oracle = BACKEND.load(part, threads=2), REFERENCE.load(part)
    for first, count in ((0, 30), (30, 1), (31, 25), (56, 8)):
        batch = step((0, first, ids(count, first)))
        want = oracle.forward(batch)
        assert np.abs(executor.forward(batch) - want).max() <= 5e-3 * np.abs(want).max()
    executor.close()


# --- the exactness contract --------------------------------------------------------------------------------

TEXT, OTHER = ids(60), ids(60, 9)


def exact_part(kv: str, page_tokens: int = 16, name: str = "int4_g64") -> Part:
    return llama(name, kv=kv, softcap=3.0, page_tokens=page_tokens)


def plainly(part: Part, text: Array = TEXT) -> Array:
    """Logits of a text run alone on one thread, in two steps."""
    executor = BACKEND.load(part, threads=1)
    logits = [executor.forward(step((0, i, text[i : i + 32]))).copy() for i in range(0, len(text), 32)]
    executor.close()
    return np.concatenate(logits)


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("kv", PAIRS)
def test_chunks_batches_and_threads_agree_to_the_bit(kv: str, page_tokens: int) -> None:
    part = exact_part(kv, page_tokens)
    want, other = plainly(part), plainly(part, OTHER)
    executor = BACKEND.load(part, threads=3)
    for size in (1, 7, 16, 17):
        for sequence in (0, 1):  # the other sequence's pages and slot lie elsewhere
            for i in range(0, 60, size):
                got = executor.forward(step((sequence, i, TEXT[i : i + size])))
                assert np.array_equal(got, want[i : i + size]), (size, i)
    # Both in one step, out of step with each other, and over the pages of the runs before
    a = b = 0
    for more_a, more_b in ((5, 20), (26, 3), (1, 1), (13, 14), (15, 15), (0, 7)):
        runs = [(0, a, TEXT[a : a + more_a])] if more_a else []
        got = executor.forward(step((1, b, OTHER[b : b + more_b]), *runs))
        assert np.array_equal(got[:more_b], other[b : b + more_b])
        assert np.array_equal(got[more_b:], want[a : a + more_a])
        a, b = a + more_a, b + more_b
    assert (a, b) == (60, 60)
    executor.close()


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("head_dim", [32, 20, 64])
@pytest.mark.parametrize("kv", CHANNEL_FORMATS)
def test_instruction_sets_agree_to_the_bit(kv: str, head_dim: int, page_tokens: int) -> None:
    part = llama("int8_g64", kv=kv, head_dim=head_dim, window=41, page_tokens=page_tokens)
    answers = []
    for simd in SIMD:
        executor = BACKEND.load(part, threads=2, simd=simd)
        answers.append([executor.forward(step((0, i, TEXT[i : i + 30]))).copy() for i in (0, 30)])
        executor.close()
    for simd, answer in zip(SIMD, answers, strict=True):
        assert np.array_equal(np.concatenate(answer), np.concatenate(answers[0])), simd


@pytest.mark.parametrize("kv", CHANNEL_FORMATS)
def test_a_shared_prefix_equals_its_own(kv: str) -> None:
    """Full pages of one sequence in another's table: the second begins at a page with nothing in its slot."""
    part = exact_part(kv)
    want = plainly(part)
    executor = BACKEND.load(part, threads=2)
    for i in range(0, 40, 20):
        executor.forward(step((0, i, TEXT[i : i + 20])))
    executor.copy_page(PAGES[0][1], 9)
    batch = step((0, 32, TEXT[32:]))
    table = np.array([[PAGES[0][0], 9, 10, 11]], np.int32)
    got = executor.forward(replace(batch, page_tables=table, slots=np.array([2], np.int32)))
    assert np.array_equal(got, want[32:])
    executor.close()


@pytest.mark.parametrize("page_tokens", [16, 32])
@pytest.mark.parametrize("kv", ["int8c,f16", "int4c,int4"])
def test_rolled_back_guesses_leave_no_trace(kv: str, page_tokens: int) -> None:
    """Speculation: wrong tokens follow right ones in a step, over page ends; the next writes over them."""
    part = exact_part(kv, page_tokens)
    want = plainly(part)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        executor = BACKEND.load(part, threads=2)
        at = 0
        while at < 60:
            right = int(rng.integers(1, min(16, 60 - at) + 1))
            wrong = int(rng.integers(0, min(16, 64 - at - right) + 1))
            tokens = np.concatenate([TEXT[at : at + right], ids(wrong, seed + at)])
            got = executor.forward(step((0, at, tokens)))
            assert np.array_equal(got[:right], want[at : at + right]), (seed, at)
            at += right
        executor.close()


def test_a_page_is_filled_twice() -> None:
    """The roll-back that crosses a page's end; the bytes of the page are proved to change in between."""
    part = exact_part("int4c,int4")
    want = plainly(part)
    executor = BACKEND.load(part, threads=2)
    codes = executor._arena.cache(0, "k", "q")[PAGES[0][0]]
    executor.forward(step((0, 0, np.concatenate([TEXT[:13], ids(8, 1)]))))  # 13 right ones, the page is full
    first = codes.copy()
    got = executor.forward(step((0, 13, TEXT[13:20])))
    assert np.array_equal(got, want[13:20])
    assert not np.array_equal(codes, first)
    assert np.array_equal(executor.forward(step((0, 20, TEXT[20:50]))), want[20:50])
    executor.close()


def test_a_draft_run_token_by_token_is_rolled_back() -> None:
    part = exact_part("int4c,f16")
    want = plainly(part)
    executor = BACKEND.load(part, threads=1)
    at = 0
    for more in (14, 1, 17, 3, 13, 12):
        executor.forward(step((0, at, TEXT[at : at + more])))
        at += more
        for i, wrong in enumerate(ids(min(15, 64 - at), at)):
            executor.forward(step((0, at + i, np.array([wrong]))))
        if at < 60:
            assert np.array_equal(executor.forward(step((0, at, TEXT[at : at + 1])))[0], want[at])
    assert at == 60
    executor.close()


def bad_embedding(part: Part) -> Part:
    """The part with NaN for the embedding of token 69."""
    spec = part.program.tensors["embed"]
    values = np.random.default_rng(1).standard_normal((spec.rows, spec.cols), dtype=np.float32)
    values[69] = 12345.0
    tensor = packed(values, "f32")
    planes = {"w": np.where(tensor.planes["w"] == 12345.0, np.float32(np.nan), tensor.planes["w"])}
    return replace(part, weights={**part.weights, "embed": replace(tensor, planes=planes)})


@pytest.mark.parametrize("name", ["int4_g64", "f32"])
def test_a_step_spoiled_by_another_sequence_can_be_run_again(name: str) -> None:
    """What Session does on NumericError, with a run of three pages that begins inside one."""
    part = bad_embedding(llama(name, kv="int4c,int4", tokens=48))
    good = TEXT % 69
    executor = BACKEND.load(part, threads=2)
    want = [executor.forward(step((0, a, good[a:b]))).copy() for a, b in ((0, 7), (7, 50), (50, 60))]
    executor.forward(step((0, 0, good[:7])))
    spoiled = step((0, 7, good[7:50]), (1, 0, np.array([3, 69])))
    for _ in range(2):
        with pytest.raises(NumericError, match="NaN or Inf"):
            executor.forward(spoiled)
    with pytest.raises(
        NumericError, match="NaN or Inf"
    ):  # the one at fault, alone: at once, not at the page's end
        executor.forward(step((1, 0, np.array([3, 69]))))
    assert np.array_equal(executor.forward(step((0, 7, good[7:50]))), want[1])
    assert np.array_equal(executor.forward(step((0, 50, good[50:60]))), want[2])
    executor.close()


def test_the_reference_finds_bad_keys_in_the_same_step() -> None:
    executor = REFERENCE.load(bad_embedding(llama("f32", kv="int4c", layers=1)))
    with pytest.raises(NumericError):
        executor.forward(step((0, 0, np.array([3, 69]))))


@pytest.mark.parametrize("kv", ["int8c,f32", "int4c,f32"])
def test_keys_beyond_the_format_are_an_error_when_the_page_is_full(kv: str) -> None:
    part, x = attend_part(16, kv, 16)
    huge = x.copy()
    huge[9, 4] = 1e7  # f16 scales end at 65504, of 127 steps or 15
    part = replace(part, weights={**part.weights, "x": packed(huge, "f32")})
    for backend in (BACKEND, REFERENCE):
        executor = backend.load(part)
        executor.forward(step((0, 0, np.arange(15))))
        with pytest.raises(NumericError, match="does not fit"):
            executor.forward(step((0, 15, np.arange(15, 16))))
        executor.close()


# --- slots -------------------------------------------------------------------------------------------------


def rows(order: list[int], slots: list[int], runs: dict[int, tuple[int, Array]]) -> StepBatch:
    """A step whose page-table rows are the sequences `order`, in `slots`."""
    batch = step(*((order.index(s), first, tokens) for s, (first, tokens) in runs.items()))
    tables = np.array([(3, 1, 0, 2), (4, 7, 5, 6), (8, 9, 10, 11)], np.int32)[order]
    return replace(batch, page_tables=tables, slots=np.array(slots, np.int32))


def test_rows_may_change_while_slots_stay() -> None:
    part = exact_part("int4c,int8")
    want, other = plainly(part), plainly(part, OTHER)
    executor = BACKEND.load(part, threads=2)
    executor.forward(rows([0, 2], [1, 0], {0: (0, TEXT[:9]), 2: (0, OTHER[:12])}))
    got = executor.forward(rows([2, 0], [0, 1], {2: (12, OTHER[12:24]), 0: (9, TEXT[9:20])}))
    assert np.array_equal(got, np.concatenate([other[12:24], want[9:20]]))
    got = executor.forward(rows([0], [1], {0: (20, TEXT[20:40])}))
    assert np.array_equal(got, want[20:40])
    executor.close()


def test_a_wrong_slot_is_noticed() -> None:
    part = exact_part("int4c,int8")
    want = plainly(part)
    executor = BACKEND.load(part, threads=1)
    executor.forward(rows([0, 2], [1, 0], {0: (0, TEXT[:9]), 2: (0, OTHER[:9])}))
    for slots in ([0, 1], [2, 0]):  # exchanged, and one that holds nothing
        with pytest.raises(
            BadRequest, match="token 0 at position 9 continues a page whose keys its slot does not"
        ):
            executor.forward(rows([0, 2], slots, {0: (9, TEXT[9:11])}))
    for slots, message in (
        ([1, 1], "sequence 1 has the slot 1"),
        ([3, 0], "slot 3, expected 0 to 2, each once"),
    ):
        with pytest.raises(BadRequest, match=message):
            executor.forward(rows([0, 2], slots, {0: (9, TEXT[9:11]), 2: (9, OTHER[9:11])}))
    with pytest.raises(BadRequest, match="slots has 1 entries for 2 sequences"):
        executor.forward(replace(rows([0, 2], [1, 0], {0: (9, TEXT[9:11])}), slots=np.zeros(1, np.int32)))
    # A refused step changes nothing
    assert np.array_equal(executor.forward(rows([0], [1], {0: (9, TEXT[9:40])})), want[9:40])
    executor.close()


def test_keys_of_another_slot_would_differ() -> None:
    """The inverse: with the open page's keys exchanged in memory the numbers do change."""
    part = exact_part("int4c,f32")
    want = plainly(part)
    executor = BACKEND.load(part, threads=1)
    executor.forward(rows([0, 2], [0, 1], {0: (0, TEXT[:9]), 2: (0, OTHER[:9])}))
    import ctypes

    width, slot = 2 * 32 * 4, 3 * 16 * 2 * 32 * 4  # bytes of a row and of a slot
    for layer in range(2):
        address = executor._arena.open_pages(layer)
        assert address is not None
        ctypes.memmove(address, address + slot, 9 * width)
    assert not np.array_equal(executor.forward(rows([0], [0], {0: (9, TEXT[9:12])})), want[9:12])
    executor.close()


def test_a_roll_back_too_far_is_refused() -> None:
    part = exact_part("int8c,f16")
    executor = BACKEND.load(part, threads=1)
    for a, b in ((0, 10), (10, 40), (40, 41), (41, 60)):
        executor.forward(step((0, a, TEXT[a:b])))
    want = plainly(part)
    with pytest.raises(BadRequest, match="is rolled back no further"):
        executor.forward(step((0, 10, TEXT[10:20])))
    got = executor.forward(step((0, 16, TEXT[16:40])))  # from a page's start it may go anywhere
    assert np.array_equal(got, want[16:40])
    executor.close()


def test_steps_that_are_no_runs_are_refused() -> None:
    executor = BACKEND.load(exact_part("int8c,f16"), threads=1)
    batch = step((0, 0, TEXT[:4]))
    for positions, message in (
        ((0, 1, 3, 4), "token 2 at position 3"),
        ((1, 0, 2, 3), "token 0 at position 1"),
    ):
        with pytest.raises(BadRequest, match=message):
            executor.forward(replace(batch, positions=np.array(positions, np.int32)))
    both = step((0, 0, TEXT[:2]), (1, 0, TEXT[:2]))
    turns = {"sequence": (0, 1, 0, 1), "positions": (0, 0, 1, 1)}
    with pytest.raises(BadRequest, match="one run of consecutive positions"):
        executor.forward(replace(both, **{n: np.array(a, np.int32) for n, a in turns.items()}))
    executor.close()


@pytest.mark.parametrize("backend", [BACKEND, REFERENCE], ids=["cpu", "reference"])
def test_trees_are_refused(backend: Backend) -> None:
    executor = backend.load(exact_part("int4c,int4", name="f32"))
    chain = np.array([-1, 0, 1], np.int32)
    batch = replace(step((0, 0, TEXT[:3])), parents=chain, places=np.arange(3, dtype=np.int32))
    with pytest.raises(BadRequest, match="token trees do not work with K in int4c"):
        executor.forward(batch)
    executor.close()


def test_keys_cannot_be_moved() -> None:
    executor = REFERENCE.load(exact_part("int4c,int4", name="f32"))
    with pytest.raises(BadRequest, match="keys in int4c share scales"):
        executor.move(np.array(PAGES[0], np.int32), np.array([5]), np.array([4]))


def test_a_program_that_reads_an_older_layers_keys_is_refused() -> None:
    part, _ = attend_part(16, "f32", 16)
    first, append, attend, last = part.program.ops
    ops = (
        first,
        append,
        KvAppend(k="x", v="x", layer=1),
        attend,
        Linear(x="m", out="x", weight="square"),
        last,
    )
    tensors = {**part.program.tensors, "square": TensorSpec(32, 32, "matrix")}
    program = Program(
        ops=ops,
        tensors=tensors,
        buffers=part.program.buffers,
        cache=part.program.cache * 2,
        vocab_size=64,
        max_context=64,
    )
    weights = {**part.weights, "square": packed(np.eye(32, dtype=np.float32), "f32")}
    assert run(part_of(program, weights), step((0, 0, TEXT[:3] % 64))).shape == (3, 64)
    with pytest.raises(Unsupported, match="attention reads layer 0 after layer 1 was appended"):
        BACKEND.load(part_of(program, weights, kv="int4c"))
