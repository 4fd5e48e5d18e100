"""Codes and scales improved together, after an algorithm has chosen them: less of tr(E H E^T), never more.

Coordinate descent over codes, as in CDQuant (Nair & Suggala 2024): with E = W - Q and the gradient G = E H,
the best value of one weight, all others fixed, is q_j + G_j / H_jj, and the level nearest to it is taken.
Between sweeps the scales of every row are refitted to their codes by least squares weighted with H: factors t
of the groups solve (V H V^T) t = V H w, V (groups, cols) the row's values cut into its groups. The format
rounds the scales, so a row keeps its old ones where the new ones are no better.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from builders.rounding import ColumnGrid

BLOCK = 128  # columns whose changes reach the other columns' gradients together
ROUNDS = 2  # of refitted scales and a sweep
_WIDE = 2048  # columns beyond which one round must do: the second gains less than 2%
_FURTHEST = 2.0  # a scale changes at most by this factor: a group of few codes says little

Refit = Callable[[ColumnGrid, Tensor], ColumnGrid]  # grid and factors (groups, rows) -> what the format holds


def sweep(q: Tensor, gradient: Tensor, h: Tensor, grid: ColumnGrid, order: Tensor) -> None:
    """One pass over all codes, in place on q and gradient = H (w - q), both (cols, rows); order (cols,)."""
    diagonal = h.diagonal()
    for start in range(0, len(order), BLOCK):
        at = order[start : start + BLOCK]
        near = h[at][:, at]
        g = gradient[at]
        change = torch.zeros_like(g)
        for k, column in enumerate(at.tolist()):
            new = grid.nearest(column, q[column] + g[k] / diagonal[column])
            torch.sub(q[column], new, out=change[k])
            q[column] = new
            g.addr_(near[:, k], change[k])
        gradient.addmm_(h[:, at], change)


def factors(q: Tensor, gradient: Tensor, h: Tensor, span: int) -> Tensor:
    """(groups, rows) by which the values of each group should be multiplied; gradient is H (w - q)."""
    cols, rows = q.shape
    groups = -(-cols // span)
    normal = q.new_empty(groups, groups, rows)
    for k in range(groups):
        part = slice(k * span, min((k + 1) * span, cols))
        normal[k] = _by_group((h[:, part] @ q[part]).mul_(q), span)
    # t = 1 leaves q as it is: (V H V^T)(t - 1) = V H (w - q)
    right = _by_group(q * gradient, span)
    a, b = normal.permute(2, 0, 1).contiguous(), right.T.contiguous()
    # a group of zeros has no factor; a little ridge keeps nearly dependent groups where they are
    diagonal = a.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal + 1e-30 + (diagonal == 0).to(a)
    found, _ = torch.linalg.solve_ex(a, b)
    found = torch.where(torch.isfinite(found), found + 1, 1.0).clamp_(1 / _FURTHEST, _FURTHEST)
    return found.T.contiguous()


def improve(
    w: Tensor, q: Tensor, h: Tensor, grid: ColumnGrid, order: Tensor, refit: Refit | None
) -> tuple[Tensor, ColumnGrid]:
    """Better values than q (cols, rows), and their grid; `refit` is None where scales must stay."""
    gradient = h @ (w - q)
    sweep(q, gradient, h, grid, order)
    for _ in range(ROUNDS if len(w) <= _WIDE else 1):
        if refit is not None:
            q, gradient, grid = _with_better_scales(w, q, gradient, h, grid, refit)
        sweep(q, gradient, h, grid, order)
    return q, grid


def _with_better_scales(
    w: Tensor, q: Tensor, gradient: Tensor, h: Tensor, grid: ColumnGrid, refit: Refit
) -> tuple[Tensor, Tensor, ColumnGrid]:
    new = refit(grid, factors(q, gradient, h, grid.span))
    moved = _codes_on(q, grid, new)
    pull = h @ (w - moved)
    better = ((w - moved) * pull).sum(0) < ((w - q) * gradient).sum(0)  # e H e^T of every row
    kept = ColumnGrid(
        torch.where(better, new.scale, grid.scale),
        torch.where(better, new.shift, grid.shift),
        grid.levels,
        grid.middle,
        grid.span,
    )
    return torch.where(better, moved, q), torch.where(better, pull, gradient), kept


def _codes_on(q: Tensor, old: ColumnGrid, new: ColumnGrid) -> Tensor:
    """The values that q's codes have on another grid."""
    moved = torch.empty_like(q)
    for k in range(len(old.scale)):
        part = slice(k * old.span, (k + 1) * old.span)
        scale = torch.where(old.scale[k] == 0, torch.inf, old.scale[k])
        moved[part] = (q[part] - old.shift[k]) / scale * new.scale[k] + new.shift[k]
    return moved


def _by_group(x: Tensor, span: int) -> Tensor:
    """Sums over groups of columns: (cols, rows) to (groups, rows)."""
    short = -len(x) % span
    if short:
        x = torch.cat([x, x.new_zeros(short, x.shape[1])])
    return x.unflatten(0, (-1, span)).sum(1)
