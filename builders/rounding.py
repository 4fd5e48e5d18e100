"""Rows of a matrix in torch, laid out by columns, and the levels of their grids: what gptq and descent share.

Everything is transposed, (cols, rows), because columns are worked on one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from builders.grids import is_uniform, levels_of
from builders.trellis import nearest_column
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.formats.trellis import TrellisCode

_NEAR = 16  # columns whose changes reach one another one by one; further ones are reached by a product


class Nearest(Protocol):
    def __call__(self, wanted: Tensor, scale: Tensor, value: Tensor) -> None:
        """Put level * scale of the nearest levels of one column into `value`; all (rows,), `wanted` in units
        of the scale, overwritten."""
        ...


class NearestLevel:
    """Each value by itself, to a level of the format."""

    def __init__(self, fmt: Format, like: Tensor) -> None:
        levels = levels_of(fmt)
        self._low, self._high = float(levels[0]), float(levels[-1])
        self._levels = torch.from_numpy(np.array(levels)).to(like)
        middle = (levels[1:].astype(np.float64) + levels[:-1]) / 2
        self._middle = None if is_uniform(levels) else torch.from_numpy(middle).to(like)

    def __call__(self, wanted: Tensor, scale: Tensor, value: Tensor) -> None:
        if self._middle is None:
            level = wanted.round_().clamp_(self._low, self._high)
        else:
            level = self._levels[torch.bucketize(wanted, self._middle)]
        torch.mul(level, scale, out=value)


class BestPath:
    """All rows of a column together, through a trellis."""

    def __init__(self, code: TrellisCode, roots: Array | None) -> None:
        self._code, self._roots = code, roots

    def __call__(self, wanted: Tensor, scale: Tensor, value: Tensor) -> None:
        found = nearest_column(wanted.cpu().numpy(), scale.cpu().numpy(), self._code, self._roots)
        value.copy_(torch.from_numpy(found))


@dataclass(frozen=True, slots=True, eq=False)
class ColumnGrid:
    """Grids of some rows: value = level * scale + shift; scale and shift (groups, rows), a group of `span`
    columns. A group whose scale is 0 holds its shift alone."""

    scale: Tensor
    shift: Tensor
    span: int
    nearest: Nearest

    def scaled(self, factor: Tensor) -> ColumnGrid:
        """The grid with all its values multiplied by factor (groups, rows)."""
        return replace(self, scale=self.scale * factor, shift=self.shift * factor)


def by_columns(a: Array, rows: int, like: Tensor) -> Tensor:
    """(rows or 1, groups) as (groups, rows), in the dtype and on the device of `like`."""
    return torch.from_numpy(np.array(np.broadcast_to(a, (rows, a.shape[1])).T)).to(like)


class BlockRounding:
    """Rounds blocks of columns one column after another, each made to know of the changes before it.

    A column costs few operations of torch: their own cost, not their work, is what most rows wait for.
    """

    def __init__(self, grid: ColumnGrid) -> None:
        self._span, self._nearest = grid.span, grid.nearest
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
                self._round(column // self._span, wanted, value)
                torch.sub(old, value, out=change)
        return values, changes

    def _round(self, group: int, wanted: Tensor, value: Tensor) -> None:
        """The values (rows,) of the grid nearest to `wanted`, which is overwritten."""
        if self._shift is not None:
            wanted.sub_(self._shift[group])
        self._nearest(wanted.div_(self._divisor[group]), self._scale[group], value)
        if self._shift is not None:
            value.add_(self._shift[group])
