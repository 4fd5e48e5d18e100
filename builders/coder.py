"""How values are rounded to a format with scales, asked alike of every kind of format.

Most have levels, and each value takes the nearest. Those of a trellis (trellis.py) have none: codes down a
column are a path. Algorithms that choose values by themselves, level by level, ask `grids.has_grid` instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from builders import trellis
from builders.grids import grid_for, has_grid
from builders.observers import Observer, get_observer
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.formats.trellis import TrellisCode, trellis_of

if TYPE_CHECKING:
    from torch import Tensor

    from builders.rounding import Nearest


class Coder(Protocol):
    @property
    def fmt(self) -> Format: ...

    @property
    def refines(self) -> bool:
        """Whether codes may be improved one by one, each alone (descent.py)."""
        ...

    def quantize(self, weights: Array, importance: Array | None = None) -> dict[str, Array]:
        """Planes nearest to f32 weights (rows, cols), on the grid for them. Raises ValueOutOfRange."""
        ...

    def grid_for(self, weights: Array, importance: Array | None = None) -> dict[str, Array]:
        """The planes beside the codes that suit f32 weights (rows, cols); importance (cols,) of the squared
        errors of each column, None meaning 1."""
        ...

    def encode(self, values: Array, grid: dict[str, Array]) -> dict[str, Array]:
        """Planes of f32 values (rows, cols) that lie on a grid. Raises ValueOutOfRange."""
        ...

    def nearest(self, rows: slice, like: Tensor) -> Nearest:
        """How columns of some rows are rounded, in the dtype and on the device of `like`."""
        ...


def coder_of(fmt: Format, observer: str | None, rows: Array | None = None) -> Coder | None:
    """None where the format has no scales, or has levels and no observer is named to choose scales by.

    rows f32 (rows,): how much each matters, where codes of rows depend on each other. Raises BadConfig.
    """
    observe = None if observer is None else get_observer(observer)
    code = trellis_of(fmt)
    if code is not None:
        return TrellisCoder(fmt, code, trellis.row_roots(rows))
    return LevelCoder(fmt, observe) if observe is not None and has_grid(fmt) else None


@dataclass(frozen=True, slots=True)
class LevelCoder:
    fmt: Format
    observe: Observer
    refines = True

    def quantize(self, weights: Array, importance: Array | None = None) -> dict[str, Array]:
        return self.encode(weights, self.grid_for(weights, importance))

    def grid_for(self, weights: Array, importance: Array | None = None) -> dict[str, Array]:
        return grid_for(self.fmt, *self.observe(weights, self.fmt, importance))

    def encode(self, values: Array, grid: dict[str, Array]) -> dict[str, Array]:
        return self.fmt.encode_on_grid(values, grid)

    def nearest(self, rows: slice, like: Tensor) -> Nearest:
        from builders.rounding import NearestLevel  # needs torch

        return NearestLevel(self.fmt, like)


@dataclass(frozen=True, slots=True, eq=False)
class TrellisCoder:
    fmt: Format
    code: TrellisCode
    roots: Array | None  # see trellis.row_roots
    refines = False  # less than 1% is gained where a path is best already

    def quantize(self, weights: Array, importance: Array | None = None) -> dict[str, Array]:
        return trellis.quantize(weights, self.fmt, importance, self.roots)

    def grid_for(self, weights: Array, importance: Array | None = None) -> dict[str, Array]:
        return trellis.grid_for(weights, self.fmt, importance, self.roots)

    def encode(self, values: Array, grid: dict[str, Array]) -> dict[str, Array]:
        # without roots: a path without error is the best one, whatever rows matter
        return trellis.encode_on_grid(values, self.fmt, grid)

    def nearest(self, rows: slice, like: Tensor) -> Nearest:
        from builders.rounding import BestPath  # needs torch

        return BestPath(self.code, None if self.roots is None else self.roots[rows])
