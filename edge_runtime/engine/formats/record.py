"""Plane and Format: the one record from which every size, shape and byte count is derived.

A format stores a matrix of shape (rows, cols) as planes. Every plane is a 2-D array of storage items whose
shape follows from the record alone; `per` says how many weights along a row share one item.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edge_runtime.errors import BadConfig, Unsupported, ValueOutOfRange, nearest

Array = npt.NDArray[Any]
Planes = Mapping[str, Array]
Per = int | Literal["row", "tensor"]


@dataclass(frozen=True, slots=True)
class Encoding:
    """How one item of a plane is stored: `bits` each; items narrower than a byte share bytes, low first."""

    name: str
    bits: int
    dtype: str  # numpy dtype of the storage array

    @property
    def items_per_byte(self) -> int:
        return 8 // self.bits if self.bits < 8 else 1


# The element encoding is part of the record, so that the ABI hash sees a change of numerics.
ENCODINGS: dict[str, Encoding] = {
    e.name: e
    for e in (
        Encoding("f32", 32, "<f4"),
        Encoding("f16", 16, "<f2"),
        Encoding("bf16", 16, "<u2"),
        Encoding("i8", 8, "i1"),
        Encoding("u8", 8, "u1"),
        Encoding("u4o8", 4, "u1"),  # nibble u, value u - 8
        Encoding("u4", 4, "u1"),  # nibble u, value u (a zero plane shifts it)
        Encoding("nf4", 4, "u1"),  # nibble = index into the NF4 table
        Encoding("e4m3", 8, "u1"),  # OCP E4M3FN
        Encoding("e5m2", 8, "u1"),  # OCP E5M2
        Encoding("u1", 1, "u1"),  # the highest bit of a code
        Encoding("u2", 2, "u1"),
        Encoding("u2o2", 2, "u1"),  # code u, value u - 2
        Encoding("u2o4", 2, "u1"),  # lower bits of a code u of 3 bits, value u - 4
        Encoding("u4o16", 4, "u1"),  # lower bits of a code u of 5 bits, value u - 16
        Encoding("u4o32", 4, "u1"),  # lower bits of a code u of 6 bits, value u - 32
        Encoding("u4u4", 8, "u1"),  # a scale in the low nibble, a minimum in the high one
        Encoding("e2m1", 4, "u1"),  # OCP MX E2M1
        Encoding("e8m0", 8, "u1"),  # OCP MX E8M0: 2^(u - 127)
        Encoding("dynamic8", 8, "u1"),  # index into bitsandbytes' signed dynamic map (nf4_double.py)
        Encoding("i32", 32, "<i4"),
        Encoding("tcq2", 2, "u1"),  # trellis codes, see trellis.py
        Encoding("tcq3", 2, "u1"),  # lower bits of trellis codes of 3 bits
        Encoding("tcq4", 4, "u1"),
    )
}


@dataclass(frozen=True, slots=True)
class Plane:
    """One stored array of a format: `per` weights along a row share an item ("row"/"tensor" for wider).

    `shared`: the plane has one row, which all rows of the matrix share. `derived`: a grid need not hold it;
    the codec then makes it from the values.
    """

    name: str
    encoding: str
    per: Per
    shared: bool = False
    derived: bool = False

    @property
    def whole(self) -> bool:
        """Whether it belongs to the matrix as a whole, so that a block of rows takes all of it."""
        return self.shared or self.per == "tensor"

    def shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Storage shape (in storage items, bytes for sub-byte encodings) for a (rows, cols) matrix."""
        if self.per == "tensor":
            return (1, 1)
        items = 1 if self.per == "row" else -(-cols // int(self.per))
        enc = ENCODINGS[self.encoding]
        return (1 if self.shared else rows, -(-items // enc.items_per_byte))

    def nbytes(self, rows: int, cols: int) -> int:
        r, c = self.shape(rows, cols)
        return r * c * np.dtype(ENCODINGS[self.encoding].dtype).itemsize


@dataclass(frozen=True, slots=True)
class Format:
    """The numbers of a stored tensor, with its slow, obvious numpy codec.

    `encode(values f32 (rows, cols)) -> {plane: array}` and `decode(planes, rows, cols) -> f32`. `codes` are
    the planes with an item per weight, lower bits first; `grid_planes`, the others (scale, zero, min, super),
    are the grid that codes are rounded to.
    `bound(values, planes)` is the closed-form bound of |value - decoded| for every element. `kind`: int codes
    are whole numbers (E2M1's when doubled), which kernels multiply with int8 activations.

    `run`: rows whose codes depend on each other, counted from the first row: a part of a matrix' rows that
    begins at a multiple of it, and ends at one or at the last row, can be decoded by itself.

    For algorithms that choose values: `grid_for(low, high)` gives the grid whose range covers [low, high] of
    every group, f32 (rows, groups) (microscaling formats: the published rule's grid, which may clip the value
    of greatest magnitude); `levels` are the values of the codes before scaling, ascending f32; and
    `affine(grid)` gives scale and shift, f32 (rows or 1, groups), so that value = level * scale + shift. A
    scale may be negative. Formats without scales have none of the three.
    """

    name: str
    planes: tuple[Plane, ...]
    encode_rows: Callable[[Array], dict[str, Array]]
    decode_rows: Callable[[Planes, int, int], Array]
    bound: Callable[[Array, Planes], Array]
    kind: Literal["float", "int", "table"] = "float"
    on_grid: Callable[[Array, Planes], dict[str, Array]] | None = None  # formats with scales
    grid_for: Callable[[Array, Array], dict[str, Array]] | None = None
    affine: Callable[[Planes], tuple[Array, Array]] | None = None
    levels: Array | None = field(default=None, compare=False)
    check_values: Callable[[Planes, int], None] | None = None  # (planes, cols); raises ValueOutOfRange
    run: int = 1

    @property
    def codes(self) -> tuple[Plane, ...]:
        """Planes with one item per weight: the codes, or their lower and their higher bits."""
        return tuple(p for p in self.planes if p.per == 1)

    @property
    def grid_planes(self) -> tuple[Plane, ...]:
        """Planes that weights share: scales, zero points, minima."""
        return tuple(p for p in self.planes if p.per != 1)

    @property
    def group(self) -> int | None:
        """Weights that share a scale, or None when the scale is per row, per tensor or absent."""
        pers = [p.per for p in self.planes if isinstance(p.per, int) and p.per > 1 and not p.derived]
        return min(pers, default=None)

    def span(self, cols: int) -> int:
        """Columns that share a range: the group, or the whole row."""
        return self.group or cols

    def plane(self, name: str) -> Plane | None:
        return next((p for p in self.planes if p.name == name), None)

    def shapes(self, rows: int, cols: int) -> dict[str, tuple[int, int]]:
        return {p.name: p.shape(rows, cols) for p in self.planes}

    def nbytes(self, rows: int, cols: int) -> int:
        return sum(p.nbytes(rows, cols) for p in self.planes)

    def bits_per_weight(self, rows: int, cols: int) -> float:
        return 8.0 * self.nbytes(rows, cols) / (rows * cols)

    def encode(self, values: Array) -> dict[str, Array]:
        """Encode an f32 matrix (rows, cols). Raises ValueOutOfRange on NaN/Inf or an overflowing scale."""
        return self.encode_rows(self.checked(values))

    def encode_on_grid(self, values: Array, grid: Planes) -> dict[str, Array]:
        """Round an f32 matrix (rows, cols) to given scales (and zero points), clipping to their range.

        `grid` holds every plane but the codes, in its storage dtype and shape (derived planes may lack); the
        result holds all planes.
        Raises Unsupported when the format has no scales, ValueOutOfRange on a grid of wrong shape or values.
        """
        if self.on_grid is None:
            raise Unsupported(f"{self.name} has no scales to round to; use encode()")
        x = self.checked(values)
        for plane in self.grid_planes:
            if not plane.derived or plane.name in grid:
                self._check_plane(plane, grid, *x.shape)
        return self.on_grid(x, grid)

    def check_planes(self, planes: Planes, rows: int, cols: int) -> None:
        """Raises ValueOutOfRange naming the first plane that is missing or of wrong shape, dtype or value."""
        for plane in self.planes:
            self._check_plane(plane, planes, rows, cols)
        if self.check_values is not None:
            self.check_values(planes, cols)

    def checked(self, values: Array) -> Array:
        """The values as an f32 matrix. Raises ValueOutOfRange where they are none, or hold NaN or Inf."""
        x = np.ascontiguousarray(values, dtype=np.float32)
        if x.ndim != 2 or x.size == 0:
            raise ValueOutOfRange(f"{self.name}: a matrix (rows, cols) is needed, got shape {x.shape}")
        # min and max carry every NaN and Inf, without a mask as large as the matrix.
        if not np.isfinite(x.min()) or not np.isfinite(x.max()):
            raise ValueOutOfRange(f"{self.name}: the tensor holds NaN or Inf; the checkpoint is damaged")
        return x

    def _check_plane(self, plane: Plane, planes: Planes, rows: int, cols: int) -> None:
        want, dtype = plane.shape(rows, cols), np.dtype(ENCODINGS[plane.encoding].dtype)
        got = planes.get(plane.name)
        if got is None or got.shape != want or got.dtype != dtype:
            found = "is missing" if got is None else f"is {got.dtype} {got.shape}"
            raise ValueOutOfRange(f"{self.name}: plane {plane.name!r} {found}, expected {dtype} {want}")

    def decode(self, planes: Planes, rows: int, cols: int) -> Array:
        """Decode to f32 (rows, cols). A plane of wrong shape or dtype is a ValueOutOfRange."""
        self.check_planes(planes, rows, cols)
        return self.decode_rows(planes, rows, cols)

    def decode_ids(self, planes: Planes, rows: int, cols: int, ids: Array) -> Array:
        """Rows by number of a matrix (rows, cols), f32 (len(ids), cols), decoding no more than their runs."""
        taken, place = whole_runs(ids, self.run, rows)
        part = {p.name: planes[p.name] if p.whole else planes[p.name][taken] for p in self.planes}
        found: Array = self.decode(part, len(taken), cols)[place]
        return found

    def signature(self) -> str:
        per = (f"{p.name}/{p.encoding}/{p.per}{'/shared' * p.shared}" for p in self.planes)
        return self.name + ":" + ",".join(per)


def whole_runs(ids: Array, run: int, rows: int) -> tuple[Array, Array]:
    """Numbers, ascending, of all rows of the runs that rows `ids` are of, and where each of them is there."""
    runs, place = np.unique(ids // run, return_inverse=True)
    taken = (runs[:, None] * run + np.arange(run)).reshape(-1)
    return taken[taken < rows], place.reshape(-1) * run + ids % run  # only the last run can be shorter


FORMATS: dict[str, Format] = {}


def register(fmt: Format) -> Format:
    """Add a format to the table; its name is its only identity."""
    if fmt.name in FORMATS:
        raise BadConfig(f"format {fmt.name!r} is registered twice")
    FORMATS[fmt.name] = fmt
    return fmt


def get_format(name: str) -> Format:
    """The format of that name. Raises BadConfig naming the nearest valid one."""
    try:
        return FORMATS[name]
    except KeyError:
        raise BadConfig(f"unknown format {name!r}; {nearest(name, FORMATS)}") from None


def abi_hash() -> int:
    """64-bit hash over every signature; the kernel libraries export the same number."""
    text = "\n".join(sorted(f.signature() for f in FORMATS.values()))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
