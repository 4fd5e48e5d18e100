"""The oracle itself, against a naive walk, the formats' codecs, and its own promises."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import numpy as np
import pytest
from naive_walk import naive_logits

from edge_runtime.backends import numpy_ops
from edge_runtime.backends.numpy_weights import DecodedWeights, decode, decode_rows
from edge_runtime.backends.protocol import PackedTensor, Part, StepBatch
from edge_runtime.backends.reference import BACKEND, ReferenceExecutor
from edge_runtime.engine.formats import FORMATS, Array, get_format
from edge_runtime.engine.kv import KV_FORMATS, cache_nbytes, kv_format
from edge_runtime.engine.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.packing import cpu_packing, pack
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import BackendUnavailable, BadConfig, BadRequest, NumericError

VOCAB, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN = 37, 24, 4, 2, 32, 40
PAGES, PAGE = 12, 16
STEP = StepShape(context=64, sequences=4, tokens=64, logits=64)


def toy(window: int | None = None, softcap: float | None = None) -> Program:
    """Two layers that use every op once: biases, both norms, both gatings, a gated and a plain activation."""
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    ops: list[Any] = [Embed(out="h", weight="embed", scale=1.5)]
    tensors = {
        "embed": TensorSpec(VOCAB, HIDDEN, "embedding"),
        "rope": TensorSpec(1, HEAD_DIM // 4, "vector"),
    }
    slots = []
    for i, kind in enumerate(("rms", "layer")):
        w = window if i == 0 else None
        shift = f"{i}.norm.bias" if i else None
        slots.append(CacheSlot(KV_HEADS, HEAD_DIM, w))
        ops += [
            Norm(x="h", out="n", weight=f"{i}.norm", eps=1e-5, kind=kind, bias=shift),
            Linear(x="n", out="q", weight=f"{i}.q", bias=f"{i}.q.bias"),
            Linear(x="n", out="k", weight=f"{i}.k"),
            Linear(x="n", out="v", weight=f"{i}.v"),
            Norm(x="q", out="q", weight=f"{i}.q_norm", eps=1e-6, group=HEAD_DIM),
            Rope(x="q", inv_freq="rope", head_dim=HEAD_DIM, scale=1.1),
            Rope(x="k", inv_freq="rope", head_dim=HEAD_DIM, scale=1.1),
            KvAppend(k="k", v="v", layer=i),
            Attention(
                q="q", out="m", layer=i, heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM,
                scale=0.3, window=w, softcap=softcap,
            ),
            Linear(x="m", out="p", weight=f"{i}.o"),
            Add(a="h", b="p", out="h", scale=0.7),
            Linear(x="h", out="g", weight=f"{i}.g"),
            Linear(x="h", out="u", weight=f"{i}.u"),
            Activation(x="g", out="g", kind="gelu" if i else "silu", up=None if i else "u"),
            Linear(x="g", out="p", weight=f"{i}.d"),
            Add(a="h", b="p", out="h"),
        ]  # fmt: skip
        tensors |= {
            f"{i}.norm": TensorSpec(1, HIDDEN, "vector"),
            f"{i}.norm.bias": TensorSpec(1, HIDDEN, "vector"),
            f"{i}.q": TensorSpec(q, HIDDEN, "matrix"),
            f"{i}.q.bias": TensorSpec(1, q, "vector"),
            f"{i}.k": TensorSpec(kv, HIDDEN, "matrix"),
            f"{i}.v": TensorSpec(kv, HIDDEN, "matrix"),
            f"{i}.q_norm": TensorSpec(1, HEAD_DIM, "vector"),
            f"{i}.o": TensorSpec(HIDDEN, q, "matrix"),
            f"{i}.g": TensorSpec(FFN, HIDDEN, "matrix"),
            f"{i}.u": TensorSpec(FFN, HIDDEN, "matrix"),
            f"{i}.d": TensorSpec(HIDDEN, FFN, "matrix"),
        }
    ops.append(Logits(x="h", weight="head", scale=0.9, softcap=20.0, bias="head.bias"))
    tensors |= {"head": TensorSpec(VOCAB, HIDDEN, "head"), "head.bias": TensorSpec(1, VOCAB, "vector")}
    buffers = {"h": HIDDEN, "n": HIDDEN, "q": q, "k": kv, "v": kv, "m": q, "p": HIDDEN, "g": FFN, "u": FFN}
    return Program(
        ops=tuple(ops), tensors=tensors, buffers=buffers, cache=tuple(slots), vocab_size=VOCAB, max_context=64
    )


def toy_weights(program: Program) -> dict[str, Array]:
    rng = np.random.default_rng(11)
    made = {}
    for name, spec in program.tensors.items():
        values = rng.standard_normal((spec.rows, spec.cols)) * 1.3 / math.sqrt(spec.cols)
        if spec.role == "vector":
            values = 0.3 * rng.standard_normal((1, spec.cols)) + (0.0 if "bias" in name else 1.0)
        made[name] = values.astype(np.float32)
    made["rope"] = (100.0 ** -(np.arange(HEAD_DIM // 4) / (HEAD_DIM // 4))).astype(np.float32)[None]
    return made


def kv_plan(k: str = "f32", v: str = "f32") -> KvPlan:
    return KvPlan(k=k, v=v, page_tokens=PAGE, pages=PAGES)


TABLES = np.array([[3, 1, 9, 5], [0, 11, 2, -1], [7, -1, -1, -1]], np.int32)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (3, 60)).astype(np.int32)


def batch(places: list[tuple[int, int]], rows: list[int] | None = None) -> StepBatch:
    """A step of (sequence, position) places with the tokens of TOKENS."""
    s, p = (np.array(x, np.int32) for x in zip(*places, strict=True))
    wanted = np.arange(len(places)) if rows is None else np.array(rows)
    return StepBatch(TOKENS[s, p], p, s, TABLES, wanted.astype(np.int32))


def altered(b: StepBatch, **changes: Array) -> StepBatch:
    return StepBatch(**({f: getattr(b, f) for f in StepBatch.__slots__} | changes))


def executor(program: Program | None = None, **kv: str) -> ReferenceExecutor:
    program = program or toy()
    return ReferenceExecutor(program, toy_weights(program).__getitem__, kv_plan(**kv), STEP)


def run(program: Program, n: int, **kv: str) -> Array:
    return executor(program, **kv).forward(batch([(0, i) for i in range(n)]))


# --- a whole program against an independent walk -----------------------------------------------------------


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (20, 3.0)])
def test_program_against_a_naive_walk(window: int | None, softcap: float | None) -> None:
    program = toy(window, softcap)
    want = naive_logits(program, toy_weights(program), TOKENS[0, :37])
    assert np.abs(run(program, 37) - want).max() <= 2e-5 * np.abs(want).max()


def test_a_token_does_not_depend_on_what_shares_its_step() -> None:
    program = toy(window=9)
    alone = [executor(program).forward(batch([(s, i) for i in range(14)])).copy() for s in range(3)]
    mixed = [(s, i) for i in range(14) for s in (2, 0, 1)]
    np.random.default_rng(8).shuffle(mixed)
    together = executor(program).forward(batch(mixed))
    for row, (s, i) in enumerate(mixed):
        np.testing.assert_allclose(together[row], alone[s][i], rtol=1e-4, atol=1e-5)


def test_chunks_and_decode_equal_one_shot() -> None:
    program = toy(window=6)
    want = run(program, 40)
    e = executor(program)
    parts = [e.forward(batch([(0, i) for i in range(a, b)])).copy() for a, b in ((0, 15), (15, 33), (33, 34))]
    parts += [e.forward(batch([(0, i)])).copy() for i in range(34, 40)]
    np.testing.assert_allclose(np.concatenate(parts), want, rtol=1e-4, atol=1e-5)


def test_only_wanted_rows_get_logits() -> None:
    whole = run(toy(), 10)
    some = executor().forward(batch([(0, i) for i in range(10)], rows=[2, 9]))
    np.testing.assert_allclose(some, whole[[2, 9]], rtol=1e-5, atol=1e-6)
    e = executor()
    hidden = e.run_hidden(batch([(0, i) for i in range(10)], rows=[]))
    assert hidden.shape == (10, HIDDEN)
    np.testing.assert_allclose(e.logits(hidden), whole, rtol=1e-5, atol=1e-6)


def test_a_rewritten_position_forgets_the_old_token() -> None:
    e = executor()
    e.forward(batch([(0, i) for i in range(8)]))
    other = batch([(0, i) for i in range(5, 8)])
    replaced = altered(other, tokens=(other.tokens + 1) % VOCAB)
    got = e.forward(replaced)
    fresh = executor()
    fresh.forward(batch([(0, i) for i in range(5)]))
    np.testing.assert_allclose(got, fresh.forward(replaced), rtol=1e-5, atol=1e-6)


# --- the cache ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KV_FORMATS)
def test_cache_holds_what_the_codec_says(name: str) -> None:
    """Attention over one key gives its value back: exactly the format's rounding of it."""
    program = toy()
    e = executor(program, k=name, v=name)
    x = toy_weights(program)
    values: list[Array] = []
    original = numpy_ops.attention

    def spy(q: Array, keys: Array, v: Array, *rest: Any, **options: Any) -> Array:
        values.append(v)
        return original(q, keys, v, *rest, **options)

    numpy_ops.attention = spy
    try:
        e.forward(batch([(0, 0)]))
    finally:
        numpy_ops.attention = original
    hidden = 1.5 * x["embed"][TOKENS[0, :1]]
    normed = numpy_ops.norm(hidden, x["0.norm"][0], None, 1e-5, "rms", 0)
    rows = (normed @ x["0.v"].T).reshape(KV_HEADS, HEAD_DIM)
    fmt = kv_format(name)
    np.testing.assert_array_equal(values[0][0], fmt.decode(fmt.encode(rows), KV_HEADS, HEAD_DIM))


