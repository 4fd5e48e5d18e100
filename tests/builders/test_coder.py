"""Coders: one question for every format with scales, and the same answers as their own codecs."""

from __future__ import annotations

import numpy as np
import pytest

from builders.coder import LevelCoder, coder_of
from builders.grids import grid_for, has_grid
from builders.observers import minmax
from edge_runtime.engine.formats import FORMATS, Array, get_format
from edge_runtime.errors import BadConfig

WITH_GRID = {name for name, fmt in FORMATS.items() if has_grid(fmt)}
TRELLIS = {"tcq2_g64", "tcq3_g64", "tcq4_g64"}


def matrix(rows: int, cols: int) -> Array:
    return np.random.default_rng(3).standard_t(5, (rows, cols)).astype(np.float32) * np.float32(0.05)


def importance(rows: int) -> Array:
    found = np.random.default_rng(4).uniform(0.1, 4, rows).astype(np.float32)
    found[6:14] = 0
    return found


def test_formats_with_scales_have_a_coder_and_those_of_a_trellis_need_no_observer() -> None:
    assert {name for name, fmt in FORMATS.items() if coder_of(fmt, "mse")} == WITH_GRID | TRELLIS
    assert {name for name, fmt in FORMATS.items() if coder_of(fmt, None)} == TRELLIS


@pytest.mark.parametrize("name", ["tcq3_g64", "int4_g64", "f16"])
def test_a_mistyped_observer_is_named(name: str) -> None:
    with pytest.raises(BadConfig, match="minmx"):
        coder_of(get_format(name), "minmx")


@pytest.mark.parametrize("name", sorted(WITH_GRID | TRELLIS))
def test_values_on_a_grid_keep_their_codes(name: str) -> None:
    """Also in rows that do not matter."""
    fmt, w, matter = get_format(name), matrix(24, 130), importance(24)
    coder = coder_of(fmt, "minmax", matter)
    assert coder is not None
    planes = coder.quantize(w)
    grid = {p.name: planes[p.name] for p in fmt.grid_planes}
    values = fmt.decode(planes, *w.shape)
    again = fmt.decode(coder.encode(values, grid), *w.shape)
    if name in TRELLIS:
        assert np.array_equal(again, values)
    np.testing.assert_allclose(again, values, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", sorted(TRELLIS | {"int4_g32", "int3_g64_zp", "nf4_g64", "q4_k"}))
def test_a_column_is_rounded_as_the_matrix_is(name: str) -> None:
    """Of a matrix of 48 rows, rows 24 to 47 by columns, against these rows as a matrix of their own."""
    torch = pytest.importorskip("torch")
    fmt, w, matter = get_format(name), matrix(24, 130), importance(24)
    alone = coder_of(fmt, "minmax", matter)
    whole = coder_of(fmt, "minmax", np.concatenate([matter[::-1], matter]))
    assert alone is not None and whole is not None and fmt.affine is not None
    planes = alone.quantize(w)
    want = fmt.decode(planes, *w.shape)
    nearest = whole.nearest(slice(24, 48), torch.empty(0, dtype=torch.float64))
    for column in (0, 63, 64, 129):
        scale, shift = (a[:, column // fmt.span(130)].astype(np.float64) for a in fmt.affine(planes))
        wanted, value = torch.from_numpy((w[:, column] - shift) / scale), torch.empty(24, dtype=torch.float64)
        nearest(wanted, torch.from_numpy(scale), value)
        np.testing.assert_allclose(value.numpy() + shift, want[:, column], rtol=1e-5, atol=1e-9)


def test_levels_take_the_grid_of_the_observer() -> None:
    fmt, w = get_format("int4_g32"), matrix(8, 64)
    got, want = LevelCoder(fmt, minmax).grid_for(w), grid_for(fmt, *minmax(w, fmt))
    assert all(np.array_equal(got[p], want[p]) for p in want)
