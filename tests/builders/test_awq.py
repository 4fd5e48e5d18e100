"""AWQ: the loss against the paper's, on inputs themselves; its search against all of its candidates."""

from __future__ import annotations

import numpy as np
import pytest
from made_weights import made_statistics

from builders.channel_scales import rounded, weight_error
from builders.grids import grid_for, has_grid
from builders.observers import minmax
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.statistics import InputStatistics, output_error
from edge_runtime.engine.formats import FORMATS, Array, get_format

AWQ, PLAIN = get_algorithm("awq"), AlgorithmOptions()
WITH_GRID = [name for name, fmt in FORMATS.items() if has_grid(fmt)]


def matrix(rows: int, cols: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).standard_t(5, (rows, cols)).astype(np.float32) * np.float32(0.05)


def test_the_loss_is_the_papers_mean_squared_output_error() -> None:
    """|| Q(W s) (x / s) - W x ||^2 over all inputs (equation 4), from the second moment alone."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(500, 64)) * np.exp(rng.normal(size=64))).astype(np.float32)
    inputs = InputStatistics(500, x.T @ x / 500, np.abs(x).max(0), np.abs(x).mean(0), x[:16])
    w, s = matrix(20, 64), np.exp(rng.normal(size=64)).astype(np.float32)
    fmt = get_format("int4_g32")
    q = fmt.decode(fmt.encode_on_grid(w * s, grid_for(fmt, *minmax(w * s, fmt))), 20, 64)
    want = np.square((x / s) @ q.T - x @ w.T, dtype=np.float64).sum(axis=1).mean()
    assert weight_error([w], [fmt], inputs, s) == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize("name", WITH_GRID)
def test_rounding_in_the_search_is_the_formats(name: str) -> None:
    fmt, w = get_format(name), matrix(10, 72)
    want = fmt.decode(fmt.encode_on_grid(w, grid_for(fmt, *minmax(w, fmt))), 10, 72)
    assert (np.abs(rounded(w, fmt) - want) <= 1e-6 * np.abs(want).max()).mean() > 0.995  # ties may differ


def test_the_scale_is_the_best_of_the_papers_exponents_or_better() -> None:
    fmt, inputs, ws = (
        get_format("int3_g64"),
        made_statistics(128, spread=1.5),
        [matrix(30, 128), matrix(9, 128, 4)],
    )
    losses = []
    for k in range(21):
        s = inputs.mean_abs.astype(np.float64) ** (k / 20)
        s = (s / np.sqrt(s.max() * s.min())).astype(np.float32)
        losses.append(weight_error(ws, [fmt, fmt], inputs, s))
    found = AWQ.scale_inputs(ws, [fmt, fmt], inputs, PLAIN)
    assert found.dtype == np.float32
    assert weight_error(ws, [fmt, fmt], inputs, found) <= min(losses) * (1 + 1e-6)
    assert min(losses) < 0.9 * losses[0]


def test_equal_channels_are_not_scaled_by_the_inputs() -> None:
    inputs = made_statistics(64, tokens=4000, spread=0.0)
    flat = InputStatistics(4000, np.eye(64, dtype=np.float32), *(np.ones(64, np.float32),) * 2, inputs.rows)
    s = AWQ.scale_inputs([np.ones((4, 64), np.float32)], [get_format("int4_g32")], flat, PLAIN)
    np.testing.assert_allclose(s, 1.0, rtol=1e-6)


def test_tied_columns_get_one_scale() -> None:
    ties = np.arange(64) % 8
    s = AWQ.scale_inputs([matrix(16, 64)], [get_format("int3_g64")], made_statistics(64), PLAIN, ties)
    assert all(len(np.unique(s[ties == t])) == 1 for t in range(8))
    assert len(np.unique(s)) > 1


@pytest.mark.parametrize("name", WITH_GRID)
def test_clips_lower_the_output_error_in_every_format(name: str) -> None:
    """Each group's own error e H_gg e is least by its search; with H of independent channels that is all."""
    fmt, w, made = get_format(name), matrix(24, 160), made_statistics(160)
    inputs = InputStatistics(
        made.count, np.diag(np.diag(made.hessian)), made.absmax, made.mean_abs, made.rows
    )
    planes = AWQ.quantize(w, fmt, inputs, PLAIN)
    fmt.check_planes(planes, *w.shape)
    mine = output_error(fmt.decode(planes, *w.shape) - w, inputs)
    plain = output_error(rounded(w, fmt) - w, inputs)
    assert mine <= plain * (1 + 1e-6)


def test_without_inputs_the_grid_of_least_error() -> None:
    fmt, w = get_format("int4_g32"), matrix(8, 64)
    error = np.square(fmt.decode(AWQ.quantize(w, fmt, None, PLAIN), 8, 64) - w).sum()
    assert error < np.square(rounded(w, fmt) - w).sum()