NARROW = [
    ("f16", "f16", 2e-3),
    ("int8", "int8", 0.03),
    ("fp8", "fp8", 0.12),
    ("int4", "int4", 0.35),
    ("int8", "int4", 0.3),
]


@pytest.mark.parametrize(("k", "v", "bound"), NARROW)
def test_narrow_caches_stay_near_the_exact_one(k: str, v: str, bound: float) -> None:
    exact, narrow = run(toy(), 40), run(toy(), 40, k=k, v=v)
    error = np.abs(narrow - exact).max() / np.abs(exact).max()
    assert 0 < error <= bound


def test_k_and_v_have_their_own_formats() -> None:
    a, b = run(toy(), 20, k="int8", v="f32"), run(toy(), 20, k="f32", v="int8")
    assert not np.array_equal(a, b)


def test_copied_page_serves_another_sequence() -> None:
    program = toy()
    e = executor(program, k="int8", v="int4")
    e.forward(batch([(0, i) for i in range(18)]))
    e.copy_page(3, 7)  # sequence 0's first page to sequence 2's only one
    places = StepBatch(
        TOKENS[0, 10:11], np.array([10], np.int32), np.array([2], np.int32), TABLES, np.array([0], np.int32)
    )
    fresh = executor(program, k="int8", v="int4")
    fresh.forward(batch([(0, i) for i in range(10)]))
    np.testing.assert_allclose(e.forward(places), fresh.forward(batch([(0, 10)])), rtol=1e-4, atol=1e-5)
    for source, target in ((0, PAGES), (-1, 0)):
        with pytest.raises(BadRequest, match="does not exist"):
            e.copy_page(source, target)


