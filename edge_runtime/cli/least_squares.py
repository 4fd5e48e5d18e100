"""Least squares with no negative unknown: a time that is fitted cannot be less than none."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F64 = NDArray[np.float64]
_SMALL = 1e-12  # of the largest: a slope that is none


def nonnegative(a: F64, b: F64) -> F64:
    """The x >= 0 of least |a x - b|. a: (equations, unknowns). Columns of zeros get 0.

    The active-set method of Lawson & Hanson (Solving Least Squares Problems, 1974, chapter 23): the unknown
    of the steepest slope joins those above zero; what that turns negative leaves them again.
    """
    sizes = np.linalg.norm(a, axis=0)
    scaled = a / np.where(sizes > 0, sizes, 1.0)
    x = np.zeros(a.shape[1])
    free = np.zeros(a.shape[1], bool)
    least = _SMALL * max(1e-300, float(np.linalg.norm(b)))
    for _ in range(3 * a.shape[1]):
        slope = scaled.T @ (b - scaled @ x)
        slope[free | (sizes == 0)] = -np.inf
        steepest = int(np.argmax(slope))
        if slope[steepest] <= least:
            break
        free[steepest] = True
        while free.any():
            wanted = np.zeros_like(x)
            wanted[free] = np.linalg.lstsq(scaled[:, free], b, rcond=None)[0]
            if (wanted[free] > 0).all():
                x = wanted
                break
            below = free & (wanted <= 0)
            share = float(np.min(x[below] / np.maximum(x[below] - wanted[below], 1e-300)))
            x = x + share * (wanted - x)
            free &= x > least * _SMALL
            x[~free] = 0.0
    result: F64 = x / np.where(sizes > 0, sizes, 1.0)
    return result
