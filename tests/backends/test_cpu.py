"""The cpu backend against independent numpy: every format, op and cache within a stated bound."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cpu_programs import (
    Array,
    decoded,
    ids,
    instruction_sets,
    linear_part,
    llama,
    packed,
    part_of,
    run,
    step,
    vector,
)

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import PackedTensor
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine import packing
from edge_runtime.engine.formats import FORMATS, Format, codes, get_format
from edge_runtime.engine.formats.microscaling import E2M1_VALUES
from edge_runtime.engine.formats.trellis import trellis_of, windows
from edge_runtime.engine.kv import KV_FORMATS
from edge_runtime.engine.ops import Activation, AnyOp, Embed, Logits, Norm
from edge_runtime.engine.program import Program, TensorSpec

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

INTEGER = [name for name, fmt in FORMATS.items() if fmt.kind == "int"]
OTHERS = [name for name, fmt in FORMATS.items() if fmt.kind != "int"]
SIMD = instruction_sets()


# --- matrices ----------------------------------------------------------------------------------------------


def quantized(x: Array, group: int) -> tuple[Array, Array]:
    """The contract's activations: codes (T, groups, group) and f32 scales (T, groups)."""
    tokens, cols = x.shape
    full = np.zeros((tokens, -(-cols // group) * group), np.float32)
    full[:, :cols] = x
    full = full.reshape(tokens, -1, group)
    scale = np.abs(full).max(axis=2) / np.float32(127)
    safe = np.where(scale == 0, np.float32(np.inf), scale)
    return np.clip(np.rint(full / safe[..., None]), -127, 127), scale


def outliers(w: PackedTensor) -> Array:
    """Columns that a format holds apart, ascending: their inputs are in no code."""
    index = w.planes.get("index", np.zeros(0, np.int32))
    return index[index >= 0]


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("name", FORMATS)
def test_linear_within_its_bound(name: str, simd: str) -> None:
    """|y - y_exact| <= sum over groups of half an activation step times sum |w|, plus f32 rounding."""
    rng = np.random.default_rng(1)
    rows, cols, tokens = 45, 203, 15
    w = packed(rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(0.1), name)
    x = rng.standard_normal((tokens, cols), dtype=np.float32)
    x[3] = 0
    x[4, :64] = 0  # a zero group
    bias = rng.standard_normal(rows).astype(np.float32)
    got = run(linear_part(w, x, bias), step((0, 0, np.arange(tokens))), simd=simd)
    exact_w, exact_x = decoded(w).astype(np.float64), x.astype(np.float64)
    size = np.abs(exact_x) @ np.abs(exact_w).T
    bound = size * 1e-5 + np.abs(bias) * 1e-6
    if name in INTEGER:
        group = get_format(name).group or 64
        x[:, outliers(w)] = 0
        _, scale = quantized(x, group)
        full = np.zeros((rows, scale.shape[1] * group))
        full[:, :cols] = np.abs(exact_w)
        full[:, outliers(w)] = 0
        bound = bound + scale.astype(np.float64) / 2 @ full.reshape(rows, -1, group).sum(axis=2).T * 1.0001
    assert (np.abs(got[:, :rows] - (exact_x @ exact_w.T + bias)) <= bound).all()


def fma(a: float, b: float, c: float) -> np.float32:
    """a * b + c rounded once to f32: exact in f64 pieces, then corrected where f64 rounded a tie's side."""
    from fractions import Fraction

    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    near = np.float32(float(exact))
    around = [np.nextafter(near, np.float32(s)) for s in (-np.inf, np.inf)] + [near]
    return min(around, key=lambda v: (abs(Fraction(float(v)) - exact), int(v.view(np.int32)) & 1))


def whole_numbers(fmt: Format, planes: dict[str, Array], cols: int) -> Array:
    """Codes as the whole numbers that the contract multiplies with those of the activations: (rows, cols)."""
    if (code := trellis_of(fmt)) is not None:
        return 2.0 * code.levels()[windows(codes.split(fmt.codes, planes, cols), code.bits)]
    u = codes.split(fmt.codes, planes, cols).astype(np.float64)
    if fmt.codes[0].encoding == "e2m1":
        return 2.0 * E2M1_VALUES[u.astype(int)]
    if "zero" in planes:
        return u - np.repeat(planes["zero"].astype(np.float64), fmt.group or cols, axis=1)[:, :cols]
    if fmt.codes[0].encoding == "i8" or fmt.plane("min") or fmt.plane("scale_min"):
        return u
    assert fmt.levels is not None
    return u + float(fmt.levels[0])


@pytest.mark.parametrize("simd", SIMD)
@pytest.mark.parametrize("name", INTEGER)
def test_integer_linear_is_the_contract_to_the_bit(name: str, simd: str) -> None:
    """Groups in ascending order: y = fma(dot, a * s, y), and where values have a minimum -m also
    y = fma(-sum of the activations' codes, a * m, y)."""
    rng = np.random.default_rng(2)
    rows, cols = 18, 150
    w = packed(rng.standard_normal((rows, cols), dtype=np.float32), name)
    x = rng.standard_normal((2, cols), dtype=np.float32)
    got = run(linear_part(w, x, None), step((0, 0, np.arange(2))), simd=simd)
    fmt = get_format(name)
    assert fmt.affine is not None
    group = fmt.group or 64
    apart = outliers(w)
    a, scale = quantized(np.where(np.isin(np.arange(cols), apart), 0, x), group)
    planes = packing.unpack(name, w.packing, w.planes, rows, cols)
    full = np.zeros((rows, scale.shape[1] * group))
    full[:, :cols] = whole_numbers(fmt, planes, cols)
    dots = np.einsum("tgi,rgi->trg", a.astype(np.float64), full.reshape(rows, -1, group))
    w_scale, shift = fmt.affine(planes)
    if fmt.codes[0].encoding.startswith(("e2m1", "tcq")):
        w_scale = w_scale / np.float32(2)  # of doubled codes
    minima = fmt.plane("min") or fmt.plane("scale_min")
    for t in range(2):
        for r in range(rows):
            acc = np.float32(0)
            for g in range(scale.shape[1]):
                factor = scale[t, g] if fmt.group is None else scale[t, g] * w_scale[r, g]
                acc = fma(dots[t, r, g], factor, acc)
                if minima:
                    acc = fma(-a[t, g].sum(), scale[t, g] * -shift[r, g], acc)
            want = acc if fmt.group is not None else acc * w_scale[r, 0]
            for slot, column in enumerate(apart.tolist()):
                want = fma(planes["outlier"][r, slot], x[t, column], want)
            assert got[t, r] == want, (t, r)


def test_small_and_single_shapes() -> None:
    rng = np.random.default_rng(3)
    for rows, cols in ((1, 1), (16, 64), (3, 65), (17, 31)):
        w = rng.standard_normal((rows, cols), dtype=np.float32)
        x = rng.standard_normal((1, cols), dtype=np.float32)
        for name in ("f16", "int8_row", "nf4_g64", "int4_g32_zp"):
            t = packed(w, name)
            got = run(linear_part(t, x, None), step((0, 0, np.arange(1))))
            want = x.astype(np.float64) @ decoded(t).astype(np.float64).T
            assert np.abs(got - want).max() <= 0.01 * np.abs(x).max() * np.abs(w).sum(axis=1).max()


# --- whole programs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(32, 4, 2), (20, 3, 1), (64, 2, 2)])
def test_whole_program_equals_reference(kv: str, head_dim: int, heads: int, kv_heads: int) -> None:
    part = llama("f32", kv=kv, head_dim=head_dim, heads=heads, kv_heads=kv_heads)
    batch = step((0, 0, ids(21)), (1, 0, ids(9, 6)))
    want = REFERENCE.load(part).forward(batch)
    got = run(part, batch, threads=2)
    # A key or value on a rounding edge may land one step apart in a quantized cache
    limit = {"f32": 1e-5, "f16": 2e-4}.get(kv, 5e-3)
    assert np.abs(got - want).max() <= limit * np.abs(want).max()


@pytest.mark.parametrize("name", OTHERS)
def test_float_formats_equal_reference(name: str) -> None:
    part, batch = llama(name), step((0, 0, ids(12)))
    want = REFERENCE.load(part).forward(batch)
    assert np.abs(run(part, batch) - want).max() <= 1e-5 * np.abs(want).max()


@pytest.mark.parametrize("name", INTEGER)
def test_integer_formats_are_near_reference(name: str) -> None:
    part, batch = llama(name), step((0, 0, ids(12)))
    want = REFERENCE.load(part).forward(batch)
    assert np.abs(run(part, batch) - want).max() <= 0.08 * np.abs(want).max()


@pytest.mark.parametrize("window", [None, 1, 7, 16, 21])
@pytest.mark.parametrize("page_tokens", [16, 32])
def test_window_and_softcap(window: int | None, page_tokens: int) -> None:
    part = llama("f32", window=window, softcap=2.0, page_tokens=page_tokens)
    executor, oracle = BACKEND.load(part, threads=2), REFERENCE.load(part)
    for first, count in ((0, 30), (30, 1), (31, 12)):
        batch = step((0, first, ids(count, first)))
        want = oracle.forward(batch)
        assert np.abs(executor.forward(batch) - want).max() <= 1e-5 * np.abs(want).max()
    executor.close()


def one_op(op: AnyOp, width: int, x: Array, extra: dict[str, Array]) -> Array:
    """Rows of `op` applied to the rows of x, by the cpu backend and by the reference: (2, T, width)."""
    rows = width
    tensors = {"x": TensorSpec(rows, width, "embedding"), "eye": TensorSpec(rows, width, "head")}
    table = np.zeros((rows, width), np.float32)
    table[: len(x)] = x
    weights = {"x": packed(table, "f32"), "eye": packed(np.eye(rows, dtype=np.float32), "f32")}
    for name, values in extra.items():
        tensors[name] = TensorSpec(1, len(values), "vector")
        weights[name] = vector(values)
    program = Program(
        ops=(Embed(out="x", weight="x"), op, Logits(x="y", weight="eye")),
        tensors=tensors,
        buffers={"x": width, "y": width},
        cache=(),
        vocab_size=rows,
        max_context=64,
    )
    part, batch = part_of(program, weights), step((0, 0, np.arange(len(x))))
    return np.stack([run(part, batch), REFERENCE.load(part).forward(batch)])


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
def test_activations(kind: Any) -> None:
    x = np.linspace(-30, 30, 8 * 61, dtype=np.float32).reshape(8, 61)
    x[0, :4] = (0.0, -0.0, 1e-30, -1e-30)
    for up in (None, "x"):
        got, want = one_op(Activation(x="x", out="y", kind=kind, up=up), 61, x, {})
        assert (np.abs(got - want) <= 3e-6 * np.abs(want) + 2e-6 * np.minimum(np.abs(x), 1)).all()


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("group", [0, 13])
def test_norms(kind: Any, group: int) -> None:
    rng = np.random.default_rng(4)
    x = rng.standard_normal((6, 39), dtype=np.float32) * 10 + 3
    extra = {"w": rng.standard_normal(group or 39), "b": rng.standard_normal(group or 39)}
    op = Norm(x="x", out="y", weight="w", bias="b", eps=1e-5, kind=kind, group=group)
    got, want = one_op(op, 39, x, extra)
    assert np.abs(got - want).max() <= 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_embedding_rows_are_the_codecs(name: str) -> None:
    """Logits of an identity head are the embedding itself, so decoding must be exact."""
    rng = np.random.default_rng(7)
    w = packed(rng.standard_normal((37, 100), dtype=np.float32), name)
    program = Program(
        ops=(Embed(out="x", weight="w", scale=2.0), Logits(x="x", weight="eye")),
        tensors={"w": TensorSpec(37, 100, "embedding"), "eye": TensorSpec(37, 100, "head")},
        buffers={"x": 100},
        cache=(),
        vocab_size=37,
        max_context=64,
    )
    eye = np.zeros((37, 100), np.float32)
    eye[:, 63:] = np.eye(37, dtype=np.float32)
    part = part_of(program, {"w": w, "eye": packed(eye, "f32")})
    got = run(part, step((0, 0, np.arange(30))))
    assert np.array_equal(got, decoded(w)[:30, 63:] * np.float32(2.0))
