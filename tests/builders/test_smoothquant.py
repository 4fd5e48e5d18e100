"""SmoothQuant: equation 4, the identity before rounding, and int8 activations with outlier channels."""

from __future__ import annotations

import numpy as np
import pytest
from made_weights import made_statistics

from builders.quantize import AlgorithmOptions, get_algorithm
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, get_format

SMOOTH, PLAIN = get_algorithm("smoothquant"), AlgorithmOptions()
INT8 = get_format("int8_row")


def matrix(rows: int, cols: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, cols)).astype(np.float32)


def outlier_inputs(cols: int = 64) -> InputStatistics:
    """Two channels a hundred times larger than the others, as in the paper's figure 4."""
    rng = np.random.default_rng(1)
    x = rng.normal(size=(256, cols)).astype(np.float32)
    x[:, [5, 40]] *= 100
    return InputStatistics(256, x.T @ x / 256, np.abs(x).max(0), np.abs(x).mean(0), x)


def paper_loss(w: Array, x: Array, s: Array) -> float:
    """Y = (X diag(s)^-1)(diag(s) W), both factors rounded to int8 per row; f64 around the rounding."""

    def int8(a: Array) -> Array:
        step = np.abs(a).max(axis=1, keepdims=True).astype(np.float64) / 127
        return np.rint(a / step) * step

    return float(np.square(int8(x / s) @ int8(w * s).T - x.astype(np.float64) @ w.T.astype(np.float64)).sum())


def test_the_loss_is_that_of_rounded_inputs_and_weights() -> None:
    inputs, w = outlier_inputs(), matrix(20, 64)
    s = np.exp(np.random.default_rng(4).normal(size=64)).astype(np.float32)
    assert SMOOTH.output_loss([w], [INT8], inputs.rows, s) == pytest.approx(
        paper_loss(w, inputs.rows, s), rel=0.01
    )


def test_the_scale_is_equation_4_with_the_best_strength() -> None:
    inputs, w = outlier_inputs(), matrix(20, 64)
    losses = {}
    for k in range(21):
        s = inputs.absmax.astype(np.float64) ** (k / 20) / np.abs(w).max(axis=0).astype(np.float64) ** (
            1 - k / 20
        )
        losses[k] = paper_loss(w, inputs.rows, (s / np.sqrt(s.max() * s.min())).astype(np.float32))
    found = SMOOTH.scale_inputs([w], [INT8], inputs, PLAIN)
    assert paper_loss(w, inputs.rows, found) <= 1.02 * min(losses.values())
    assert paper_loss(w, inputs.rows, found) < 0.1 * paper_loss(w, inputs.rows, np.ones(64))
    assert found[5] > 5 * np.median(found)


def test_products_are_the_same_before_rounding() -> None:
    inputs, w = outlier_inputs(), matrix(20, 64)
    s = SMOOTH.scale_inputs([w], [INT8], inputs, PLAIN)
    want = inputs.rows.astype(np.float64) @ w.T
    got = (inputs.rows / s).astype(np.float64) @ (w * s).T
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()


def test_tied_columns_get_one_scale() -> None:
    ties = np.arange(64) % 16
    s = SMOOTH.scale_inputs([matrix(16, 64)], [INT8], made_statistics(64, spread=2.0), PLAIN, ties)
    assert all(len(np.unique(s[ties == t])) == 1 for t in range(16))


def test_channels_that_never_fired_keep_everything_finite() -> None:
    inputs = outlier_inputs()
    x = inputs.rows.copy()
    x[:, 7] = 0
    silent = InputStatistics(256, x.T @ x / 256, np.abs(x).max(0), np.abs(x).mean(0), x)
    s = SMOOTH.scale_inputs([matrix(20, 64)], [INT8], silent, PLAIN)
    assert np.isfinite(s).all()
    assert (s > 0).all()
