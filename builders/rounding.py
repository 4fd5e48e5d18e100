"""Rows of a matrix in torch, laid out by columns, and the levels of their grids: what gptq and descent share.

Everything is transposed, (cols, rows), because columns are worked on one by one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from builders.grids import is_uniform
from edge_runtime.engine.formats import Array


@dataclass(frozen=True, slots=True, eq=False)
class ColumnGrid:
    """Grids of some rows: value = level * scale + shift; scale and shift (groups, rows), levels ascending.

    A group whose scale is 0 holds its shift alone.
    """

    scale: Tensor
    shift: Tensor
    levels: Tensor
    middle: Tensor | None  # between neighbouring levels; None where levels are consecutive whole numbers
    span: int

    def nearest(self, column: int, target: Tensor) -> Tensor:
        """The values of the grid nearest to target (rows,), for a column of the matrix."""
        scale, shift = self.scale[column // self.span], self.shift[column // self.span]
        y = (target - shift) / torch.where(scale == 0, torch.inf, scale)
        if self.middle is None:
            z = y.round_().clamp_(self.levels[0], self.levels[-1])
        else:
            z = self.levels[torch.bucketize(y, self.middle)]
        return z * scale + shift

    def scaled(self, factor: Tensor) -> ColumnGrid:
        """The grid with all its values multiplied by factor (groups, rows)."""
        return ColumnGrid(self.scale * factor, self.shift * factor, self.levels, self.middle, self.span)


def column_grid(scale: Array, shift: Array, levels: Array, span: int, rows: int, like: Tensor) -> ColumnGrid:
    """Of f32 scale and shift (rows or 1, groups), in the dtype and on the device of `like`."""

    def moved(a: Array) -> Tensor:
        return torch.from_numpy(np.array(a)).to(like)

    def columns(a: Array) -> Tensor:
        return moved(np.broadcast_to(a, (rows, a.shape[1])).T)

    middle = None if is_uniform(levels) else moved((levels[1:].astype(np.float64) + levels[:-1]) / 2)
    return ColumnGrid(columns(scale), columns(shift), moved(levels), middle, span)
