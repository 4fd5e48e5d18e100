"""Trellis formats in the builder: codes found by the runtime's native search, and the scales they go with.

A trellis format (tcq4_g64, …) has no levels to round to: the best codes of a column are a shortest path, see
edge_runtime/engine/formats/trellis.py. Scales are chosen before: each group's from a few around the deviation
of its values, by the error that the best path then has there.

Rows of a run share the path. Where it is known how much each of them matters (row_importance.py), errors are
weighted with that, here as `roots`: rows of little weight take error from their neighbours. With weights
whose logarithms deviate by 0.5, as those of a feed-forward block do, a tenth less is left of the whole; by
1.0 to 1.6, as in queries and keys, a third to more than a half. GPTQ of tcq4_g64 has a quarter less KL.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edge_runtime.backends.cpu import native_library
from edge_runtime.engine.formats import Array, Format, codes, scaled
from edge_runtime.engine.formats.microscaling import tensor_grid, tensor_scales
from edge_runtime.engine.formats.trellis import (
    GROUP,
    RUN,
    TrellisCode,
    runs,
    trellis_of,
    wanted_scales,
)

FACTORS = (0.87, 1.0, 1.15, 1.3, 1.5)  # of the scale that suits a normal distribution
REFITS = 2
_SAMPLED = 2  # one column of so many tells the factor
_WIDEST = 3.0  # factors that the tensor's scale leaves room for
_COLUMNS = 64  # searched by one thread at a time


def search(targets: Array, weights: Array, code: TrellisCode) -> tuple[Array, Array]:
    """Codes u8 and levels f32 that miss f32 targets least, all (chains, rows); a chain is a column."""
    found, level = np.empty(targets.shape, np.uint8), np.empty(targets.shape, np.float32)
    target, weight = (np.ascontiguousarray(x, np.float32) for x in (targets, weights))
    count, rows = target.shape
    pointers = (x.ctypes.data for x in (target, weight, found, level))
    native_library().edge_cpu_trellis_search(code.bits, rows, count, *pointers, 0)
    return found, level


def row_roots(importance: Array | None) -> Array | None:
    """f32 roots of the weights (rows,) of squared errors, by how much rows matter; None: all alike."""
    if importance is None or not importance.any():
        return None
    root: Array = np.sqrt(importance / importance.mean(dtype=np.float64)).astype(np.float32)
    return root


def quantize(
    x: Array, fmt: Format, importance: Array | None = None, roots: Array | None = None
) -> dict[str, Array]:
    """Planes of f32 values (rows, cols) in a trellis format; importance (cols,) of the squared errors of each
    column, None meaning 1; roots (rows,) as `row_roots` gives them. Raises ValueOutOfRange."""
    x = fmt.checked(x)
    return encode_on_grid(x, fmt, grid_for(x, fmt, importance, roots), roots)


def grid_for(
    x: Array, fmt: Format, importance: Array | None = None, roots: Array | None = None
) -> dict[str, Array]:
    """The planes `scale` and `super` that suit f32 values (rows, cols).

    A row's best scale depends on the other rows of its run, which share the path. So one factor is chosen for
    all scales of a run and group, by the error it leaves; then each scale is refitted to its values by least
    squares, as long as the run's error falls.
    """
    code = _code(fmt)
    weight = np.ones(x.shape[1], np.float32) if importance is None else importance.astype(np.float32)
    wanted = wanted_scales(x, code)
    unit = tensor_grid(wanted * np.float32(_WIDEST))["super"]

    def tried(grid: dict[str, Array], every: int = 1) -> tuple[Array, Array]:
        """Values on a grid, and the errors of blocks; of one in `every` columns."""
        scale, some = _spread(grid, x)[:, ::every], x[:, ::every]
        value = _search(some, scale, code, roots)[1] * scale
        missed = value - some if roots is None else (value - some) * roots[:, None]
        return value, _by_block(np.square(missed) * weight[::every], GROUP // every)

    errors = [tried(tensor_grid(wanted * np.float32(f), unit), _SAMPLED)[1] for f in FACTORS]
    factor = np.array(FACTORS, np.float32)[np.argmin(errors, axis=0)]
    grid = tensor_grid(wanted * _by_row(factor, len(x)), unit)
    best, least = grid, np.full_like(errors[0], np.inf)
    for _ in range(1 + REFITS):
        value, error = tried(grid)
        better = _by_row(error < least, len(x))
        best = {"scale": np.where(better, grid["scale"], best["scale"]), "super": unit}
        least = np.minimum(least, error)
        own = scaled.grouped(np.square(value) * weight, GROUP).sum(2)
        shared = scaled.grouped(x * value * weight, GROUP).sum(2)
        fitted = np.clip(np.divide(shared, own, out=np.ones_like(own), where=own > 0), 0.7, 1.4)
        # twice as far as the fit says, for codes follow their scale
        grid = tensor_grid(tensor_scales(grid) * np.square(fitted), unit)
    return best


def _by_block(x: Array, group: int) -> Array:
    """Sums over the runs of rows and the groups of columns, (runs, groups)."""
    groups: Array = scaled.grouped(x, group).sum(2, dtype=np.float64)
    return np.add.reduceat(groups, [first for first, _ in runs(len(x))], axis=0)


def _by_row(blocks: Array, rows: int) -> Array:
    """What each run has, (runs, groups), for each of its rows."""
    return np.repeat(blocks, RUN, axis=0)[:rows]


def encode_on_grid(
    x: Array, fmt: Format, grid: dict[str, Array], roots: Array | None = None
) -> dict[str, Array]:
    """Planes of f32 values (rows, cols) on given scales: `Format.encode_on_grid`, natively."""
    found, _ = _search(x, _spread(grid, x), _code(fmt), roots)
    return {**codes.join(fmt.codes, found), **grid}


def _code(fmt: Format) -> TrellisCode:
    code = trellis_of(fmt)
    assert code is not None  # callers have asked
    return code


def _spread(grid: dict[str, Array], x: Array) -> Array:
    """The scale of every value of x, f32 (rows, cols)."""
    return np.broadcast_to(scaled.spread(tensor_scales(grid), GROUP, x.shape), x.shape)


def _search(x: Array, scale: Array, code: TrellisCode, roots: Array | None) -> tuple[Array, Array]:
    """Codes u8 and levels f32; all (rows, cols)."""
    with np.errstate(over="ignore", under="ignore"):
        targets = x / np.where(scale == 0, np.float32(np.inf), scale)
    return best_paths(targets, _weights(scale, roots), code)


def best_paths(targets: Array, weights: Array, code: TrellisCode) -> tuple[Array, Array]:
    """As `search`, but all (rows, cols). Columns are shared out, and none depends on another."""

    def work(at: int) -> tuple[Array, Array]:
        part = slice(at, at + _COLUMNS)
        return search(targets[:, part].T, weights[:, part].T, code)

    starts = range(0, targets.shape[1], _COLUMNS)
    with ThreadPoolExecutor(min(len(starts), len(os.sched_getaffinity(0)))) as pool:
        parts = list(pool.map(work, starts))
    found, level = (np.concatenate(each).T for each in zip(*parts, strict=True))
    return found, level


def _weights(scale: Array, roots: Array | None) -> Array:
    """Of squared errors in levels, on f32 scales (rows, cols); those of a column may be multiplied by any
    number, so the largest is 1."""
    with np.errstate(over="ignore", under="ignore"):
        if roots is not None:
            scale = scale * roots[:, None]
        share = scale / np.maximum(scale.max(axis=0), scaled.TINY)
        found: Array = np.square(share, dtype=np.float32)
    return found


def nearest_column(wanted: Array, scale: Array, code: TrellisCode, roots: Array | None = None) -> Array:
    """f32 values (rows,) nearest to a column in units of its rows' scales; both (rows,), f64 or f32."""
    scale = scale.astype(np.float32)
    with np.errstate(over="ignore", under="ignore"):
        targets = wanted.astype(np.float32)
    _, level = search(targets[None], _weights(scale[:, None], roots).T, code)
    value: Array = level[0] * scale
    return value
