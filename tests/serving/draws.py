"""How far counts of draws are from a distribution."""

from __future__ import annotations

import math

import numpy as np


def p_value(counts: np.ndarray, p: np.ndarray) -> float:
    """Of the chi-square test (Pearson); cells that expect fewer than five draws are one. Wilson and Hilferty
    1931 for the tail. 0 when something came that cannot.
    """
    if counts[p == 0].any():
        return 0.0
    expected = p * counts.sum()
    small = expected < 5
    want = np.append(expected[~small], expected[small].sum())
    have = np.append(counts[~small], counts[small].sum())
    want, have = want[want > 0], have[want > 0]
    degrees = len(want) - 1
    if degrees == 0:
        return 1.0
    x = float(((have - want) ** 2 / want).sum())
    z = ((x / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))
    return 0.5 * math.erfc(z / math.sqrt(2))


def variation(counts: np.ndarray, p: np.ndarray) -> float:
    return float(np.abs(counts / counts.sum() - p).sum() / 2)
