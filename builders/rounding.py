"""Rows of a matrix in torch, laid out by columns, and the levels of their grids: what gptq and descent share.

Everything is transposed, (cols, rows), because columns are worked on one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from builders.grids import is_uniform, levels_of
from builders.trellis import nearest_column
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.formats.trellis import TrellisCode, trellis_of

_NEAR = 16  # columns whose changes reach one another one by one; further ones are reached by a product


@dataclass(frozen=True, slots=True, eq=False)
class ColumnGrid:
    """Grids of some rows: value = level * scale + shift; scale and shift (groups, rows), levels ascending.

    A group whose scale is 0 holds its shift alone. Of a trellis format's code, no level stands for itself;
    roots f32 (rows,) say how its rows matter (trellis.row_roots), None: all alike.
    """

    scale: Tensor
    shift: Tensor
    levels: Tensor
    middle: Tensor | None  # between neighbouring levels; None where levels are consecutive whole numbers
    span: int
    code: TrellisCode | None = None
    roots: Array | None = None

    def scaled(self, factor: Tensor) -> ColumnGrid:
        """The grid with all its values multiplied by factor (groups, rows)."""
        return replace(self, scale=self.scale * factor, shift=self.shift * factor)


def column_grid(
    fmt: Format,
    scale: Array,
    shift: Array,
    cols: int,
    rows: int,
    like: Tensor,
    roots: Array | None = None,
) -> ColumnGrid:
    """Of f32 scale and shift (rows or 1, groups), in the dtype and on the device of `like`."""
    code = trellis_of(fmt)
    levels = levels_of(fmt) if code is None else code.levels()

    def moved(a: Array) -> Tensor:
        return torch.from_numpy(np.array(a)).to(like)

    def columns(a: Array) -> Tensor:
        return moved(np.broadcast_to(a, (rows, a.shape[1])).T)

    middle = None if is_uniform(levels) else moved((levels[1:].astype(np.float64) + levels[:-1]) / 2)
    return ColumnGrid(columns(scale), columns(shift), moved(levels), middle, fmt.span(cols), code, roots)


class BlockRounding:
    """Rounds blocks of columns one column after another, each made to know of the changes before it.

    A column costs few operations of torch: their own cost, not their work, is what most rows wait for.
    """

    def __init__(self, grid: ColumnGrid) -> None:
        self._code, self._roots = grid.code, grid.roots
        self._span, self._middle, self._levels = grid.span, grid.middle, grid.levels
        self._low, self._high = (float(end) for end in (grid.levels[0], grid.levels[-1]))
        self._scale = grid.scale.unbind(0)
        self._divisor = torch.where(grid.scale == 0, torch.inf, grid.scale).unbind(0)
        self._shift = grid.shift.unbind(0) if bool(grid.shift.any()) else None

    def __call__(
        self, columns: Sequence[int], base: Tensor, origin: Tensor, mixing: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(values, changes) of some columns: values_k the nearest to base_k + sum_{i<k} mixing_ik changes_i,
        changes = origin - values; all (columns, rows) but mixing (columns, columns). Overwrites base.
        """
        values, changes = torch.empty_like(base), torch.zeros_like(base)
        for start in range(0, len(columns), _NEAR):
            near = slice(start, start + _NEAR)
            if start:
                base[near].addmm_(mixing[:start, near].T, changes[:start])
            known = changes[near].T  # zero from this column on, so that mixing needs not be cut
            weights = mixing[near, near].T.contiguous()
            each = (columns[near], base[near], weights, origin[near], values[near], changes[near])
            for column, wanted, weight, old, value, change in zip(*each, strict=True):
                wanted.addmv_(known, weight)
                if self._code is None:
                    self._nearest(column // self._span, wanted, value)
                else:
                    scale = self._scale[column // self._span]
                    column_of = (wanted.cpu().numpy(), scale.cpu().numpy(), self._code)
                    found = nearest_column(*column_of, self._roots)
                    value.copy_(torch.from_numpy(found))
                torch.sub(old, value, out=change)
        return values, changes

    def _nearest(self, group: int, wanted: Tensor, value: Tensor) -> None:
        """The values (rows,) of the grid nearest to `wanted`, which is overwritten."""
        if self._shift is not None:
            wanted.sub_(self._shift[group])
        wanted.div_(self._divisor[group])
        if self._middle is None:
            level = wanted.round_().clamp_(self._low, self._high)
        else:
            level = self._levels[torch.bucketize(wanted, self._middle)]
        torch.mul(level, self._scale[group], out=value)
        if self._shift is not None:
            value.add_(self._shift[group])
