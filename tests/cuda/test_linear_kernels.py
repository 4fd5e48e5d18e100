"""Matrix kernels in the emulator, every format: against f64 products of decoded weights, and bit for bit."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from emulation import Emulated, Guarded, compile_kernels, guarded

from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.device_code import (
    SPLIT_BLOCKS,
    TILE_TOKENS,
    TOKEN_BLOCK,
    MatrixKernels,
    has_kernels,
    matrix_kernels,
    source,
)
from edge_runtime.engine.formats import ENCODINGS, FORMATS, Array, Format, get_format
from edge_runtime.engine.formats.codes import pack_bits
from edge_runtime.engine.packing import pack

NAMES = sorted(name for name in FORMATS if has_kernels(name))
INTEGER = [name for name in NAMES if matrix_kernels(name).kind.startswith("int")]
SPANS = 8  # kSpans of linear.cuh
FIELDS = {  # of rec.Matrix, by plane
    "high": "high",
    "scale": "scale",
    "scale_min": "scale",
    "zero": "shift",
    "min": "shift",
    "scale2": "second",
    "super": "second",
    "super_min": "super_min",
    "offset": "offset",
}
SHAPES = ((33, 70), (16, 64), (5, 520), (130, 1100))  # rows, columns


@lru_cache(maxsize=1)
def library() -> Emulated:
    kernels = [k for name in NAMES for k in _all(matrix_kernels(name))]
    return Emulated(compile_kernels(source(kernels)))


def _all(kernels: MatrixKernels) -> list[Any]:
    return [*kernels.split.values(), kernels.deep, kernels.tile, kernels.embed]


def scattered(fmt: Format, planes: dict[str, Array], shape: tuple[int, int], seed: int) -> dict[str, Array]:
    """Planes with any codes, and any whole numbers that stand for scales and minima."""
    rng, made = np.random.default_rng(seed), dict(planes)
    for plane in fmt.planes:
        bits = ENCODINGS[plane.encoding].bits
        whole = fmt.plane("super") is not None and plane.encoding in ("i8", "u8", "u4u4")
        if plane.per == 1 and bits < 8:
            made[plane.name] = pack_bits(rng.integers(0, 1 << bits, shape, dtype=np.uint8), bits)
        elif whole:
            data = rng.integers(0, 256, planes[plane.name].shape, dtype=np.uint8)
            made[plane.name] = data.view(planes[plane.name].dtype)
    return made


class Case:
    """A matrix in a format and inputs of `tokens` rows, as the kernels get them; scattered: any codes."""

    def __init__(
        self, name: str, rows: int, cols: int, tokens: int, seed: int = 0, *, scatter: bool = False
    ) -> None:
        rng = np.random.default_rng(seed)
        self._memory: dict[int, tuple[Array, Guarded]] = {}
        self.kernels = matrix_kernels(name)
        self.rows, self.cols, self.tokens = rows, cols, tokens
        fmt = get_format(name)
        planes = fmt.encode((rng.standard_normal((rows, cols)) * 0.1).astype(np.float32))
        self.planes = scattered(fmt, planes, (rows, cols), seed) if scatter else planes
        self.weights = fmt.decode(self.planes, rows, cols)
        self.packed = pack(name, "m16", self.planes, rows, cols)
        x = rng.standard_normal((tokens, cols)).astype(np.float32) * rng.uniform(0.1, 9, (tokens, 1))
        self.prepare(x.astype(np.float32))
        self.bias = rng.standard_normal(rows).astype(np.float32)
        self.add = rng.standard_normal((tokens, rows)).astype(np.float32)

    def at(self, array: Array) -> int:
        """Address of a guarded copy of an array, made once."""
        if id(array) not in self._memory:
            self._memory[id(array)] = array, Guarded.of(array)
        return self._memory[id(array)][1].address

    def prepare(self, x: Array) -> None:
        """Inputs by a slow reading of prepare.cuh's contract; `inputs` are their exact values, f64."""
        width = -(-self.cols // self.kernels.unit) * self.kernels.unit
        blocks = -(-self.tokens // TILE_TOKENS) * (TILE_TOKENS // TOKEN_BLOCK)
        full = np.zeros((blocks * TOKEN_BLOCK, width), np.float32)
        full[: self.tokens, : self.cols] = x
        kind = self.kernels.kind
        if kind.startswith("int"):
            group = int(kind[3:])
            cut = full.reshape(len(full), -1, group)
            scale = np.abs(cut).max(axis=2) / np.float32(127)
            codes = np.rint(cut / np.where(scale > 0, scale, np.inf)[..., None]).astype(np.int8)
            self.input_codes, self.input_scales = codes, scale
            self.sums = _by_block(codes.astype(np.int32).sum(axis=2, dtype=np.int32))
            self.scales = _by_block(scale)
            self.inputs = (codes * scale[..., None].astype(np.float64)).reshape(len(full), width)
            stored = codes.reshape(len(full), -1, 2, 2, 4, 4)  # chunk, m, h, q, i
            order = stored.transpose(0, 1, 4, 2, 3, 5)
        else:
            top = np.abs(full).max(axis=1, keepdims=True)
            scale = np.exp2(np.floor(np.log2(np.where(top > 0, top, 1)))).astype(np.float32)
            if kind == "bfloat":
                scale[:] = 1
                bits = full.view(np.uint32)
                items = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
                values = (items.astype(np.uint32) << 16).view(np.float32)
            else:
                half = (full / scale).astype(np.float16)
                items, values = half.view(np.uint16), half.astype(np.float32)
            self.sums = np.zeros(1, np.int32)
            self.scales = _by_block(scale)
            self.inputs = values * scale.astype(np.float64)
            stored = items.reshape(len(full), -1, 2, 2, 4, 2)  # chunk, m, h, q, i
            order = stored.transpose(0, 1, 4, 2, 3, 5)
        flat = np.ascontiguousarray(order).reshape(blocks, TOKEN_BLOCK, -1, 64 // order.itemsize)
        self.codes = np.ascontiguousarray(flat.transpose(0, 2, 1, 3))
        self.chunks = self.codes.shape[1]
        self.groups = self.scales.shape[1]
        self.units = width // self.kernels.unit

    def run(self, symbol: str, grid: tuple[int, int], count: int, *, add: bool = False) -> Array:
        """The outputs (tokens, rows) that a kernel gives for the first `count` tokens; NaN elsewhere."""
        counts = Guarded.of(np.array([count] * rec.COUNTS, np.int32))
        out = guarded(self.tokens * self.rows * 4)
        out.view(np.float32, (self.tokens, self.rows))[:] = np.nan
        record = rec.Linear(
            step=rec.Step(counts=counts.address),
            inputs=rec.Inputs(
                self.at(self.codes),
                self.at(self.scales),
                self.at(self.sums),
                self.chunks,
                self.groups,
            ),
            count=1,
            units=self.units,
            row_count=rec.TOKENS,
        )
        record.matrix[0] = self.matrix(out.address)
        if add:
            record.matrix[0].add = self.at(self.add)
            record.matrix[0].add_scale = 0.5
            record.matrix[0].bias = self.at(self.bias)
        library().launch(symbol, grid, record)
        out.check()
        return np.array(out.view(np.float32, (self.tokens, self.rows)))

    def matrix(self, out: int) -> rec.Matrix:
        planes = {"codes": self.at(next(iter(self.packed.values())))}
        planes |= {FIELDS[name]: self.at(a) for name, a in self.packed.items() if name in FIELDS}
        return rec.Matrix(**planes, out=out, scale_all=1.0, rows=self.rows, stride=self.rows)

    def split(self, blocks: int, count: int, **more: bool) -> Array:
        grid = (-(-self.rows // 16), -(-self.tokens // (TOKEN_BLOCK * blocks)))
        return self.run(self.kernels.split[blocks].symbol, grid, count, **more)

    def deep(self, count: int) -> Array:
        grid = (-(-self.rows // 16), -(-self.tokens // TOKEN_BLOCK))
        return self.run(self.kernels.deep.symbol, grid, count)

    def tile(self, count: int, **more: bool) -> Array:
        panels = -(-self.rows // 16)
        grid = (-(-panels // self.kernels.tile_panels), -(-self.tokens // TILE_TOKENS))
        return self.run(self.kernels.tile.symbol, grid, count, **more)

    def wanted(self) -> tuple[Array, Array]:
        """Exact outputs (tokens, rows), f64, and the bound of a kernel's distance from them.

        Sums of n terms in f32 are off by less than n * 2^-24 of the terms' sizes (Higham 2002, 4.2); table
        values and folded scales are rounded to f16, 2^-12 of each term at most.
        """
        x = self.inputs[: self.tokens, : self.cols]
        exact = x @ self.weights.T.astype(np.float64)
        sizes = np.abs(x) @ np.abs(self.weights.T.astype(np.float64))
        table = self.kernels.tile.symbol.endswith(("nf4_g64", "nf4_g64_dq", "nf4_g64_f32"))
        terms = 16 + self.cols
        return exact, sizes * (terms * 2.0**-24 + (2.0**-11 if table else 0)) + 1e-30


def _by_block(values: Array) -> Array:
    """(tokens, groups) -> [block][group][8 tokens]"""
    return np.ascontiguousarray(values.reshape(-1, TOKEN_BLOCK, values.shape[1]).transpose(0, 2, 1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_those_of_the_decoded_weights(name: str, shape: tuple[int, int]) -> None:
    case = Case(name, *shape, tokens=7)
    exact, bound = case.wanted()
    got = case.split(1, 7)
    assert (np.abs(got - exact) <= bound).all(), np.max(np.abs(got - exact) / bound)


@pytest.mark.parametrize("name", NAMES)
def test_every_kernel_gives_a_token_the_same_bits(name: str) -> None:
    case = Case(name, 70, 600, tokens=70)
    whole = case.tile(70)
    exact, bound = case.wanted()
    assert (np.abs(whole - exact) <= bound).all()
    for blocks in SPLIT_BLOCKS:
        assert case.split(blocks, 70).tobytes() == whole.tobytes()
    assert case.deep(70).tobytes() == whole.tobytes()
    for count in (1, 3, 8, 9, 33, 69):
        for got in (case.split(1, count), case.split(4, count), case.tile(count)):
            assert got[:count].tobytes() == whole[:count].tobytes()
            assert np.isnan(got[count:]).all()


def in_order(case: Case, fmt: Format) -> Array:
    """Outputs (tokens, rows) of an integer format by a slow reading of the order in linear.cuh: f32."""
    group, unit = int(case.kernels.kind[3:]), case.kernels.unit
    assert fmt.affine is not None
    scale, shift = (a.astype(np.float64) for a in fmt.affine(case.planes))  # (rows, groups or 1)
    groups = case.units * unit // group
    if fmt.plane("zero") is not None:
        shift = np.zeros_like(scale)  # codes are those less their zero points
    wide = [np.repeat(a, group, axis=1)[:, : case.cols] if fmt.group else a for a in (scale, shift)]
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = np.where(wide[0] == 0, 0, np.rint((case.weights - wide[1]) / wide[0]))
    codes = np.zeros((case.rows, groups * group), np.int64)
    codes[:, : case.cols] = whole
    inputs = case.input_codes[: case.tokens].astype(np.int64)  # (tokens, groups, group)
    dots = np.einsum("tgi,rgi->gtr", inputs, codes.reshape(case.rows, groups, group))
    sums, by = inputs.sum(axis=2), case.input_scales[: case.tokens].astype(np.float32)
    total = np.zeros((case.tokens, case.rows), np.float32)
    own = -(-case.units // SPANS) * (unit // group)  # groups of a span
    for first in range(0, groups, own):
        acc = np.zeros_like(total)
        for g in range(first, min(first + own, groups)):
            if not fmt.group:
                acc = _fma(dots[g], by[:, g, None], acc)
                continue
            at = min(g, scale.shape[1] - 1)  # codes beyond the last group are 0, and so are inputs
            acc = _fma(dots[g], by[:, g, None] * scale[:, at].astype(np.float32), acc)
            if fmt.plane("min") is not None or fmt.plane("scale_min") is not None:
                acc = _fma((sums[:, g].astype(np.float32) * by[:, g])[:, None], shift[:, at], acc)
        total = total + acc
    return total if fmt.group else total * scale[:, 0].astype(np.float32)


def _fma(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of f32, rounded once (but for sums that f64 rounds to a middle: one in 2^29)."""
    return (a.astype(np.float64) * b + c).astype(np.float32)


@pytest.mark.parametrize("name", INTEGER)
def test_sums_are_in_the_stated_order(name: str) -> None:
    """Bit for bit, with any codes and any whole numbers of k-quants."""
    case = Case(name, 20, 1100, tokens=5, seed=3, scatter=True)
    got = case.split(1, 5)
    assert np.isfinite(got).all() and got.tobytes() == in_order(case, get_format(name)).tobytes()


@pytest.mark.parametrize("name", ["int4_g64", "q4_k", "f16"])
def test_bias_and_residual(name: str) -> None:
    case = Case(name, 40, 128, tokens=9)
    plain = case.split(2, 9)
    want = case.add + np.float32(0.5) * (plain + case.bias)
    for got in (case.split(1, 9, add=True), case.tile(9, add=True)):
        assert got.tobytes() == want.astype(np.float32).tobytes()


@pytest.mark.parametrize("scatter", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_embedding_rows_are_the_codec_s(name: str, scatter: bool) -> None:
    case = Case(name, 37, 200, tokens=5, scatter=scatter)
    tokens = np.array([36, 0, 17, 8, 3], np.int32)
    counts, ids = Guarded.of(np.array([4] * rec.COUNTS, np.int32)), Guarded.of(tokens)
    out = guarded(5 * 200 * 4)
    rows = out.view(np.float32, (5, 200))
    rows[:] = np.nan
    record = rec.Embed(
        step=rec.Step(counts=counts.address, tokens=ids.address),
        matrix=case.matrix(0),
        out=out.address,
        cols=200,
        units=case.units,
        scale=1.0,
    )
    library().launch(case.kernels.embed.symbol, 5, record)
    out.check()
    assert rows[:4].tobytes() == case.weights[tokens[:4]].tobytes()
    assert np.isnan(rows[4]).all()


def test_records_have_the_kernels_sizes() -> None:
    kernels = matrix_kernels("int4_g64")
    assert library().record_bytes(kernels.tile.symbol) == ctypes.sizeof(rec.Linear)
    assert library().record_bytes(kernels.embed.symbol) == ctypes.sizeof(rec.Embed)
