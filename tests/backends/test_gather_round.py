"""Gather and round on both backends: against plain loops and torch, to the bit, and what they refuse."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_programs import Array, ids, instruction_sets, llama, packed, part_of, run, step, vector

from edge_runtime.backends import numpy_ops
from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.protocol import Executor, PackedTensor, Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.ops import AnyOp, Embed, Gather, Input, Linear, Logits, Norm, Round
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.errors import BadConfig, BadEngineFile, NumericError

if not CPU.available().ok:
    pytest.skip(CPU.available().why, allow_module_level=True)

LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0}
FORMATS = list(LARGEST)
LOADS: dict[str, Callable[[Part], Executor]] = {
    **{simd: (lambda part, simd=simd: CPU.load(part, threads=2, simd=simd)) for simd in instruction_sets()},
    "reference": REFERENCE.load,
}
backends = pytest.mark.parametrize("load", LOADS.values(), ids=list(LOADS))


def rows_part(ops: tuple[AnyOp, ...], width: int, out: int, vectors: dict[str, Array]) -> Part:
    """The logits are the rows of buffer `y` (out wide): an identity head over inputs (width wide)."""
    tensors = {"eye": TensorSpec(out, out, "head")}
    weights = {"eye": packed(np.eye(out, dtype=np.float32), "f32")}
    for name, values in vectors.items():
        tensors[name] = TensorSpec(1, len(values), "vector")
        weights[name] = unchecked(values)
    program = Program(
        ops=(Input(out="x"), *ops, Logits(x="y", weight="eye")),
        tensors=tensors,
        buffers={"x": width, "y": out},
        cache=(),
        vocab_size=out,
        max_context=64,
    )
    return part_of(program, weights)


def unchecked(values: Array) -> PackedTensor:
    """A vector with any numbers, as a damaged file has."""
    return replace(vector(np.zeros(len(values))), planes={"w": np.asarray(values, np.float32)})


def hidden(load: Callable[[Part], Executor], part: Part, x: Array) -> Array:
    """Rows of the buffer that the logits op reads, bit for bit."""
    executor = load(part)
    try:
        executor.forward(replace(step((0, 0, np.zeros(len(x)))), inputs=x))
        return executor.hidden.copy()
    finally:
        executor.close()


def bits(x: Array) -> Array:
    return x.view(np.int32)


def inputs(width: int, seed: int = 0) -> Array:
    """Rows with ties, outliers, denormals, zeros of both signs and the ends of f32."""
    x = np.random.default_rng(seed).standard_normal((12, width)).astype(np.float32)
    x[1] = 0
    x[2] = -0.0
    x[3] *= 1e-41
    x[4] *= 1e36
    x[5, 0] = 3.4028235e38
    x[6] = (np.arange(width) - width // 2) / 2
    x[7, 1::3] *= 1000
    x[8] = np.round(x[8] * 16) / 16
    x[9] *= np.float32(2.0**-120)
    x[10, ::2] = -0.0
    return x


# --- gather ------------------------------------------------------------------------------------------------


@backends
@pytest.mark.parametrize("out", [5, 37, 64])
def test_gather_takes_the_columns_of_its_order(load: Callable[[Part], Executor], out: int) -> None:
    order = np.random.default_rng(out).integers(0, 37, out)
    order[:2] = 36, 0
    part = rows_part((Gather(x="x", out="y", order="o"),), 37, out, {"o": order})
    x = inputs(37)
    want = np.array([[row[j] for j in order.tolist()] for row in x.tolist()], np.float32)
    assert np.array_equal(bits(hidden(load, part, x)), bits(want))


@backends
def test_a_permuted_input_and_permuted_columns_are_the_plain_linear(load: Callable[[Part], Executor]) -> None:
    """What GPTQ's act-order needs: W[:, order] @ x[order] = W @ x, exactly on numbers that sum exactly."""
    rng = np.random.default_rng(2)
    w = rng.integers(-9, 9, (32, 48)).astype(np.float32)
    order = rng.permutation(48)
    program = Program(
        ops=(
            Input(out="x"),
            Gather(x="x", out="p", order="o"),
            Linear(x="p", out="y", weight="w"),
            Logits(x="y", weight="eye"),
        ),
        tensors={
            "o": TensorSpec(1, 48, "vector"),
            "w": TensorSpec(32, 48, "matrix"),
            "eye": TensorSpec(32, 32, "head"),
        },
        buffers={"x": 48, "p": 48, "y": 32},
        cache=(),
        vocab_size=32,
        max_context=64,
    )
    weights = {
        "o": vector(order),
        "w": packed(w[:, order], "f32"),
        "eye": packed(np.eye(32, dtype="f4"), "f32"),
    }
    x = rng.integers(-9, 9, (7, 48)).astype(np.float32)
    assert np.array_equal(hidden(load, part_of(program, weights), x), x @ w.T)


