"""LLM.int8() on the cpu backend: what it is for, which codes matrices share, and a bad index."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from cpu_programs import Array, decoded, instruction_sets, linear_part, packed, part_of, run, step

from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.protocol import Backend, PackedTensor
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine import packing
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.ops import Add, Input, Linear, Logits
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.errors import BadEngineFile, NumericError

if not CPU.available().ok:
    pytest.skip(CPU.available().why, allow_module_level=True)

NAME = "int8_row_o128"
LARGE = [3, 130, 301]  # input channels that are 60 times larger


def with_columns(values: Array, columns: list[int]) -> PackedTensor:
    """A matrix whose columns `columns` are held apart, as an algorithm that knows the inputs asks for."""
    rows, cols = values.shape
    fmt = get_format(NAME)
    slots = -(-cols // 128)
    index = np.full((1, slots), -1, np.int32)
    index[0, : len(columns)] = columns
    rest = np.delete(values, columns, axis=1)
    assert fmt.grid_for is not None
    grid = fmt.grid_for(rest.min(axis=1, keepdims=True), rest.max(axis=1, keepdims=True))
    planes = fmt.encode_on_grid(values, grid | {"index": index})
    return PackedTensor(rows, cols, NAME, "n16k4", packing.pack(NAME, "n16k4", planes, rows, cols))


def weights(rows: int, cols: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((rows, cols)).astype(np.float32)


def inputs(tokens: int, cols: int) -> Array:
    x = np.random.default_rng(9).standard_normal((tokens, cols)).astype(np.float32)
    x[:, LARGE] *= 60
    return x


def outputs(w: PackedTensor, x: Array, simd: str = "auto") -> Array:
    return run(linear_part(w, x, None), step((0, 0, np.arange(len(x)))), simd=simd)


@pytest.mark.parametrize("simd", instruction_sets())
def test_large_input_channels_spoil_int8_row_and_not_this(simd: str) -> None:
    """Dettmers et al. 2022, section 3: most of the error comes from the codes of a few large features."""
    w, x = weights(48, 384), inputs(14, 384)
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    plain = outputs(packed(w, "int8_row"), x, simd)
    apart = outputs(with_columns(w, LARGE), x, simd)
    errors = [np.sqrt(np.mean((y - exact) ** 2)) for y in (plain, apart)]
    assert errors[1] < errors[0] / 8
    # Without large inputs it has no advantage, or this test would show another effect.
    x[:, LARGE] /= 60
    exact = x.astype(np.float64) @ w.astype(np.float64).T
    both = packed(w, "int8_row"), with_columns(w, LARGE)
    errors = [np.sqrt(np.mean((outputs(t, x, simd) - exact) ** 2)) for t in both]
    assert errors[0] / 1.5 < errors[1] < errors[0] * 1.5


@pytest.mark.parametrize("columns", [[], [0], [383], [63, 64, 65], [127, 128, 255]])
@pytest.mark.parametrize("tokens", [1, 3, 4, 8, 15])
def test_any_columns_and_any_number_of_tokens(columns: list[int], tokens: int) -> None:
    w, x = weights(48, 384, 1), inputs(tokens, 384)
    t = with_columns(w, columns)
    got = outputs(t, x)
    alone = [outputs(t, x[i : i + 1])[0] for i in range(tokens)]
    assert np.array_equal(got, np.stack(alone))
    for simd in instruction_sets():
        assert np.array_equal(outputs(t, x, simd), got), simd
    exact_w = decoded(t).astype(np.float64)
    kept = x.astype(np.float64)
    kept[:, columns] = 0
    groups = np.abs(kept.reshape(tokens, -1, 64)).max(axis=2) / 254
    coded = exact_w.copy()
    coded[:, columns] = 0
    limit = np.repeat(groups, 64, axis=1) @ np.abs(coded).T
    size = np.abs(x.astype(np.float64)) @ np.abs(exact_w).T
    assert (np.abs(got - x.astype(np.float64) @ exact_w.T) <= limit * 1.001 + size * 1e-6).all()


@pytest.mark.parametrize("threads", [1, 3])
def test_matrices_share_codes_only_with_the_same_columns(threads: int) -> None:
    """Linears in a row that read one buffer give what each gives alone, whatever the others leave out."""
    cols, rows = 384, 48
    kinds: list[list[int] | None] = [[3, 130], [3, 130], [5], None, [], [3, 130]]  # None: int8_row
    matrices = [
        packed(weights(rows, cols, i), "int8_row") if c is None else with_columns(weights(rows, cols, i), c)
        for i, c in enumerate(kinds)
    ]
    names = [f"w{i}" for i in range(len(kinds))]
    sums = [Add(a="y0", b=f"y{i}", out="y0", scale=float(2**i)) for i in range(1, len(kinds))]
    program = Program(
        ops=(
            Input(out="x"),
            *(Linear(x="x", out=f"y{i}", weight=n) for i, n in enumerate(names)),
            *sums,
            Logits(x="y0", weight="eye"),
        ),
        tensors={n: TensorSpec(rows, cols, "matrix") for n in names}
        | {"eye": TensorSpec(rows, rows, "head")},
        buffers={"x": cols, **{f"y{i}": rows for i in range(len(kinds))}},
        cache=(),
        vocab_size=rows,
        max_context=64,
    )
    planes = dict(zip(names, matrices, strict=True)) | {"eye": packed(np.eye(rows, dtype=np.float32), "f32")}
    x = inputs(11, cols)
    batch = replace(step((0, 0, np.zeros(11))), inputs=x)
    executor = CPU.load(part_of(program, planes), threads=threads)
    got = executor.forward(batch).copy()
    executor.close()
    want = outputs(matrices[0], x)
    for i, matrix in enumerate(matrices[1:], 1):
        want = want + np.float32(2**i) * outputs(matrix, x)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("where", [3, 4])  # a column apart, and one among the codes
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_input_that_is_no_number_is_found_in_either_part(where: int, value: float) -> None:
    x = inputs(2, 384)
    x[1, where] = value
    part = linear_part(with_columns(weights(48, 384), LARGE), np.zeros((2, 384), np.float32), None)
    table = part.weights["x"].planes["w"].reshape(-1, 384, 16).copy()
    table[0, where, 1] = value
    spoiled = replace(part.weights["x"], planes={"w": table.reshape(-1)})
    executor = CPU.load(replace(part, weights={**part.weights, "x": spoiled}))
    with pytest.raises(NumericError):
        executor.forward(step((0, 0, np.arange(2))))
    executor.close()


@pytest.mark.parametrize("backend", [CPU, REFERENCE], ids=["cpu", "reference"])
@pytest.mark.parametrize(
    "index,message",
    [
        ([3, 384, -1], r"names columns 3\.\.384, expected numbers below 384"),
        ([-7, 1, 2], r"names columns -7\.\.2"),
        ([5, 5, -1], "not ascending"),
        ([-1, 5, 9], "not ascending"),
    ],
)
def test_a_bad_index_is_a_bad_engine(index: list[int], message: str, backend: Any) -> None:
    good = with_columns(weights(48, 384), LARGE)
    bad = replace(good, planes={**good.planes, "index": np.array(index, np.int32)})
    checked: Backend = backend
    with pytest.raises(BadEngineFile, match="tensor 'w': .*" + message):
        checked.load(linear_part(bad, inputs(1, 384), None))
