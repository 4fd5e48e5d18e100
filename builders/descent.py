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
_FURTHEST = 2.0  # a scale changes at most by this factor: a group of few codes says little

Refit = Callable[[ColumnGrid, Tensor], ColumnGrid]  # grid and factors (groups, rows) -> what the format holds


def sweep(w: Tensor, q: Tensor, h: Tensor, grid: ColumnGrid, order: Tensor) -> None:
    """One pass over all codes, in place on q (cols, rows); w (cols, rows), h (cols, cols), order (cols,)."""
    diagonal = h.diagonal()
    gradient = h @ (w - q)
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


def factors(w: Tensor, q: Tensor, h: Tensor, span: int) -> Tensor:
    """(groups, rows) by which the values of each group should be multiplied."""
    cols, rows = w.shape
    groups = -(-cols // span)
    normal = w.new_empty(groups, groups, rows)
    right = _by_group(q * (h @ w), span)
    for k in range(groups):
        part = slice(k * span, min((k + 1) * span, cols))
        normal[k] = _by_group((h[:, part] @ q[part]).mul_(q), span)
    a, b = normal.permute(2, 0, 1).contiguous(), right.T.contiguous()
    # a group of zeros has no factor; a little ridge towards 1 keeps nearly dependent groups where they are
    diagonal = a.diagonal(dim1=1, dim2=2)
    ridge = 1e-6 * diagonal + 1e-30 + (diagonal == 0).to(a)
    b += ridge
    diagonal += ridge
    found, _ = torch.linalg.solve_ex(a, b)
    found = torch.where(torch.isfinite(found), found, 1.0).clamp_(1 / _FURTHEST, _FURTHEST)
    return found.T.contiguous()


def improve(
    w: Tensor, q: Tensor, h: Tensor, grid: ColumnGrid, order: Tensor, refit: Refit | None
) -> tuple[Tensor, ColumnGrid]:
    """Better values than q (cols, rows), and their grid; `refit` is None where scales must stay."""
    sweep(w, q, h, grid, order)
    for _ in range(ROUNDS):
        if refit is not None:
            q, grid = _with_better_scales(w, q, h, grid, refit)
        sweep(w, q, h, grid, order)
    return q, grid


def errors(w: Tensor, q: Tensor, h: Tensor) -> Tensor:
    """e H e^T of every row, (rows,)."""
    e = w - q
    return (e * (h @ e)).sum(0)


def _with_better_scales(
    w: Tensor, q: Tensor, h: Tensor, grid: ColumnGrid, refit: Refit
) -> tuple[Tensor, ColumnGrid]:
    new = refit(grid, factors(w, q, h, grid.span))
    moved = _codes_on(q, grid, new)
    better = errors(w, moved, h) < errors(w, q, h)
    kept = ColumnGrid(
        torch.where(better, new.scale, grid.scale),
        torch.where(better, new.shift, grid.shift),
        grid.levels,
        grid.middle,
        grid.span,
    )
    return torch.where(better, moved, q), kept


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
