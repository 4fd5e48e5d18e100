"""Round to nearest: every value within the format's bound, and int4's two grids against brute force."""

from __future__ import annotations

import numpy as np
import pytest

from builders.quantize import AlgorithmOptions, algorithms, get_algorithm
from edge_runtime.engine.formats import FORMATS, Array, get_format
from edge_runtime.errors import BadConfig, ValueOutOfRange

RTN, PLAIN = get_algorithm("rtn"), AlgorithmOptions()


def matrix(rows: int, cols: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, cols)).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cols", [1, 31, 64, 200])
def test_every_value_is_within_the_bound(name: str, cols: int) -> None:
    fmt, x = get_format(name), matrix(9, cols)
    planes = RTN.quantize(x, fmt, None, PLAIN)
    error = np.abs(fmt.decode(planes, 9, cols).astype(np.float64) - x)
    assert (error <= fmt.bound(x, planes)).all()


@pytest.mark.parametrize("name", [n for n in FORMATS if not any(p.whole for p in FORMATS[n].planes)])
def test_blocks_of_rows_give_the_same_planes(name: str) -> None:
    """What lets a build stream: every format without a per-tensor scale is quantized row by row."""
    fmt, x = get_format(name), matrix(12, 96)
    whole = RTN.quantize(x, fmt, None, PLAIN)
    blocks = [RTN.quantize(x[i : i + 5], fmt, None, PLAIN) for i in range(0, 12, 5)]
    for plane, data in whole.items():
        np.testing.assert_array_equal(np.concatenate([b[plane] for b in blocks]), data)


def plain_int4(x: Array, scale: float) -> Array:
    s = np.float64(np.float16(scale))
    return np.clip(np.rint(x / s), -8, 7) * s if s else np.zeros_like(x)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_takes_the_better_of_two_grids(group: int) -> None:
    fmt, x = get_format(f"int4_g{group}"), matrix(40, 4 * group)
    got = fmt.decode(RTN.quantize(x, fmt, None, PLAIN), *x.shape).astype(np.float64)
    signed_won = 0
    for r in range(40):
        for g in range(4):
            part = x[r, g * group : (g + 1) * group].astype(np.float64)
            own = np.float16(np.abs(part).max() / 7)
            if float(own) < np.float32(np.abs(part).max() / np.float32(7)):
                own = np.nextafter(own, np.float16(np.inf))
            signed = part[np.abs(part).argmax()] / -8
            errors = [np.square(plain_int4(part, float(s)) - part).sum() for s in (own, signed)]
            mine = np.square(got[r, g * group : (g + 1) * group] - part).sum()
            assert mine == pytest.approx(min(errors), rel=1e-4)
            signed_won += errors[1] < errors[0]
    assert 40 < signed_won < 160  # both grids are of use


def test_the_signed_grid_holds_a_lone_extreme_exactly() -> None:
    x = np.full((1, 32), 0.125, np.float32)
    x[0, 7] = -1.0  # -1 / -8 = 0.125: every value is a code
    fmt = get_format("int4_g32")
    np.testing.assert_array_equal(fmt.decode(RTN.quantize(x, fmt, None, PLAIN), 1, 32), x)


def test_zeros_stay_zeros() -> None:
    for name, fmt in FORMATS.items():
        decoded = fmt.decode(RTN.quantize(np.zeros((3, 70), np.float32), fmt, None, PLAIN), 3, 70)
        assert not decoded.any(), name


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    x = matrix(4, 64)
    x[2, 3] = bad
    for fmt in FORMATS.values():
        with pytest.raises(ValueOutOfRange):
            RTN.quantize(x, fmt, None, PLAIN)


def test_an_algorithm_is_found_by_its_file_name() -> None:
    assert "rtn" in algorithms()
    with pytest.raises(BadConfig, match="did you mean 'rtn'"):
        get_algorithm("rnt")
    with pytest.raises(BadConfig, match="unknown algorithm"):
        get_algorithm("../rtn")