@backends
@pytest.mark.parametrize(
    "bad,said", [(37.0, "37.0"), (-1.0, "-1.0"), (2.5, "2.5"), (math.nan, "nan"), (math.inf, "inf")]
)
def test_an_order_out_of_range_is_a_bad_engine(
    bad: float, said: str, load: Callable[[Part], Executor]
) -> None:
    order = np.arange(20.0)
    order[11] = bad
    part = rows_part((Gather(x="x", out="y", order="o"),), 37, 20, {"o": order})
    message = f"tensor 'o' names column {said} at place 11, expected whole numbers below 37"
    with pytest.raises(BadEngineFile, match=message):
        load(part)


# --- round -------------------------------------------------------------------------------------------------


def slow_round(x: float, kind: str, scale: np.float32) -> float:
    """One value, from the numbers of the format themselves: the nearest, of two the one with an even code."""
    if scale == 0:
        return 0.0
    with np.errstate(over="ignore"):
        y = min(float(np.abs(np.float32(x) / scale)), LARGEST[kind])
    if kind == "int8":
        step = 1.0
    else:
        exponent = max(math.frexp(y)[1] - 1, -6) if y else -6
        step = 2.0 ** (exponent - 3)
    return math.copysign(float(np.float32(round(y / step) * step) * scale), x)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scale", [None, 0.01, 3.0, 2.0**-126, 2.0**119])
def test_round_is_its_definition(kind: Any, scale: float | None) -> None:
    x = inputs(37)
    got = numpy_ops.rounded(x, kind, scale)
    for t, row in enumerate(x):
        own = np.float32(max(abs(row))) / np.float32(LARGEST[kind])
        if float(own) * LARGEST[kind] > 3.4028235e38:  # rounded up beyond the end of f32
            own = np.nextafter(own, np.float32(0))
        s = np.float32(scale) if scale is not None else own if own == 0 else max(own, np.float32(2.0**-126))
        for j, v in enumerate(row.tolist()):
            assert got[t, j] == slow_round(v, kind, s), (t, j, v)


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("scale", [None, 0.01, 3.0, 2.0**-126, 2.0**119])
@pytest.mark.parametrize("width", [37, 64])
@pytest.mark.parametrize("out", ["x", "y"])
def test_both_backends_round_to_the_same_bits(kind: Any, scale: float | None, width: int, out: str) -> None:
    ops: tuple[AnyOp, ...] = (Round(x="x", out=out, format=kind, scale=scale),)
    if out == "x":
        ops += (Gather(x="x", out="y", order="o"),)
    part = rows_part(ops, width, width, {"o": np.arange(width)} if out == "x" else {})
    x = inputs(width)
    want = hidden(REFERENCE.load, part, x)
    assert np.array_equal(bits(want), bits(numpy_ops.rounded(x, kind, scale)))
    for name, load in LOADS.items():
        assert np.array_equal(bits(hidden(load, part, x)), bits(want)), name


@pytest.mark.parametrize("kind", FORMATS)
def test_every_number_of_the_format_stays_and_every_midpoint_goes_to_even(kind: Any) -> None:
    fmt = get_format(f"{kind}_row")
    assert fmt.levels is not None
    levels = fmt.levels.astype(np.float32)
    assert np.array_equal(numpy_ops.rounded(levels[None], kind, 1.0)[0], levels)
    middle = (levels[1:] + levels[:-1]) / 2
    part = rows_part((Round(x="x", out="y", format=kind, scale=1.0),), len(middle), len(middle), {})
    got = hidden(LOADS[instruction_sets()[-1]], part, middle[None])[0]
    torch = pytest.importorskip("torch")
    if kind == "fp8_e4m3":
        want = torch.from_numpy(middle).to(torch.float8_e4m3fn).float().numpy()
    else:
        want = torch.round(torch.from_numpy(middle)).numpy()
    assert np.array_equal(got, want)


