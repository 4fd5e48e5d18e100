"""Packings: the byte order of a format's planes for one family of kernels. A packing never changes a value.

rows
    Planes exactly as the format's codec gives them, C order, flattened.

n16k4 (integer formats: kind int) and n16 (float and table formats), for the cpu backend
    Rows are padded to panels of 16 with zero weights, columns to whole units: `U` = the format's group but at
    least 32, or 64 when scales are per row or per tensor or absent. panels = ceil(rows/16), units =
    ceil(cols/U).

    n16k4, planes of codes, i8: [panel][units*U/4][16 rows][4 inputs] bytes, each the code + 128 (unsigned
                            lanes)
    n16k4, planes of codes, c = 2, 4 or 8 codes a byte (u4*, e2m1; u2*; u1):
                            [panel][run][R/(4*c) blocks][16 rows][4 inputs] bytes; a run is R columns, U for
                            u4 and u4o8 and 32 for the others; in block b of a run the p-th lowest code of a
                            byte is that of input 4*b + i + p*R/c of the run. A padding code is that of value
                            0 (the offset of u*o*, the zero point of its group, 0 in padding rows and groups);
                            0 in formats with minima, where activations are 0.
    n16, plane q/w, 8..32 bit: [panel][units*U inputs][16 rows] items; padding is 0.
    n16, nibble (nf4):      [panel][unit][U/2][16 rows] bytes; low nibble input j of the unit, high j + U/2.
                            A padding code is 7 (the table's zero).
m16 (all but f32 and formats with outlier columns), for the cuda backend
    Rows are padded to panels of 16, columns to units of 64 or the group; padding codes and what they share
    are 0. Planes of codes: [panel][units*U/C chunks][chunk] in the order of engine/mma_order.py, C columns a
    chunk. Planes that every n weights share: [panel][runs][8 rows r][r, r + 8][items of a run], with runs of
    max(U, n) columns, the last one whole. The others as below.

    planes that weights share (scale, zero, min, super, outlier): every n weights [panel][ceil(units*U/n)][16
                            rows]; per row [panel][16 rows]; per tensor [1]; shared by all rows (index)
                            [ceil(cols/n)]. Padding rows and groups hold 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine import mma_order
from edge_runtime.engine.formats import ENCODINGS, Array, Format, Plane, Planes, get_format
from edge_runtime.engine.formats.codes import pack_bits, unpack_bits
from edge_runtime.errors import BadConfig, Unsupported, ValueOutOfRange, nearest

PANEL = 16  # rows of one panel
LANE = 4  # inputs of one 32-bit lane
DEFAULT_GROUP = 64  # columns are padded to it when a format has no groups
SMALLEST_UNIT = 32  # columns that a byte of eight codes and four inputs a lane take
_UNIT_RUNS = ("u4", "u4o8", "nf4")  # whose bytes hold inputs of a whole unit
ALIGN = 64  # bytes each plane is padded to in an engine
PACKINGS = ("rows", "n16", "n16k4", "m16")
_CHUNK = 1 << 19  # weights moved at a time

# Code of value 0 by the encoding of the lower bits, higher bits included; 0 for every other encoding.
_PADDING_CODE = {"u2o2": 2, "u2o4": 4, "u4o8": 8, "u4o16": 16, "u4o32": 32, "nf4": 7}


def cpu_packing(fmt_name: str) -> str:
    """The packing that the cpu backend reads for a format: n16k4 for integers, n16 for the rest."""
    return "n16k4" if get_format(fmt_name).kind == "int" else "n16"


def cuda_packing(fmt_name: str) -> str:
    """The packing that the cuda backend reads for a format: m16, or rows where it has no kernel."""
    return "m16" if mma_order.has_order(get_format(fmt_name)) else "rows"


def backend_packing(backend: str, fmt_name: str) -> str:
    """The packing that a backend reads for a format's matrices."""
    return cuda_packing(fmt_name) if backend == "cuda" else cpu_packing(fmt_name)


def unit_of(fmt: Format) -> int:
    """Columns that a packed row is padded to a multiple of, in the packings of the cpu backend."""
    return max(fmt.group or DEFAULT_GROUP, SMALLEST_UNIT)


