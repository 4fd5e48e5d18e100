"""Packings: the byte order of a format's planes for one family of kernels. A packing never changes a value.

rows
    Planes exactly as the format's codec gives them, C order, flattened.

n16k4 (integer formats: encodings u4o8, u4, i8) and n16 (float and table formats), for the cpu backend
    Rows are padded to panels of 16 with zero weights, columns to whole groups: `G` = the format's group, or
    64 when scales are per row or per tensor or absent. panels = ceil(rows/16), groups = ceil(cols/G).

    n16k4, plane q, i8:     [panel][groups*G/4][16 rows][4 inputs] bytes, each the code + 128 (unsigned lanes)
    n16k4, plane q, nibble: [panel][group][G/8 blocks][16 rows][4 inputs] bytes; with block b of a group, the
                            low nibble is input 4*b + i of the group, the high nibble input 4*b + i + G/2.
                            A padding code is the code of value 0: 8 for u4o8; for u4 the zero point of its
                            group (0 in padding rows and groups).
    n16, plane q/w, 8..32 bit: [panel][groups*G inputs][16 rows] items; padding is 0.
    n16, nibble (nf4):      [panel][group][G/2][16 rows] bytes; low nibble input j of the group, high j + G/2.
                            A padding code is 7 (the table's zero).
    planes `scale`, `zero`: per group [panel][group][16 rows]; per row [panel][16 rows]; per tensor [1].
                            Padding rows and groups hold scale 0 and zero point 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.formats import ENCODINGS, Array, Format, Plane, Planes, get_format
from edge_runtime.engine.formats.nibbles import join, split
from edge_runtime.errors import BadConfig, Unsupported, ValueOutOfRange, nearest

PANEL = 16  # rows of one panel
LANE = 4  # inputs of one 32-bit lane
DEFAULT_GROUP = 64  # columns are padded to it when a format has no groups
ALIGN = 64  # bytes each plane is padded to in an engine
PACKINGS = ("rows", "n16", "n16k4")
_LANE_ENCODINGS = ("u4o8", "u4", "i8")
_CHUNK = 1 << 19  # weights moved at a time

_PADDING_CODE = {"u4o8": 8, "i8": 0, "nf4": 7}  # 0 for every other encoding


def cpu_packing(fmt_name: str) -> str:
    """The packing that the cpu backend reads for a format: n16k4 for integers, n16 for the rest."""
    return "n16k4" if get_format(fmt_name).planes[0].encoding in _LANE_ENCODINGS else "n16"


def plane_items(fmt_name: str, packing: str, rows: int, cols: int) -> dict[str, tuple[int, str]]:
    """Items and numpy dtype of each packed plane. Raises BadConfig on an unknown packing, Unsupported on one
    that the format does not have.
    """
    fmt = _checked(fmt_name, packing)
    items: dict[str, tuple[int, str]] = {}
    grid = _Grid.of(fmt, rows, cols)
    for plane in fmt.planes:
        encoding = ENCODINGS[plane.encoding]
        if packing == "rows":
            r, c = plane.shape(rows, cols)
            items[plane.name] = (r * c, encoding.dtype)
        elif plane.per == 1:
            codes = grid.panels * PANEL * grid.groups * grid.group
            dtype = "u1" if encoding.name == "i8" else encoding.dtype
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
    grid = _Grid.of(fmt, rows, cols)
    return {
        p.name: _pack_codes(p, planes, grid) if p.per == 1 else _pack_shared(p, planes[p.name], grid)
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
    grid = _Grid.of(fmt, rows, cols)
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
    if packing not in ("rows", cpu_packing(fmt_name)):
        raise Unsupported(f"{fmt_name} has no packing {packing!r}; use rows or {cpu_packing(fmt_name)}")
    return fmt


@dataclass(frozen=True)
class _Grid:
    """A matrix cut into panels of 16 rows and whole groups of columns."""

    rows: int
    cols: int
    group: int
    panels: int
    groups: int

    @classmethod
    def of(cls, fmt: Format, rows: int, cols: int) -> _Grid:
        group = fmt.group or DEFAULT_GROUP
        return cls(rows, cols, group, -(-rows // PANEL), -(-cols // group))

    def shared_items(self, plane: Plane) -> int:
        if plane.per == "tensor":
            return 1
        return self.panels * PANEL * (1 if plane.per == "row" else self.groups)

    def chunks(self) -> list[tuple[slice, slice]]:
        """(panels, rows) slices of about _CHUNK weights; rows end at the matrix' last one."""
        step = max(1, _CHUNK // (PANEL * self.groups * self.group))
        starts = range(0, self.panels, step)
        ends = (min(s + step, self.panels) for s in starts)
        return [
            (slice(s, e), slice(s * PANEL, min(e * PANEL, self.rows)))
            for s, e in zip(starts, ends, strict=True)
        ]


def _pack_codes(plane: Plane, planes: Planes, grid: _Grid) -> Array:
    """Plane of codes -> 1-D, in the order that its encoding has (see the module's docstring)."""
    nibble = ENCODINGS[plane.encoding].bits == 4
    order = _order(plane, grid)
    source = planes[plane.name]
    width = grid.groups * grid.group
    per_panel = PANEL * width // ENCODINGS[plane.encoding].items_per_byte
    out = np.empty(grid.panels * per_panel, "u1" if plane.encoding == "i8" else source.dtype)
    for panels, r in grid.chunks():
        count = panels.stop - panels.start
        codes = split(source[r], grid.cols) if nibble else source[r]
        padding = _PADDING_CODE.get(plane.encoding, 0)
        full = np.full((count * PANEL, width), padding, codes.dtype)
        full[: codes.shape[0], : grid.cols] = codes
        if "zero" in planes and width > grid.cols:
            full[: codes.shape[0], grid.cols :] = planes["zero"][r, -1:]
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
        out[r] = join(codes) if encoding.bits == 4 else codes
    return out


def _pack_shared(plane: Plane, source: Array, grid: _Grid) -> Array:
    """Scales or zero points (rows, n) -> [panel][n][16 rows], padded with 0."""
    if plane.per == "tensor":
        return source.reshape(-1)
    full = np.zeros((grid.panels * PANEL, source.shape[1]), source.dtype)
    full[: grid.rows] = source
    return np.ascontiguousarray(full.reshape(grid.panels, PANEL, -1).transpose(0, 2, 1)).reshape(-1)


def _unpack_shared(plane: Plane, packed: Array, grid: _Grid) -> Array:
    if plane.per == "tensor":
        return packed.reshape(1, 1)
    full = packed.reshape(grid.panels, -1, PANEL).transpose(0, 2, 1).reshape(grid.panels * PANEL, -1)
    return np.ascontiguousarray(full[: grid.rows])


@dataclass(frozen=True)
class _Order:
    """The permutation of a chunk of codes, (panels*16, groups*G) <-> 1-D, both ways."""

    forth: Callable[[Array], Array]
    back: Callable[[Array], Array]


def _order(plane: Plane, grid: _Grid) -> _Order:
    if plane.encoding in ("u4o8", "u4", "nf4"):
        return _nibble_order(grid, LANE if plane.encoding != "nf4" else 1)
    return _lane_order(grid) if plane.encoding == "i8" else _input_order(grid)


def _nibble_order(grid: _Grid, lane: int) -> _Order:
    """Low nibbles are the first half of a group, high nibbles the second; `lane` inputs of a row together."""
    unit = np.dtype("<u4" if lane == LANE else "u1")  # codes stay below 16, so a shift by 4 keeps to its byte
    four, mask = unit.type(4), unit.type(0x0F0F0F0F & ((1 << 8 * unit.itemsize) - 1))
    half = grid.group // 2 // lane

    def forth(codes: Array) -> Array:
        c = codes.view(unit).reshape(-1, PANEL, grid.groups, 2, half)
        low, high = c[:, :, :, 0], c[:, :, :, 1]
        joined = np.ascontiguousarray((low | (high << four)).transpose(0, 2, 3, 1))
        return joined.view(np.uint8).reshape(-1)

    def back(packed: Array) -> Array:
        b = packed.view(unit).reshape(-1, grid.groups, half, PANEL).transpose(0, 3, 1, 2)
        codes = np.empty((b.shape[0], PANEL, grid.groups, 2, half), unit)
        np.bitwise_and(b, mask, out=codes[:, :, :, 0])
        np.bitwise_and(b >> four, mask, out=codes[:, :, :, 1])
        return codes.view(np.uint8).reshape(b.shape[0] * PANEL, -1)

    return _Order(forth, back)


def _lane_order(grid: _Grid) -> _Order:
    """i8 codes as unsigned bytes (code + 128), four inputs of a row in a 32-bit lane."""
    flip = np.uint8(128)

    def forth(codes: Array) -> Array:
        lanes = (codes.view(np.uint8) ^ flip).view("<u4").reshape(-1, PANEL, grid.groups * grid.group // LANE)
        return np.ascontiguousarray(lanes.transpose(0, 2, 1)).view(np.uint8).reshape(-1)

    def back(packed: Array) -> Array:
        lanes = packed.view("<u4").reshape(-1, grid.groups * grid.group // LANE, PANEL)
        codes: Array = np.ascontiguousarray(lanes.transpose(0, 2, 1)).view(np.uint8) ^ flip
        return codes.view(np.int8).reshape(-1, grid.groups * grid.group)

    return _Order(forth, back)


def _input_order(grid: _Grid) -> _Order:
    """One item per weight, the 16 rows of an input together."""
    width = grid.groups * grid.group

    def forth(codes: Array) -> Array:
        return np.ascontiguousarray(codes.reshape(-1, PANEL, width).transpose(0, 2, 1)).reshape(-1)

    def back(packed: Array) -> Array:
        items = packed.reshape(-1, width, PANEL).transpose(0, 2, 1)
        return np.ascontiguousarray(items).reshape(-1, width)

    return _Order(forth, back)
