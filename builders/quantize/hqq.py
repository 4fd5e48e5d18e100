"""HQQ (Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"): no data needed.

Grids are refined so that sum |W - Q|^p falls, p = 0.7: a few outliers may err, the many other weights should
not. Half-quadratic splitting: with e = shrink(W - Q), the proximal step of the p-norm (generalised soft
threshold, Chartrand & Yin 2016) at strength beta, the grid is refitted to W - e by least squares with codes
fixed, and beta grows by kappa. The paper moves the zero point alone; here the scale moves too, and in formats
without a shift it is the only thing to move. The format rounds what was fitted, and a group takes it only if
its error falls. It starts from the extremes, as the paper, or from the range of least squared error (or that
of the user's observer), whichever has less p-norm error in the group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from builders.grids import (
    affine,
    grid_for,
    group_errors,
    has_grid,
    least_squares,
    levels_of,
    range_of,
    spread_importance,
)
from builders.observers import Range, get_observer
from builders.quantize import AlgorithmOptions, rtn
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format

ROW_WISE = True
CALIBRATED = False
P = 0.7  # of the norm; it, BETA and KAPPA are the paper's, for errors relative to the mean weight
BETA, KAPPA, STEPS = 10.0, 1.01, 20


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols); inputs are not used. Raises ValueOutOfRange."""
    if not has_grid(fmt):
        return rtn.quantize(weights, fmt, None, options)
    starts = [get_observer(name)(weights, fmt, None) for name in (options.observer or "mse", "minmax")]
    return fmt.encode_on_grid(weights, grid_for(fmt, *refined(weights, fmt, starts)))


def refined(weights: Array, fmt: Format, starts: Sequence[Range]) -> Range:
    """Ranges f32 (rows, groups) with no more p-norm error than the best of those given."""
    levels, span = levels_of(fmt), fmt.span(weights.shape[1])
    weight = spread_importance(None, weights.shape[1], span)
    unit = float(np.abs(weights).mean(dtype=np.float64)) or 1.0
    (low, high), *others = starts
    scale, shift, best = _measured(weights, fmt, low, high, weight)
    for a, b in others:
        other_scale, other_shift, error = _measured(weights, fmt, a, b, weight)
        better = error < best
        low, high, best = (np.where(better, n, o) for n, o in ((a, low), (b, high), (error, best)))
        scale, shift = np.where(better, other_scale, scale), np.where(better, other_shift, shift)
    shifted = bool(shift.any())
    beta = BETA
    for _ in range(STEPS):

        def aim(values: Array, rounded: Array, strength: float = beta) -> Array:
            return values - np.float32(unit) * shrink((values - rounded) / np.float32(unit), strength)

        fitted = least_squares(weights, scale, shift, levels, span, weight, shifted=shifted, aim=aim)
        a, b = range_of(*fitted, levels)
        new_scale, new_shift, error = _measured(weights, fmt, a, b, weight)
        better = error < best
        if not better.any():
            break
        best = np.where(better, error, best)
        low, high = np.where(better, a, low), np.where(better, b, high)
        scale, shift = np.where(better, new_scale, scale), np.where(better, new_shift, shift)
        beta *= KAPPA
    return low, high


def _measured(
    weights: Array, fmt: Format, low: Array, high: Array, weight: Array
) -> tuple[Array, Array, Array]:
    """(scale, shift, p-norm errors (rows, groups)) of ranges; one error for all where all share a scale."""
    scale, shift = affine(fmt, grid_for(fmt, low, high))
    error = group_errors(weights, scale, shift, levels_of(fmt), fmt.span(weights.shape[1]), weight, P)
    return scale, shift, error if len(scale) == len(error) else np.full_like(error, error.sum())


def shrink(error: Array, beta: float) -> Array:
    """argmin_e |e|^p + beta/2 |error - e|^2, by the generalised soft threshold: |e| - |e|^(p-1) / beta."""
    size = np.abs(error)
    with np.errstate(divide="ignore"):
        kept = np.maximum(size - size ** np.float32(P - 1) / np.float32(beta), np.float32(0))
    found: Array = np.sign(error) * kept
    return found
