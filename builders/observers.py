"""Observers: which range [low, high] of a group of values a grid should cover, by file-wide names.

Each takes values f32 (rows, cols), the Format that will hold them and an optional importance (cols,) of the
columns, and gives f32 (rows, groups) twice, for `Format.grid_for`. A range of activations is that of their
sampled rows laid out as one row: (1, n), in int8_row or fp8_e4m3_row.

minmax: the extremes. percentile: the 0.1 and 99.9 percent points, as in Wu et al. 2020, "Integer Quantization
for Deep Learning Inference". mse: least squared error, weighted by importance. entropy: least KL divergence
of the clipped histogram from its rounded one (Migacz 2017, "8-bit Inference with TensorRT"), of all groups in
one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from builders.grids import (
    affine,
    grid_for,
    group_errors,
    grouped,
    least_squares,
    levels_of,
    range_of,
    spread_importance,
)
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.formats.scaled import row_chunks
from edge_runtime.errors import BadConfig
from edge_runtime.errors import nearest as nearest_name

Range = tuple[Array, Array]
Observer = Callable[[Array, Format, Array | None], Range]

PERCENT = 0.1  # cut off at each end by `percentile`
BINS = 512  # of the histogram of magnitudes
STEPS = 15  # shrink factors of the first search
_LEAST = ((4, 0.25), (8, 0.35), (16, 0.5), (64, 0.65))  # up to so many levels: the least shrink factor


def get_observer(name: str) -> Observer:
    """The observer of that name. Raises BadConfig naming the nearest valid one."""
    if name not in OBSERVERS:
        raise BadConfig(f"unknown observer {name!r}; {nearest_name(name, OBSERVERS)}")
    return OBSERVERS[name]


def minmax(x: Array, fmt: Format, importance: Array | None = None) -> Range:
    """Least and greatest value of every group."""
    span = fmt.span(x.shape[1])
    low = np.empty((x.shape[0], -(-x.shape[1] // span)), np.float32)
    high = np.empty_like(low)
    for r in row_chunks(*x.shape):
        g = grouped(x[r], span)
        g.min(axis=2, out=low[r])
        g.max(axis=2, out=high[r])
    return low, high


def percentile(x: Array, fmt: Format, importance: Array | None = None) -> Range:
    """The PERCENT and 100 - PERCENT points of every group, interpolated; at least one value lies inside."""
    rows, cols = x.shape
    span = fmt.span(cols)
    low, high = minmax(x, fmt)
    for r in row_chunks(rows, cols):
        for part in {0, cols // span * span} if cols % span else {0}:  # a partial last group by itself
            stop = cols if part else cols // span * span
            if stop == part:
                continue
            g = x[r, part:stop].reshape(x[r].shape[0], -1, min(span, stop - part))
            at = slice(part // span, part // span + g.shape[1])
            low[r, at], high[r, at] = np.percentile(g, [PERCENT, 100 - PERCENT], axis=2)
    return low, high


def mse(x: Array, fmt: Format, importance: Array | None = None) -> Range:
    """The range with the least sum of importance * error^2, searched on the format's true grid.

    Shrunk ranges first, of both signs where levels reach further to one side, each end by itself where the
    format has a shift; then scales refitted to the levels by least squares.
    """
    return _Search(x, fmt, importance).run()


def entropy(x: Array, fmt: Format, importance: Array | None = None) -> Range:
    """The symmetric clip of least KL(clipped || rounded) over a histogram of magnitudes of BINS bins.

    As many rounded bins as the format has levels of one sign. Values beyond the clip count as its last bin.
    Where there are several groups, magnitudes are shares of their group's greatest and the clip is one share
    for all: a group of 64 values, or a row, leaves most bins empty, and the divergence then says nothing.
    """
    span, kept = fmt.span(x.shape[1]), max(2, len(levels_of(fmt)) // 2)
    low, high = minmax(x, fmt)
    weight = spread_importance(None, x.shape[1], span)  # none for what pads the last group
    top = np.maximum(np.abs(low), np.abs(high))
    counts = np.zeros(BINS)
    for r in row_chunks(*x.shape):
        g = np.abs(grouped(x[r], span))
        width = np.where(top[r] > 0, top[r], 1).astype(np.float32)[:, :, None] / np.float32(BINS)
        at = np.minimum((g / width).astype(np.int64), BINS - 1)
        counts += np.bincount(at.reshape(-1), np.broadcast_to(weight, at.shape).reshape(-1), BINS)
    limit = top * np.float32(_best_clip(counts[None], kept)[0] / BINS)
    return np.maximum(low, -limit), np.minimum(high, limit)


def _best_clip(counts: Array, kept: int) -> Array:
    """Bins (n,) at which histograms (n, BINS) are clipped with the least divergence."""
    best, found = np.full(len(counts), np.inf), np.full(len(counts), float(BINS))
    for stop in np.unique(np.linspace(min(kept, BINS), BINS, 64).astype(int))[::-1]:
        clipped = counts[:, :stop].copy()
        present = clipped > 0
        clipped[:, -1] += counts[:, stop:].sum(axis=1)
        # each rounded bin spreads the counts that it saw over those of its bins that held some
        edges = np.unique(np.linspace(0, stop, kept + 1).astype(int))
        sums = np.add.reduceat(counts[:, :stop] * present, edges[:-1], axis=1)
        holders = np.add.reduceat(present.astype(np.float64), edges[:-1], axis=1)
        share = np.repeat(sums / np.maximum(holders, 1), np.diff(edges), axis=1) * present
        divergence = _divergence(clipped, share)
        better = divergence < best
        best[better], found[better] = divergence[better], stop
    return found


def _divergence(p: Array, q: Array) -> Array:
    """KL of rows of counts, after normalisation; where q has nothing it gets a little (smoothing)."""
    q = np.where((p > 0) & (q == 0), 1e-4, q)
    p, q = (a / np.maximum(a.sum(axis=1, keepdims=True), 1e-30) for a in (p, q))
    terms = np.zeros_like(p)
    there = p > 0
    terms[there] = p[there] * np.log(p[there] / q[there])
    total: Array = terms.sum(axis=1)
    return total


class _Search:
    """The best ranges found so far, per group (per tensor where the format has one scale for all)."""

    def __init__(self, x: Array, fmt: Format, importance: Array | None) -> None:
        self.x, self.fmt = x, fmt
        self.levels = levels_of(fmt)
        self.span = fmt.span(x.shape[1])
        importance = _with_silent_groups(importance, self.span)
        self.weight = spread_importance(importance, x.shape[1], self.span)
        seen = x if importance is None or importance.all() else np.where(importance > 0, x, np.float32(0))
        self.low, self.high = minmax(seen, fmt)
        self.error = np.full(self.low.shape, np.inf)
        self.scale, self.shift = self.low, self.high  # of the best ranges

    def run(self) -> Range:
        low, high = self.low, self.high
        self.consider(low, high)
        scale, shift = affine(self.fmt, grid_for(self.fmt, low, high))
        shifted = bool(shift.any())
        factors = np.linspace(1.0, _least_factor(len(self.levels)), STEPS, dtype=np.float32)
        if (np.maximum(np.abs(low), np.abs(high)) > np.abs(scale * self.levels[-1] + shift) * 1.01).any():
            factors = np.concatenate([np.array([2.0, 1.5], np.float32), factors])  # the rule itself clips
        if shifted:
            self._search_ends(low, high, factors)
        else:
            self._search_signs(low, high, factors)
        for _ in range(2):
            fitted = least_squares(
                self.x, self.scale, self.shift, self.levels, self.span, self.weight, shifted=shifted
            )
            self.consider(*range_of(*fitted, self.levels))
        return self.low, self.high

    def _search_signs(self, low: Array, high: Array, factors: Array) -> None:
        """Scales of both signs; `low` and `high` may lie on one side of 0."""
        first, last = self.levels[0], self.levels[-1]
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        plain = np.maximum(low / first, high / last)
        flipped = np.maximum(-high / first, -low / last)
        for factor in factors:
            self.consider(first * factor * plain, last * factor * plain)
            if first != -last:
                self.consider(-last * factor * flipped, -first * factor * flipped)
        step = (factors[-2] - factors[-1]) / 2
        low, high = self.low, self.high
        for factor in (1 - step, 1 + step):
            self.consider(low * factor, high * factor)

    def _search_ends(self, low: Array, high: Array, factors: Array) -> None:
        for factor in factors:
            self.consider(low * factor, high * factor)
        step = (factors[-2] - factors[-1]) / 2
        for size in (2 * step, step, step / 2):
            for ends in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1)):
                reach = (self.high - self.low) * size
                self.consider(self.low + ends[0] * reach, self.high + ends[1] * reach)

    def consider(self, low: Array, high: Array) -> None:
        """Take the range wherever it has less error than the best one."""
        scale, shift = affine(self.fmt, grid_for(self.fmt, low, high))
        error = group_errors(self.x, scale, shift, self.levels, self.span, self.weight)
        if scale.shape[0] != error.shape[0]:  # one scale for all rows: they must agree
            error = np.full_like(error, error.sum())
        better = error < self.error
        self.error = np.where(better, error, self.error)
        self.low, self.high = np.where(better, low, self.low), np.where(better, high, self.high)
        self.scale, self.shift = np.where(better, scale, self.scale), np.where(better, shift, self.shift)


def _with_silent_groups(importance: Array | None, span: int) -> Array | None:
    """The importance with 1 in place of 0 where a whole group has none: it is rounded by itself."""
    if importance is None or importance.all():
        return importance
    known = np.add.reduceat(importance, np.arange(0, len(importance), span)) > 0
    filled: Array = np.where(np.repeat(known, span)[: len(importance)], importance, 1.0)
    return filled


def _least_factor(levels: int) -> float:
    return next((least for most, least in _LEAST if levels <= most), 0.8)


OBSERVERS: dict[str, Observer] = {
    "entropy": entropy,
    "minmax": minmax,
    "mse": mse,
    "percentile": percentile,
}
