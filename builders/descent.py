"""Codes and scales improved together, after an algorithm has chosen them: less of tr(E H E^T), never more.

Coordinate descent over codes, as in CDQuant (Nair & Suggala 2024): with E = W - Q and the gradient G = E H,
the best value of one weight, all others fixed, is q_j + G_j / H_jj, and the level nearest to it is taken.
Between sweeps the scales of every row are refitted to their codes by least squares weighted with H: factors t
of the groups solve (V H V^T) t = V H w, V (groups, cols) the row's values cut into its groups. The format
rounds the scales, so a row keeps its old ones where the new ones are no better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from builders.rounding import BlockRounding, ColumnGrid

BLOCK = 128  # columns whose changes reach the other columns' gradients together
ROUNDS = 2  # of refitted scales and a sweep
_WIDE = 2048  # columns beyond which one round must do: the second gains less than 2%
_FURTHEST = 2.0  # a scale changes at most by this factor: a group of few codes says little

Refit = Callable[[ColumnGrid, Tensor], ColumnGrid]  # grid and factors (groups, rows) -> what the format holds


def sweep(
    q: Tensor, gradient: Tensor, h: Tensor, grid: ColumnGrid, order: Tensor, *, last: bool = False
) -> None:
    """One pass over all codes, in place on q and gradient = H (w - q), both (cols, rows); order (cols,).

    After the `last` one the gradient is of no use: it is brought up to date for columns yet to come alone.
    """
    diagonal = h.diagonal()
    rounded, columns = BlockRounding(grid), order.tolist()
    done = torch.empty_like(q) if last else None  # changes, in order
    for start in range(0, len(columns), BLOCK):
        at, stop = order[start : start + BLOCK], min(start + BLOCK, len(columns))
        rows = h[at]  # H is symmetric
        pull = gradient[at]
        if done is not None:
            pull.addmm_(rows[:, order[:start]], done[:start])
        mine, own = q[at], diagonal[at]
        target = torch.addcdiv(mine, pull, own[:, None])
        q[at], change = rounded(columns[start:stop], target, mine, rows[:, at] / own)
        if done is None:
            gradient.addmm_(rows.T, change)
        else:
            done[start:stop] = change


def factors(q: Tensor, gradient: Tensor, h: Tensor, span: int) -> Tensor:
    """(groups, rows) by which the values of each group should be multiplied; gradient is H (w - q)."""
    cols, rows = q.shape
    groups = -(-cols // span)
    normal = q.new_empty(rows, groups, groups)
    for k in range(groups):
        part = slice(k * span, (k + 1) * span)
        rest = _by_group((h[k * span :, part] @ q[part]).mul_(q[k * span :]), span).T
        normal[:, k, k:] = rest
        normal[:, k:, k] = rest
    # t = 1 leaves q as it is: (V H V^T)(t - 1) = V H (w - q)
    right = _by_group(q * gradient, span).T.contiguous()
    # a group of zeros has no factor; a little ridge keeps nearly dependent groups where they are
    diagonal = normal.diagonal(dim1=1, dim2=2)
    diagonal += 1e-6 * diagonal + 1e-30 + (diagonal == 0).to(normal)
    found, _ = torch.linalg.solve_ex(normal, right)
    found = torch.where(torch.isfinite(found), found + 1, 1.0).clamp_(1 / _FURTHEST, _FURTHEST)
    return found.T.contiguous()


def improve(
    w: Tensor,
    q: Tensor,
    gradient: Tensor,
    h: Tensor,
    grid: ColumnGrid,
    order: Tensor,
    refit: Refit | None,
) -> tuple[Tensor, ColumnGrid]:
    """Better values than q (cols, rows), and their grid; `refit` is None where scales must stay.

    Overwrites q and gradient = H (w - q).
    """
    sweep(q, gradient, h, grid, order)
    rounds = ROUNDS if len(w) <= _WIDE else 1
    for k in range(rounds):
        if refit is not None:
            grid = _with_better_scales(w, q, gradient, h, grid, refit)
        sweep(q, gradient, h, grid, order, last=k == rounds - 1)
    return q, grid


def _with_better_scales(
    w: Tensor, q: Tensor, gradient: Tensor, h: Tensor, grid: ColumnGrid, refit: Refit
) -> ColumnGrid:
    """The new grid; q and gradient are changed in place."""
    new = refit(grid, factors(q, gradient, h, grid.span))
    before = (w - q).mul_(gradient).sum(0)  # e H e^T of every row
    moved = _codes_on(q, grid, new)
    error = w - moved
    pull = h @ error
    better = error.mul_(pull).sum(0) < before
    torch.where(better, moved, q, out=q)
    torch.where(better, pull, gradient, out=gradient)
    return replace(
        grid,
        scale=torch.where(better, new.scale, grid.scale),
        shift=torch.where(better, new.shift, grid.shift),
    )


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
