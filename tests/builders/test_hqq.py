"""HQQ: the proximal step against a search, and less error than round-to-nearest without any data."""

from __future__ import annotations

import numpy as np
import pytest

from builders.grids import has_grid
from builders.observers import minmax
from builders.quantize import AlgorithmOptions, get_algorithm
from edge_runtime.engine.formats import FORMATS, Array, get_format

HQQ, RTN, PLAIN = get_algorithm("hqq"), get_algorithm("rtn"), AlgorithmOptions()
WITH_GRID = [name for name, fmt in FORMATS.items() if has_grid(fmt)]


def matrix(rows: int, cols: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).standard_t(4, (rows, cols)).astype(np.float32) * np.float32(0.05)


@pytest.mark.parametrize("name", WITH_GRID)
def test_less_p_norm_and_squared_error_than_round_to_nearest(name: str) -> None:
    fmt, w = get_format(name), matrix(64, 192)
    mine, plain = (np.abs(fmt.decode(a.quantize(w, fmt, None, PLAIN), *w.shape) - w) for a in (HQQ, RTN))
    assert (mine**0.7).sum() < (plain**0.7).sum()
    assert np.square(mine).sum() < np.square(plain).sum()


@pytest.mark.parametrize(
    "name", ["int4_g64", "int4_g64_zp", "int4_g32_min", "q3_k", "nf4_g64", "fp8_e4m3_tensor"]
)
def test_steps_only_lower_the_p_norm(name: str) -> None:
    """From the extremes, as the paper begins, group by group (in total where groups share numbers)."""
    fmt, w = get_format(name), matrix(16, 192)
    ends = minmax(w, fmt)

    def error(low: Array, high: Array) -> Array:
        decoded = fmt.decode(fmt.encode_on_grid(w, fmt.grid_for(low, high)), *w.shape)
        found = np.abs(decoded - w) ** 0.7
        return found if name.endswith(("_k", "tensor")) else found.reshape(16, -1, fmt.span(192)).sum(2)

    before, after = error(*ends), error(*HQQ.refined(w, fmt, [ends]))
    assert after.sum() <= (1.0 if name.endswith("tensor") else 0.995) * before.sum()
    if before.ndim == 2 and before.shape[1] < 192:
        assert (after <= before * (1 + 1e-4)).all()


@pytest.mark.parametrize("beta", [3.0, 10.0])
def test_shrinking_is_one_step_of_the_proximal_problem(beta: float) -> None:
    """0 where the threshold passes the error, else |e| - |e|^(p-1)/beta: within a tenth of the true minimum
    p |x|^(p-1) sgn(x) = beta (e - x) for errors well above it, when its p is folded into beta."""
    e = np.linspace(-4, 4, 101).astype(np.float32)
    got = HQQ.shrink(e, beta)
    grid = np.linspace(-4, 4, 80001)
    for error, found in zip(e[np.abs(e) > 1], got[np.abs(e) > 1], strict=True):
        best = grid[np.argmin(np.abs(grid) ** 0.7 / 0.7 + beta / 2 * np.square(error - grid))]
        assert abs(found - best) < 0.1 * abs(error)
    assert (got[np.abs(e) < 0.1] == 0).all()


def test_formats_without_scales_are_encoded() -> None:
    for name in ("f16", "fp8_e5m2"):
        fmt, w = get_format(name), matrix(6, 40)
        got, want = HQQ.quantize(w, fmt, None, PLAIN), fmt.encode(w)
        assert all(np.array_equal(got[plane], want[plane]) for plane in want)


def test_zeros_stay_zeros() -> None:
    fmt, w = get_format("int4_g64"), np.zeros((4, 128), np.float32)
    assert not fmt.decode(HQQ.quantize(w, fmt, None, PLAIN), 4, 128).any()