@backends
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "op",
    [
        Round(x="x", out="y", format="fp8_e4m3"),
        Round(x="x", out="y", format="fp8_e4m3", scale=0.1),
        Round(x="x", out="y", format="int8"),
        Round(x="x", out="y", format="int8", scale=0.1),
        Gather(x="x", out="y", order="o"),
    ],
    ids=["e4m3", "e4m3_static", "int8", "int8_static", "gather"],
)
def test_numbers_that_are_none_are_found(op: AnyOp, value: float, load: Callable[[Part], Executor]) -> None:
    """Also in a column that the order does not choose. A norm's weights bring them."""
    program = Program(
        ops=(
            Embed(out="e", weight="e"),
            Norm(x="e", out="x", weight="n", eps=1e-5),
            op,
            Logits(x="y", weight="h"),
        ),
        tensors={
            "e": TensorSpec(40, 33, "embedding"),
            "n": TensorSpec(1, 33, "vector"),
            "o": TensorSpec(1, 33, "vector"),
            "h": TensorSpec(40, 33, "head"),
        },
        buffers={"e": 33, "x": 33, "y": 33},
        cache=(),
        vocab_size=40,
        max_context=64,
    )
    rows = packed(np.random.default_rng(0).standard_normal((40, 33), dtype=np.float32), "f32")
    shift = np.ones(33)
    weights = {"e": rows, "h": rows, "n": vector(shift), "o": vector(np.zeros(33))}
    executor = load(part_of(program, weights))
    executor.forward(step((0, 0, np.arange(3))))
    executor.close()
    shift[32] = value
    executor = load(part_of(program, weights | {"n": unchecked(shift)}))
    with pytest.raises(NumericError):
        executor.forward(step((0, 0, np.arange(3))))
    executor.close()


# --- in programs -------------------------------------------------------------------------------------------


def with_ops(part: Part) -> Part:
    """The part with a rounding and a permutation, undone by the weights' columns, before every linear."""
    program = part.program
    tensors, weights, ops = dict(program.tensors), dict(part.weights), []
    buffers = dict(program.buffers)
    for i, op in enumerate(program.ops):
        if isinstance(op, Linear):
            width = buffers[op.x]
            name, p = f"{i}.order", f"{i}.p"
            order = np.random.default_rng(i).permutation(width)
            tensors[name], weights[name] = TensorSpec(1, width, "vector"), vector(order)
            buffers[p] = width
            kind: Any = FORMATS[i % 2]
            ops += [Gather(x=op.x, out=p, order=name), Round(x=p, out=p, format=kind), replace_x(op, p)]
        else:
            ops.append(op)
    changed = Program(
        ops=tuple(ops),
        tensors=tensors,
        buffers=buffers,
        cache=program.cache,
        vocab_size=program.vocab_size,
        max_context=program.max_context,
    )
    changed.check()
    return replace(part, program=changed, weights=weights)


def replace_x(op: Linear, x: str) -> Linear:
    return Linear(x=x, out=op.out, weight=op.weight, bias=op.bias)


@pytest.mark.parametrize("fmt", ["f32", "int4_g64"])
def test_a_whole_program_with_them_keeps_the_contract(fmt: str) -> None:
    part = with_ops(llama(fmt))
    text = ids(27)
    want = run(part, step((0, 0, text)))
    for simd in instruction_sets():
        assert np.array_equal(run(part, step((0, 0, text)), threads=3, simd=simd), want)
    executor = CPU.load(part, threads=2)
    pieces = [executor.forward(step((0, i, text[i : i + 4]))).copy() for i in range(0, 27, 4)]
    assert np.array_equal(np.concatenate(pieces), want)
    executor.close()
    near = REFERENCE.load(part).forward(step((0, 0, text)))
    # A value on a rounding edge may land a step apart, of 8 bits.
    assert np.abs(want - near).max() <= 0.1 * np.abs(near).max()


# --- shape rules -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op,message",
    [
        (Gather(x="x", out="x", order="o"), "different buffers"),
        (Gather(x="x", out="y", order="eye"), "expected 1x37"),
        (Gather(x="x", out="y", order="no"), "names tensor 'no'"),
        (Round(x="x", out="y", format="int8"), "differ in width"),
        (Round(x="x", out="x", format="int8", scale=0.0), "scale 0.0 is outside"),
        (Round(x="x", out="x", format="int8", scale=-1.0), "scale -1.0 is outside"),
        (Round(x="x", out="x", format="int8", scale=math.nan), "scale nan is outside"),
        (Round(x="x", out="x", format="int8", scale=1e38), "scale 1e.38 is outside"),
    ],
)
def test_shape_rules_are_named(op: AnyOp, message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        rows_part((op, Gather(x="x", out="y", order="o")), 20, 37, {"o": np.arange(37)})
