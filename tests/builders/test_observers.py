"""Observers against brute force and known distributions, on every format that has a grid."""

from __future__ import annotations

import numpy as np
import pytest

from builders.grids import affine, grid_for, has_grid, nearest, range_of
from builders.observers import OBSERVERS, get_observer
from edge_runtime.engine.formats import FORMATS, Array, Format, get_format
from edge_runtime.errors import BadConfig, Unsupported

WITH_GRID = [name for name, fmt in FORMATS.items() if has_grid(fmt)]


def matrix(rows: int, cols: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_t(4, (rows, cols)).astype(np.float32)


def error(x: Array, fmt: Format, low: Array, high: Array, importance: Array | None = None) -> float:
    decoded = fmt.decode(fmt.encode_on_grid(x, grid_for(fmt, low, high)), *x.shape)
    weight = np.ones(x.shape[1]) if importance is None else importance
    return float((np.square(decoded - x, dtype=np.float64) * weight).sum())


@pytest.mark.parametrize("name", WITH_GRID)
@pytest.mark.parametrize("observer", OBSERVERS)
def test_every_observer_gives_ranges_that_every_format_takes(name: str, observer: str) -> None:
    fmt, x = get_format(name), matrix(6, 72)  # with a partial last group in most
    low, high = get_observer(observer)(x, fmt, None)
    groups = -(-72 // fmt.span(72))
    assert low.shape == high.shape == (6, groups)
    assert low.dtype == high.dtype == np.float32
    assert (low <= high).all()
    assert error(x, fmt, low, high) < np.square(x).sum()


@pytest.mark.parametrize("name", WITH_GRID)
def test_a_grid_is_found_again_from_its_own_range(name: str) -> None:
    """What refitting scales rests on; formats of two levels round their groups' scales up, by a step."""
    fmt, x = get_format(name), matrix(6, 320)
    scale, shift = affine(fmt, grid_for(fmt, *get_observer("minmax")(x, fmt, None)))
    again = affine(fmt, grid_for(fmt, *range_of(scale, shift, fmt.levels)))
    allowed = 0.15 if name == "q2_k" else 0.02 if name.endswith(("_k", "_dq")) else 1e-6
    assert np.abs(again[0] / scale - 1).max() <= allowed
    assert np.abs(again[1] - shift).max() <= allowed * 4 * np.abs(shift).max()


def test_minmax_is_the_extremes() -> None:
    x = matrix(5, 70)
    low, high = get_observer("minmax")(x, get_format("int4_g32"), None)
    for g in range(3):
        part = x[:, 32 * g : 32 * g + 32]
        np.testing.assert_array_equal(low[:, g], part.min(axis=1))
        np.testing.assert_array_equal(high[:, g], part.max(axis=1))


def test_percentile_is_numpys_of_every_group() -> None:
    x = matrix(3, 300)
    for name, bounds in (("int8_row", [(0, 300)]), ("int4_g128", [(0, 128), (128, 256), (256, 300)])):
        low, high = get_observer("percentile")(x, get_format(name), None)
        for g, (a, b) in enumerate(bounds):
            np.testing.assert_allclose(low[:, g], np.percentile(x[:, a:b], 0.1, axis=1), rtol=1e-5)
            np.testing.assert_allclose(high[:, g], np.percentile(x[:, a:b], 99.9, axis=1), rtol=1e-5)


@pytest.mark.parametrize(("name", "slack"), [("int4_g32", 1.01), ("int3_g32", 1.02), ("int2_g32", 1.05)])
@pytest.mark.parametrize("weighted", [False, True])
def test_mse_against_brute_force_over_scales_of_both_signs(name: str, slack: float, weighted: bool) -> None:
    """4000 scales of each sign; the search is within a few percent of the best of them, in total."""
    fmt, x = get_format(name), matrix(20, 32)
    importance = np.exp(np.random.default_rng(4).normal(size=32)) if weighted else None
    w = np.ones(32) if importance is None else importance
    best, top = np.full(20, np.inf), np.abs(x).max(axis=1, keepdims=True) / -fmt.levels[0]
    for factor in np.linspace(0.2, 1.3, 4000):
        for scale in (top * factor, -top * factor):
            values = nearest(x / scale, fmt.levels) * scale
            best = np.minimum(best, (np.square(values - x) * w).sum(axis=1))
    low, high = get_observer("mse")(x, fmt, importance)
    assert error(x, fmt, low, high, importance) <= slack * best.sum()
    assert error(x, fmt, low, high, importance) < 0.95 * error(
        x, fmt, *get_observer("minmax")(x, fmt, None), importance
    )


@pytest.mark.parametrize("name", ["int3_g32_zp", "int4_g32_min", "q4_k"])
def test_mse_moves_both_ends_of_shifted_grids(name: str) -> None:
    """Against all pairs of shrunk ends, one group at a time."""
    fmt, x = get_format(name), matrix(8, 32)
    low, high = get_observer("minmax")(x, fmt, None)
    best = np.full(8, np.inf)
    for a in np.linspace(0.3, 1, 40):
        for b in np.linspace(0.3, 1, 40):
            decoded = fmt.decode(fmt.encode_on_grid(x, grid_for(fmt, low * a, high * b)), 8, 32)
            best = np.minimum(best, np.square(decoded - x).sum(axis=1))
    assert error(x, fmt, *get_observer("mse")(x, fmt, None)) <= 1.03 * best.sum()


def test_one_scale_for_a_tensor_is_chosen_for_all_rows_together() -> None:
    fmt, x = get_format("fp8_e4m3_tensor"), matrix(7, 50)
    ends = get_observer("mse")(x, fmt, None)
    assert error(x, fmt, *ends) <= error(x, fmt, *get_observer("minmax")(x, fmt, None))


def test_importance_of_zero_does_not_count() -> None:
    x = matrix(4, 32)
    x[:, 5] = 1000.0
    importance = np.ones(32)
    importance[5] = 0
    low, high = get_observer("mse")(x, get_format("int4_g32"), importance)
    assert max(np.abs(low).max(), np.abs(high).max()) < 100


def test_entropy_clips_far_outliers_and_keeps_a_flat_range() -> None:
    """TensorRT's example: a bulk with a few values ten times further out loses less when they are clipped."""
    fmt, rng = get_format("int8_row"), np.random.default_rng(6)
    bulk = rng.normal(size=(1, 20000)).astype(np.float32)
    bulk[0, :3] = [40, -40, 40]
    low, high = get_observer("entropy")(bulk, fmt, None)
    assert 2.5 < high[0, 0] < 20
    assert -20 < low[0, 0] < -2.5
    flat = rng.uniform(-1, 1, (1, 20000)).astype(np.float32)
    low, high = get_observer("entropy")(flat, fmt, None)
    assert high[0, 0] > 0.95
    assert low[0, 0] < -0.95


@pytest.mark.parametrize("name", ["int3_g32", "int4_g64", "int8_g64", "int8_row"])
def test_entropy_of_groups_is_one_share_of_their_greatest_and_harms_no_weights(name: str) -> None:
    """A histogram of 64 values says nothing: clips of each group's own left 3 dB of stories260K."""
    fmt, rng = get_format(name), np.random.default_rng(7)
    x = (rng.normal(size=(48, 256)) * rng.lognormal(0, 1, (48, 1))).astype(np.float32)
    low, high = get_observer("entropy")(x, fmt, None)
    least, most = get_observer("minmax")(x, fmt, None)
    top = np.maximum(-least, most)
    share = np.maximum(-low, high) / top
    assert share.min() > 0.3 and np.ptp(share) < 1e-6
    np.testing.assert_allclose(high, np.minimum(most, share.max() * top), rtol=1e-6)
    assert error(x, fmt, low, high) < 1.3 * error(x, fmt, least, most)


def test_wrong_names_and_formats_are_refused() -> None:
    with pytest.raises(BadConfig, match="did you mean 'minmax'"):
        get_observer("minmx")
    with pytest.raises(Unsupported, match="no scales"):
        get_observer("mse")(matrix(2, 8), get_format("f16"), None)