def unit_in(packing: str, fmt: Format) -> int:
    """Columns that a packed row is padded to a multiple of."""
    return max(fmt.group or 0, mma_order.UNIT) if packing == "m16" else unit_of(fmt)


def plane_items(fmt_name: str, packing: str, rows: int, cols: int) -> dict[str, tuple[int, str]]:
    """Items and numpy dtype of each packed plane. Raises BadConfig on an unknown packing, Unsupported on one
    that the format does not have.
    """
    fmt = _checked(fmt_name, packing)
    items: dict[str, tuple[int, str]] = {}
    grid = _Grid.of(fmt, packing, rows, cols)
    for plane in fmt.planes:
        encoding = ENCODINGS[plane.encoding]
        if packing == "rows":
            r, c = plane.shape(rows, cols)
            items[plane.name] = (r * c, encoding.dtype)
        elif plane.per == 1:
            codes = grid.panels * PANEL * grid.width
            dtype = "u1" if encoding.name == "i8" and packing != "m16" else encoding.dtype
            items[plane.name] = (codes // encoding.items_per_byte, dtype)
        else:
            items[plane.name] = (grid.shared_items(plane), encoding.dtype)
    return items


def packed_nbytes(fmt_name: str, packing: str, rows: int, cols: int) -> int:
    """Bytes of a packed tensor in an engine, each plane rounded up to 64."""
    planes = plane_items(fmt_name, packing, rows, cols).values()
    return sum(-(-n * np.dtype(dtype).itemsize // ALIGN) * ALIGN for n, dtype in planes)


def pack(fmt_name: str, packing: str, planes: Planes, rows: int, cols: int) -> dict[str, Array]:
    """Codec planes, 2-D, to packed planes, 1-D. Raises ValueOutOfRange on a plane of wrong shape or dtype."""
    fmt = _checked(fmt_name, packing)
    fmt.check_planes(planes, rows, cols)
    if packing == "rows":
        return {p.name: np.ascontiguousarray(planes[p.name]).reshape(-1) for p in fmt.planes}
    grid = _Grid.of(fmt, packing, rows, cols)
    return {
        p.name: _pack_codes(fmt, p, planes, grid) if p.per == 1 else _pack_shared(p, planes[p.name], grid)
        for p in fmt.planes
    }


def unpack(
    fmt_name: str, packing: str, packed: Mapping[str, Array], rows: int, cols: int
) -> dict[str, Array]:
    """Packed planes, 1-D, to codec planes, 2-D. Raises ValueOutOfRange on a plane of wrong size or dtype."""
    fmt = _checked(fmt_name, packing)
    for name, (count, dtype) in plane_items(fmt_name, packing, rows, cols).items():
        got = packed.get(name)
        if got is None or got.shape != (count,) or got.dtype != np.dtype(dtype):
            found = "is missing" if got is None else f"is {got.dtype} {got.shape}"
            raise ValueOutOfRange(
                f"{fmt_name} in {packing}: plane {name!r} {found}, expected {np.dtype(dtype)} ({count},)"
            )
    if packing == "rows":
        return {p.name: packed[p.name].reshape(p.shape(rows, cols)) for p in fmt.planes}
    grid = _Grid.of(fmt, packing, rows, cols)
    return {
        p.name: _unpack_codes(p, packed[p.name], grid)
        if p.per == 1
        else _unpack_shared(p, packed[p.name], grid)
        for p in fmt.planes
    }


def _checked(fmt_name: str, packing: str) -> Format:
    fmt = get_format(fmt_name)
    if packing not in PACKINGS:
        raise BadConfig(f"unknown packing {packing!r}; {nearest(packing, PACKINGS)}")
    known = dict.fromkeys(("rows", cpu_packing(fmt_name), cuda_packing(fmt_name)))
    if packing not in known:
        raise Unsupported(f"{fmt_name} has no packing {packing!r}; use {' or '.join(known)}")
    return fmt


@dataclass(frozen=True)
class _Grid:
    """A matrix cut into panels of 16 rows and whole units of columns."""

    rows: int
    cols: int
    unit: int
    panels: int
    units: int
    packing: str

    @classmethod
    def of(cls, fmt: Format, packing: str, rows: int, cols: int) -> _Grid:
        unit = unit_in(packing, fmt)
        return cls(rows, cols, unit, -(-rows // PANEL), -(-cols // unit), packing)

    @property
    def width(self) -> int:
        """Columns with padding."""
        return self.units * self.unit

    def shared_items(self, plane: Plane) -> int:
        if plane.whole:
            return plane.shape(1, self.cols)[1]
        return self.panels * PANEL * self.shared_cols(plane)

    def shared_cols(self, plane: Plane) -> int:
        """Items of a row of a plane that weights of a row share, with padding."""
        return 1 if plane.per == "row" else -(-self.width // int(plane.per))

    def run(self, plane: Plane) -> int:
        """Items of a row of such a plane that lie together for each unit."""
        fragments = self.packing == "m16" and plane.per != "row"
        return max(1, self.unit // int(plane.per)) if fragments else 0

    def chunks(self) -> list[tuple[slice, slice]]:
        """(panels, rows) slices of about _CHUNK weights; rows end at the matrix' last one."""
        step = max(1, _CHUNK // (PANEL * self.width))
        starts = range(0, self.panels, step)
        ends = (min(s + step, self.panels) for s in starts)
        return [
            (slice(s, e), slice(s * PANEL, min(e * PANEL, self.rows)))
            for s, e in zip(starts, ends, strict=True)
        ]


def _pack_codes(fmt: Format, plane: Plane, planes: Planes, grid: _Grid) -> Array:
    """Plane of codes -> 1-D, in the order that its encoding has (see the module's docstring)."""
    bits = ENCODINGS[plane.encoding].bits
    order = _order(plane, grid)
    source = planes[plane.name]
    width = grid.width
    per_panel = PANEL * width // ENCODINGS[plane.encoding].items_per_byte
    fragments = grid.packing == "m16"
    unsigned = plane.encoding == "i8" and not fragments
    out = np.empty(grid.panels * per_panel, "u1" if unsigned else source.dtype)
    below = 0 if plane == fmt.codes[0] else ENCODINGS[fmt.codes[0].encoding].bits  # bits of the plane before
    padding = 0 if fragments else _PADDING_CODE.get(fmt.codes[0].encoding, 0) >> below
    for panels, r in grid.chunks():
        count = panels.stop - panels.start
        codes = unpack_bits(source[r], bits, grid.cols) if bits < 8 else source[r]
        full = np.full((count * PANEL, width), padding & ((1 << bits) - 1), codes.dtype)
        full[: codes.shape[0], : grid.cols] = codes
        if "zero" in planes and width > grid.cols and not fragments:
            zero = planes["zero"][r, -1:] >> np.uint8(below)
            full[: codes.shape[0], grid.cols :] = zero & np.uint8((1 << bits) - 1)
        out[panels.start * per_panel : panels.stop * per_panel] = order.forth(full)
    return out


def _unpack_codes(plane: Plane, packed: Array, grid: _Grid) -> Array:
    encoding = ENCODINGS[plane.encoding]
    order = _order(plane, grid)
    out = np.empty(plane.shape(grid.rows, grid.cols), encoding.dtype)
    per_panel = packed.size // grid.panels
    for panels, r in grid.chunks():
        codes = order.back(packed[panels.start * per_panel : panels.stop * per_panel])
        codes = codes[: r.stop - r.start, : grid.cols]
        out[r] = pack_bits(codes, encoding.bits) if encoding.bits < 8 else codes
    return out


def _pack_shared(plane: Plane, source: Array, grid: _Grid) -> Array:
    """Scales and the like (rows, n), padded with 0, -> 1-D in the order that the packing has."""
    if plane.whole:
        return source.reshape(-1)
    full = np.zeros((grid.panels * PANEL, grid.shared_cols(plane)), source.dtype)
    full[: grid.rows, : source.shape[1]] = source
    if run := grid.run(plane):
        return mma_order.to_runs(full, run)
    return np.ascontiguousarray(full.reshape(grid.panels, PANEL, -1).transpose(0, 2, 1)).reshape(-1)


def _unpack_shared(plane: Plane, packed: Array, grid: _Grid) -> Array:
    if plane.whole:
        return packed.reshape(1, -1)
    if run := grid.run(plane):
        full = mma_order.from_runs(packed, run, grid.shared_cols(plane))
    else:
        full = packed.reshape(grid.panels, -1, PANEL).transpose(0, 2, 1).reshape(grid.panels * PANEL, -1)
    return np.ascontiguousarray(full[: grid.rows, : plane.shape(grid.rows, grid.cols)[1]])


@dataclass(frozen=True)
class _Order:
    """The permutation of a chunk of codes, (panels*16, units*U) <-> 1-D, both ways."""

    forth: Callable[[Array], Array]
    back: Callable[[Array], Array]


def _order(plane: Plane, grid: _Grid) -> _Order:
    bits = ENCODINGS[plane.encoding].bits
    if grid.packing == "m16":
        return _fragment_order(plane.encoding, grid)
    if bits < 8:
        run = grid.unit if plane.encoding in _UNIT_RUNS else SMALLEST_UNIT
        return _shared_byte_order(grid, run, bits, LANE if plane.encoding != "nf4" else 1)
    return _lane_order(grid) if plane.encoding == "i8" else _input_order(grid)


def _fragment_order(encoding: str, grid: _Grid) -> _Order:
    """Codes in chunks of a warp's fragments; those that share a byte from its lowest bits up."""
    bits = ENCODINGS[encoding].bits

    def forth(codes: Array) -> Array:
        stored = mma_order.to_chunks(codes, encoding)
        return pack_bits(stored[None], bits)[0] if bits < 8 else stored

    def back(packed: Array) -> Array:
        stored = unpack_bits(packed[None], bits, packed.size * 8 // bits)[0] if bits < 8 else packed
        return mma_order.from_chunks(stored, encoding, grid.width)

    return _Order(forth, back)


def _shared_byte_order(grid: _Grid, run: int, bits: int, lane: int) -> _Order:
    """The lowest codes of a run's bytes are its first inputs, the next ones follow; `lane` inputs of a row
    together."""
    item = np.dtype("<u4" if lane == LANE else "u1")  # codes are small, so that shifts keep to their bytes
    mask = item.type(((1 << bits) - 1) * (0x01010101 & ((1 << 8 * item.itemsize) - 1)))
    count = 8 // bits
    part, runs = run // count // lane, grid.width // run

    def forth(codes: Array) -> Array:
        c = codes.view(item).reshape(-1, PANEL, runs, count, part)
        joined = c[:, :, :, 0].copy()
        for p in range(1, count):
            joined |= c[:, :, :, p] << item.type(bits * p)
        return np.ascontiguousarray(joined.transpose(0, 2, 3, 1)).view(np.uint8).reshape(-1)

    def back(packed: Array) -> Array:
        b = packed.view(item).reshape(-1, runs, part, PANEL).transpose(0, 3, 1, 2)
        codes = np.empty((b.shape[0], PANEL, runs, count, part), item)
        for p in range(count):
            np.bitwise_and(b >> item.type(bits * p), mask, out=codes[:, :, :, p])
        return codes.view(np.uint8).reshape(b.shape[0] * PANEL, -1)

    return _Order(forth, back)


def _lane_order(grid: _Grid) -> _Order:
    """i8 codes as unsigned bytes (code + 128), four inputs of a row in a 32-bit lane."""
    flip = np.uint8(128)

    def forth(codes: Array) -> Array:
        lanes = (codes.view(np.uint8) ^ flip).view("<u4").reshape(-1, PANEL, grid.width // LANE)
        return np.ascontiguousarray(lanes.transpose(0, 2, 1)).view(np.uint8).reshape(-1)

    def back(packed: Array) -> Array:
        lanes = packed.view("<u4").reshape(-1, grid.width // LANE, PANEL)
        codes: Array = np.ascontiguousarray(lanes.transpose(0, 2, 1)).view(np.uint8) ^ flip
        return codes.view(np.int8).reshape(-1, grid.width)

    return _Order(forth, back)


def _input_order(grid: _Grid) -> _Order:
    """One item per weight, the 16 rows of an input together."""
    width = grid.width

    def forth(codes: Array) -> Array:
        return np.ascontiguousarray(codes.reshape(-1, PANEL, width).transpose(0, 2, 1)).reshape(-1)

    def back(packed: Array) -> Array:
        items = packed.reshape(-1, width, PANEL).transpose(0, 2, 1)
        return np.ascontiguousarray(items).reshape(-1, width)

    return _Order(forth, back)
