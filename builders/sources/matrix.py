"""A matrix that a checkpoint stores in fewer bits: its exact values, and the format here that holds them.

Importers make one Matrix a tensor. Its grid (scales, zero points) and its codes are read when they are asked
for: the grid alone says the format, so a model's formats are known before its weights are read.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from edge_runtime.engine.formats import ENCODINGS, Array, get_format

# Holds a group's values within 1/254 of its greatest; where a scale is beyond f16, the row's f32 one serves
FALLBACKS = ("int8_g32", "int8_row")
_BLOCK = 1 << 20  # values of one block of rows


@dataclass(frozen=True, slots=True)
class Home:
    """Where a matrix goes. error: the greatest difference of a value over its group's greatest magnitude, 0
    where every value is exact; why: what has no exact home, where `error` is above 0."""

    format: str
    error: float = 0.0
    why: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """Codec planes (2-D) of a matrix in a format; error as in Home."""

    format: str
    planes: dict[str, Array]
    error: float = 0.0

    def rows(self, start: int, stop: int) -> Stored:
        """The planes of rows [start, stop)."""
        fmt = get_format(self.format)
        cut = {p.name: not p.whole for p in fmt.planes}
        planes = {n: a[start:stop] if cut[n] else a for n, a in self.planes.items()}
        return Stored(self.format, planes, self.error)


class Matrix(ABC):
    """shape: (rows, cols) = (outputs, inputs).

    order: the input that each stored column multiplies, (cols,) whole numbers, or None where they are in the
    inputs' own order; `stored` gives planes in that order, `values` in the inputs' own.
    """

    shape: tuple[int, int]
    order: Array | None = None

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape
        self._home: Home | None = None
        self._codes: Array | None = None
        self._grid: Any = None

    @abstractmethod
    def exact_home(self) -> Home | None:
        """The format that has a place for these codes and scales, or None."""

    @abstractmethod
    def exact_planes(self, home: Home) -> dict[str, Array]:
        """All planes of the format that `exact_home` named."""

    @abstractmethod
    def read_codes(self) -> Array:
        """The codes, freshly read: (rows, cols)."""

    @abstractmethod
    def ordered_values(self, start: int, stop: int) -> Array:
        """Exact f32 values of rows [start, stop), columns in stored order."""

    def read_grid(self) -> Any:
        """Scales and the like, freshly read, in the importer's own form."""
        return ()

    @property
    def grid(self) -> Any:
        """What `read_grid` gave; kept until `forget`."""
        if self._grid is None:
            self._grid = self.read_grid()
        return self._grid

    @property
    def codes(self) -> Array:
        """The codes; kept until `forget`, for a matrix is asked for block by block."""
        if self._codes is None:
            self._codes = self.read_codes()
        return self._codes

    def forget(self) -> None:
        self._codes = self._grid = None

    def values(self, start: int, stop: int) -> Array:
        """f32 values of rows [start, stop) as the checkpoint means them."""
        ordered = self.ordered_values(start, stop)
        if self.order is None:
            return ordered
        out = np.empty_like(ordered)
        out[:, self.order] = ordered
        return out

    def home(self) -> Home:
        """The format that `stored` will use; the codes are read only where none is near."""
        if self._home is None:
            self._home = self.exact_home() or self._nearest()[0]
        return self._home

    def stored(self) -> Stored:
        home, exact = self.home(), self.exact_home()
        planes = self._nearest()[1] if exact is None else self.exact_planes(exact)
        get_format(home.format).check_planes(planes, *self.shape)
        return Stored(home.format, planes, home.error)

    def on_grid(self, name: str, grid: dict[str, Array]) -> dict[str, Array]:
        """Planes of a format whose scales are known: value / scale is the code again to 2^-23, so rounding
        finds it. Made in blocks of rows: no whole matrix lies in f32."""
        fmt = get_format(name)
        planes = {p.name: np.empty(p.shape(*self.shape), ENCODINGS[p.encoding].dtype) for p in fmt.planes}
        planes |= grid
        step = max(1, _BLOCK // self.shape[1])
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            block = Stored(name, grid).rows(start, stop).planes
            made = fmt.encode_on_grid(self.ordered_values(start, stop), block)
            for plane in fmt.planes:
                if plane.name not in grid:
                    planes[plane.name][start:stop] = made[plane.name]
        return planes

    def without_home(self) -> str:
        """Why `exact_home` found none, for the notice."""
        return "its scales have no format here"

    def _nearest(self) -> tuple[Home, dict[str, Array]]:
        """The values anew in a format of 8 bits, and how far they then are."""
        values = self.ordered_values(0, self.shape[0])
        absmax = float(np.abs(values).max(initial=0.0))
        fmt = get_format(FALLBACKS[0] if absmax / 127 < 65504 else FALLBACKS[1])
        planes = fmt.encode(values)
        difference = np.abs(fmt.decode(planes, *self.shape) - values)
        span = fmt.span(self.shape[1])
        starts = np.arange(0, self.shape[1], span)
        worst = np.maximum.reduceat(difference, starts, axis=1)
        greatest = np.maximum.reduceat(np.abs(values), starts, axis=1)
        error = float((worst / np.where(greatest == 0, np.inf, greatest)).max())
        return Home(fmt.name, error, self.without_home()), planes
