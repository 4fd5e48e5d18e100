"""Arithmetic on a Format's grids that every algorithm shares: nearest levels, errors of groups, ranges.

A grid's value is level * scale + shift, scale and shift f32 (rows, groups) or (1, 1); see Format. All sums
run over row chunks, so that a large matrix needs little memory beside itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.formats.scaled import row_chunks
from edge_runtime.errors import Unsupported


def has_grid(fmt: Format) -> bool:
    """Whether all values of the format lie on grids that an algorithm can choose.

    Not those of int8_row_o128: values of its outlier columns lie on none; see `int8_outlier`.
    """
    has = fmt.grid_for is not None and fmt.affine is not None and fmt.levels is not None
    return has and not any(p.derived for p in fmt.planes)


def levels_of(fmt: Format) -> Array:
    """Ascending f32 levels. Raises Unsupported for a format without scales."""
    if fmt.levels is None or not has_grid(fmt):
        raise Unsupported(f"{fmt.name} has no scales to choose; use the algorithm 'rtn' for it")
    return fmt.levels


def grid_for(fmt: Format, low: Array, high: Array) -> dict[str, Array]:
    """The format's grid for ranges f32 (rows, groups). Raises Unsupported without scales, ValueOutOfRange."""
    levels_of(fmt)
    assert fmt.grid_for is not None
    return fmt.grid_for(np.asarray(low, np.float32), np.asarray(high, np.float32))


def affine(fmt: Format, grid: dict[str, Array]) -> tuple[Array, Array]:
    """(scale, shift) f32 (rows or 1, groups). Raises Unsupported for a format without scales."""
    levels_of(fmt)
    assert fmt.affine is not None
    return fmt.affine(grid)


def is_uniform(levels: Array) -> bool:
    """Whether levels are consecutive whole numbers, so that rounding finds the nearest."""
    return bool((np.diff(levels) == 1).all() and levels[0] == np.rint(levels[0]))


def nearest(y: Array, levels: Array) -> Array:
    """The level nearest to every y, f32; ties of uniform levels go to the even one."""
    if is_uniform(levels):
        return np.clip(np.rint(y), levels[0], levels[-1])
    middle = (levels[1:].astype(np.float64) + levels[:-1]) / 2
    found: Array = levels[np.searchsorted(middle.astype(np.float32), y)]
    return found


def grouped(x: Array, span: int) -> Array:
    """(rows, cols) as (rows, groups, span); a partial last group repeats its last value."""
    rows, cols = x.shape
    if cols % span:
        x = np.pad(x, ((0, 0), (0, -cols % span)), mode="edge")
    return x.reshape(rows, -1, span)


def spread_importance(importance: Array | None, cols: int, span: int) -> Array:
    """f32 (groups, span) of an importance (cols,), None meaning 1; 0 where a partial last group is padded."""
    flat = np.ones(cols, np.float32) if importance is None else importance.astype(np.float32)
    return np.pad(flat, (0, -cols % span)).reshape(-1, span)


def _levels_in_chunks(
    x: Array, scale: Array, shift: Array, levels: Array, span: int
) -> Iterator[tuple[slice, Array, Array, Array, Array]]:
    """Row chunks as (slice, values, nearest levels (r, groups, span), scale, shift (r, groups, 1))."""
    rows, cols = x.shape
    groups = -(-cols // span)
    scale, shift = (np.broadcast_to(a, (rows, groups)) for a in (scale, shift))
    for r in row_chunks(rows, cols):
        g, s, m = grouped(x[r], span), scale[r, :, None], shift[r, :, None]
        divisor = np.where(s == 0, np.float32(np.inf), s)
        with np.errstate(over="ignore", under="ignore"):
            y = (g - m) / divisor if m.any() else g / divisor
        yield r, g, nearest(y, levels), s, m


def group_errors(
    x: Array, scale: Array, shift: Array, levels: Array, span: int, weight: Array, power: float = 2.0
) -> Array:
    """sum of weight * |x - rounded|^power of every group, f64 (rows, groups); weight f32 (groups, span)."""
    found = np.empty((x.shape[0], weight.shape[0]))
    for r, g, z, s, m in _levels_in_chunks(x, scale, shift, levels, span):
        z *= s
        z += m
        z -= g
        if power == 2.0:
            np.square(z, out=z)
        else:
            z = np.abs(z) ** np.float32(power)
        found[r] = np.einsum("rgs,gs->rg", z, weight)
    return found


def least_squares(
    x: Array,
    scale: Array,
    shift: Array,
    levels: Array,
    span: int,
    weight: Array,
    *,
    shifted: bool,
    aim: Callable[[Array, Array], Array] | None = None,
) -> tuple[Array, Array]:
    """Scale (and shift, where `shifted`) that fit x best, weighted, with the levels that x has now.

    aim(values, rounded), both (r, groups, span): what to fit in place of the values.
    Returns f32 (rows, groups) each; a group without information keeps what it has.
    """
    rows, groups = x.shape[0], weight.shape[0]
    new_scale = np.broadcast_to(scale, (rows, groups)).astype(np.float32)
    new_shift = np.broadcast_to(shift, (rows, groups)).astype(np.float32)
    for r, g, z, s, m in _levels_in_chunks(x, scale, shift, levels, span):
        if aim is not None:
            g = aim(g, z * s + m)
        szz = np.einsum("rgs,rgs,gs->rg", z, z, weight, dtype=np.float64)
        szx = np.einsum("rgs,rgs,gs->rg", z, g if shifted else g - m, weight, dtype=np.float64)
        if shifted:
            s1 = np.broadcast_to(weight.sum(axis=1, dtype=np.float64), szz.shape)
            sz = np.einsum("rgs,gs->rg", z, weight, dtype=np.float64)
            sx = np.einsum("rgs,gs->rg", g, weight, dtype=np.float64)
            det = szz * s1 - sz * sz
            known = det > 1e-9 * szz * s1
            det = np.where(known, det, 1.0)
            fitted = (szx * s1 - sz * sx) / det
            new_shift[r] = np.where(known, (szz * sx - sz * szx) / det, new_shift[r])
        else:
            known = szz > 0
            fitted = szx / np.where(known, szz, 1.0)
        new_scale[r] = np.where(known, fitted, new_scale[r])
    return new_scale, new_shift


def range_of(scale: Array, shift: Array, levels: Array) -> tuple[Array, Array]:
    """(low, high) of the levels on a grid: what `Format.grid_for` turns back into that grid, or nearly.

    Ranges are a hair narrower, for codecs round scales up: an exact scale is then found again.
    """
    inner = np.float64(1.0 - 2.0**-21)
    a, b = (np.float64(end) * scale.astype(np.float64) * inner + shift for end in (levels[0], levels[-1]))
    return np.minimum(a, b).astype(np.float32), np.maximum(a, b).astype(np.float32)