def test_pages_before_the_window_may_be_gone() -> None:
    program = msgspec.structs.replace(toy(window=5), cache=(CacheSlot(KV_HEADS, HEAD_DIM, 5),) * 2)
    ops = tuple(
        msgspec.structs.replace(op, window=5) if isinstance(op, Attention) else op for op in program.ops
    )
    program = msgspec.structs.replace(program, ops=ops)
    e = executor(program)
    want = e.forward(batch([(0, i) for i in range(40)]))[-1].copy()
    gone = TABLES.copy()
    gone[0, :2] = -1
    last = altered(batch([(0, 39)]), page_tables=gone)
    np.testing.assert_allclose(e.forward(last)[0], want, rtol=1e-4, atol=1e-5)
    with pytest.raises(BadRequest, match="token 0 at position 39 needs page -1"):
        executor(toy()).forward(last)


# --- what is refused ---------------------------------------------------------------------------------------

GOOD = batch([(0, 0), (0, 1), (1, 0)])
i32 = np.int32
BAD = [
    ({"tokens": np.array([0, VOCAB, 1], i32)}, f"tokens holds 0 to {VOCAB}, expected 0 to {VOCAB - 1}"),
    ({"tokens": np.array([0, -1, 1], i32)}, "tokens holds -1"),
    ({"tokens": np.array([0.0, 1.0, 1.0])}, "tokens is 1-D float64"),
    ({"tokens": np.array([[0, 1, 1]], i32)}, "tokens is 2-D"),
    ({"tokens": np.zeros(0, i32)}, "0 tokens"),
    ({"positions": np.array([0, 1], i32)}, "positions has 2 entries for 3 tokens"),
    ({"positions": np.array([0, 64, 0], i32)}, "positions holds 0 to 64"),
    ({"positions": np.array([0, -1, 0], i32)}, "positions holds -1"),
    ({"positions": np.array([0, 0, 0], i32)}, "same sequence and position"),
    ({"sequence": np.array([0, 0, 3], i32)}, "sequence holds 0 to 3, expected 0 to 2"),
    ({"page_tables": np.full((3, 4), PAGES, i32)}, f"token 0 at position 0 needs page {PAGES}"),
    ({"page_tables": np.full((3, 4), -2, i32)}, "token 0 at position 0 needs page -2"),
    ({"page_tables": np.full((3, 4), -1, i32)}, "token 0 at position 0 needs page -1"),
    ({"page_tables": np.zeros((5, 4), i32)}, "5 sequences, the executor was sized for 4"),
    ({"page_tables": np.zeros(4, i32)}, "page_tables is 1-D"),
    ({"logit_rows": np.array([3], i32)}, "logit_rows holds 3"),
    ({"logit_rows": np.array([1, 0], i32)}, "logit_rows must ascend"),
    ({"logit_rows": np.array([1, 1], i32)}, "logit_rows must ascend"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_steps_are_refused(changes: dict[str, Array], message: str) -> None:
    e = executor()
    with pytest.raises(BadRequest, match=message):
        e.forward(altered(GOOD, **changes))
    e.forward(GOOD)  # and the executor goes on


def test_a_step_larger_than_planned_is_refused() -> None:
    small = StepShape(context=8, sequences=4, tokens=2, logits=1)
    e = ReferenceExecutor(toy(), toy_weights(toy()).__getitem__, kv_plan(), small)
    with pytest.raises(BadRequest, match="3 tokens, the executor was sized for 2"):
        e.forward(GOOD)
    with pytest.raises(BadRequest, match="2 logit_rows, the executor was sized for 1"):
        e.forward(batch([(0, 0), (0, 1)]))
    with pytest.raises(BadRequest, match="positions holds 8 to 8, expected 0 to 7"):
        e.forward(batch([(0, 8)]))


@pytest.mark.parametrize("name", ["embed", "0.q", "1.v", "0.d", "head"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_numbers_are_caught_in_the_step(name: str, value: float) -> None:
    weights = toy_weights(toy())
    weights[name] = weights[name].copy()
    weights[name][TOKENS[0, 0] if name == "embed" else 0, 0] = value
    e = ReferenceExecutor(toy(), weights.__getitem__, kv_plan(), STEP)
    with pytest.raises(NumericError):
        e.forward(batch([(0, 0)]))


def test_a_key_too_large_for_the_cache_is_a_numeric_error() -> None:
    weights = toy_weights(toy())
    weights["0.v"] = weights["0.v"] * 1e6
    e = ReferenceExecutor(toy(), weights.__getitem__, kv_plan("f16", "f16"), STEP)
    with pytest.raises(NumericError, match="v of layer 0 does not fit the cache: f16"):
        e.forward(batch([(0, 0)]))


def test_unknown_cache_format_and_broken_program_are_refused() -> None:
    with pytest.raises(BadConfig, match="unknown KV format 'int9'"):
        executor(k="int9")
    broken = msgspec.structs.replace(toy(), ops=toy().ops[:-1])
    with pytest.raises(BadConfig, match="logits"):
        executor(broken)


def test_a_closed_executor_refuses() -> None:
    e = executor()
    assert e.memory_bytes == cache_nbytes(toy(), kv_plan(), STEP)  # all arrays are multiples of 64
    e.close()
    e.close()
    assert e.memory_bytes == 0
    with pytest.raises(BackendUnavailable, match="closed"):
        e.forward(GOOD)
    with pytest.raises(BackendUnavailable, match="closed"):
        e.copy_page(0, 1)
    with pytest.raises(BackendUnavailable, match="closed"):
        e.logits(np.zeros((1, HIDDEN), np.float32))


# --- weights -----------------------------------------------------------------------------------------------


def packed(values: Array, fmt: str, packing: str) -> PackedTensor:
    rows, cols = values.shape
    planes = pack(fmt, packing, get_format(fmt).encode(values), rows, cols)
    return PackedTensor(rows, cols, fmt, packing, planes)


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("cpu", [False, True], ids=["rows", "cpu"])
@pytest.mark.parametrize("fmt", FORMATS)
def test_rows_of_a_stored_tensor(fmt: str, cpu: bool, rows: int) -> None:
    values = np.random.default_rng(9).standard_normal((rows, 72)).astype(np.float32)
    tensor = packed(values, fmt, cpu_packing(fmt) if cpu else "rows")
    whole = decode(tensor)
    reference = get_format(fmt)
    np.testing.assert_array_equal(whole, reference.decode(reference.encode(values), rows, 72))
    ids = np.random.default_rng(10).integers(0, rows, 9)
    np.testing.assert_array_equal(decode_rows(tensor, ids), whole[ids])


@pytest.mark.parametrize("fmt", ["f32", "f16", "int8_g32", "int4_g32_zp", "fp8_e4m3_tensor", "nf4_g64"])
def test_a_loaded_engine_computes_with_the_stored_numbers(fmt: str) -> None:
    program = toy()
    stored = {}
    for name, values in toy_weights(program).items():
        vector = program.tensors[name].role == "vector"
        stored[name] = packed(values, "f32" if vector else fmt, "n16" if vector else cpu_packing(fmt))
    part = Part(program, stored, kv_plan(), STEP)
    assert BACKEND.supports(program, {name: t.format for name, t in stored.items()}).ok
    loaded = BACKEND.load(part)
    plain = ReferenceExecutor(program, {n: decode(t) for n, t in stored.items()}.__getitem__, kv_plan(), STEP)
    places = batch([(0, i) for i in range(12)])
    np.testing.assert_array_equal(loaded.forward(places), plain.forward(places))
    # Beyond the budget weights are decoded at each use, to the same numbers
    lazy = ReferenceExecutor(program, DecodedWeights(stored, keep=0), kv_plan(), STEP)
    np.testing.assert_array_equal(lazy.forward(places), plain.forward(places))
    kept = sum(t.rows * t.cols * 4 for t in stored.values())
    assert loaded.memory_bytes == cache_nbytes(program, kv_plan(), STEP) + kept
    assert lazy.memory_bytes == cache_nbytes(program, kv_plan(), STEP)


def test_weights_are_asked_for_one_at_a_time() -> None:
    """A provider that makes each tensor anew holds only the one in use; an embedding gives only its rows."""

    class Lazy:
        def __init__(self) -> None:
            self.made: list[str] = []
            self.held = toy_weights(toy())

        def __call__(self, name: str) -> Array:
            self.made.append(name)
            return self.held[name].copy()

        def rows(self, name: str, ids: Array) -> Array:
            self.made.append(f"{name}[{len(ids)}]")
            return self.held[name][ids]

    lazy = Lazy()
    e = ReferenceExecutor(toy(), lazy, kv_plan(), STEP)
    places = batch([(0, 0), (0, 1)])
    np.testing.assert_array_equal(e.forward(places), executor().forward(places))
    assert lazy.made[0] == "embed[2]" and "embed" not in lazy.made
    assert lazy.made.count("0.q") == lazy.made.count("head") == 1
    e.forward(batch([(0, 2)]))
    assert lazy.made.count("0.q") == 2


def test_the_backend_says_what_it_cannot_run() -> None:
    formats = dict.fromkeys(toy().tensors, "f32")
    assert BACKEND.available().ok and BACKEND.supports(toy(), formats).ok
    unknown = BACKEND.supports(toy(), formats | {"head": "int7_g64"})
    assert not unknown.ok and "int7_g64" in unknown.why
    missing = BACKEND.supports(toy(), {k: v for k, v in formats.items() if k != "0.q"})
    assert not missing.ok and "'0.q'" in missing.why
    assert set(BACKEND.packing) == set(FORMATS)
