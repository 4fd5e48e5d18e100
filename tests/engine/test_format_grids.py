"""What algorithms use of a format: given grids, grids for ranges, levels and the affine form."""

from __future__ import annotations

import numpy as np
import pytest
from format_bounds import SCALED, TENSOR, matrix

from edge_runtime.engine.formats import FORMATS, get_format, scaled
from edge_runtime.errors import Unsupported, ValueOutOfRange


@pytest.mark.parametrize("name", SCALED)
def test_values_on_the_grid_keep_their_codes(name: str) -> None:
    fmt = FORMATS[name]
    planes = fmt.encode(matrix(9, 193))
    again = fmt.encode_on_grid(fmt.decode(planes, 9, 193), planes)
    assert all(np.array_equal(again[p], planes[p]) for p in planes)


@pytest.mark.parametrize("name", SCALED)
def test_a_narrow_grid_clips_within_the_bound(name: str) -> None:
    fmt, x = FORMATS[name], matrix(9, 193)
    planes = fmt.encode(x)
    grid = {p.name: planes[p.name].copy() for p in fmt.grid_planes}
    for plane in fmt.grid_planes:
        if plane.encoding in ("f16", "f32"):
            grid[plane.name] /= 3
            grid[plane.name][2:3] = 0
        elif plane.encoding == "e8m0":
            grid[plane.name] -= 2
    planes = fmt.encode_on_grid(x, grid)
    decoded = fmt.decode(planes, *x.shape)
    assert (np.abs(x - decoded.astype(np.float64)) <= fmt.bound(x, planes)).all()
    if "index" in planes:  # columns of their own; the rest is clipped
        x[:, planes["index"][0]] = decoded[:, planes["index"][0]] = 0
    assert not decoded[2].any() or name in TENSOR or name == "mxfp4_g32"
    assert np.abs(decoded).max() < np.abs(x).max()


@pytest.mark.parametrize("name", SCALED)
def test_levels_and_affine_give_the_decoded_values(name: str) -> None:
    fmt, x = FORMATS[name], matrix(5, 300)
    planes = fmt.encode(x)
    assert fmt.levels is not None and fmt.affine is not None and (np.diff(fmt.levels) > 0).all()
    scale, shift = (np.broadcast_to(a, (5, a.shape[1])).astype(np.float64) for a in fmt.affine(planes))
    which = np.arange(300) // fmt.span(300)
    decoded = fmt.decode(planes, 5, 300).astype(np.float64)
    apart = planes["index"][0] if "index" in planes else []  # columns that hold values of their own
    values = fmt.levels.astype(np.float64) * scale[:, which, None] + shift[:, which, None]
    off = np.abs(values - decoded[..., None]).min(axis=2)
    off[:, apart] = 0
    assert (off <= (np.abs(decoded) + np.abs(shift[:, which])) * 2.0**-23).all()
    # no level is nearer to a value than the one that was chosen
    x[:, apart] = decoded[:, apart]
    nearest = np.abs(values - x.astype(np.float64)[..., None]).min(axis=2)
    error = np.abs(decoded - x)
    assert (error <= nearest * (1 + 2.0**-20) + (np.abs(x) + np.abs(shift[:, which])) * 2.0**-21).all()


@pytest.mark.parametrize("name", [n for n in SCALED if "fp4" not in n])
def test_a_grid_for_a_range_covers_it(name: str) -> None:
    """Up to half a step where zero points or the scales themselves are codes; the fp4 formats take the
    published scale."""
    fmt, x = FORMATS[name], matrix(5, 300)
    low, high = scaled.extent(x, fmt.span(300))
    low, high = low * np.float32(0.7), high * np.float32(0.9)  # not what encode() would take
    assert fmt.grid_for is not None and fmt.affine is not None and fmt.levels is not None
    scale, shift = fmt.affine(fmt.grid_for(low, high))
    ends = np.stack([fmt.levels[0] * scale + shift, fmt.levels[-1] * scale + shift])
    slack = np.abs(scale) * (0.5 if name.endswith("_zp") else 0) + np.maximum(-low, high) * 2.0**-20
    if name == "nf4_g64_dq":  # half the widest gap of the dynamic map
        slack += 0.9 / 128 * np.repeat(fmt.grid_for(low, high)["scale2"], 8, axis=1)[:, : low.shape[1]]
    assert (ends.min(axis=0) <= low + slack).all() and (ends.max(axis=0) >= high - slack).all()


def test_int4_grid_may_use_code_minus_8_and_a_negative_scale() -> None:
    fmt = get_format("int4_g32")
    x = np.array([[-8.0, 7.0, 9.0, -9.0]], np.float32)
    up = {"scale": np.array([[1.0]], np.float16)}
    down = {"scale": np.array([[-1.0]], np.float16)}
    assert fmt.decode(fmt.encode_on_grid(x, up), 1, 4).tolist() == [[-8, 7, 7, -8]]
    planes = fmt.encode_on_grid(x, down)
    assert fmt.decode(planes, 1, 4).tolist() == [[-7, 7, 8, -7]]
    assert (np.abs(x - fmt.decode(planes, 1, 4)) <= fmt.bound(x, planes)).all()


def test_grid_errors_name_what_is_wrong() -> None:
    x = matrix(2, 64)
    with pytest.raises(Unsupported, match="f16 has no scales"):
        get_format("f16").encode_on_grid(x, {})
    fmt = get_format("int4_g32_zp")
    grid = fmt.encode(x)
    with pytest.raises(ValueOutOfRange, match=r"plane 'zero' is missing, expected uint8 \(2, 2\)"):
        fmt.encode_on_grid(x, {"scale": grid["scale"]})
    with pytest.raises(ValueOutOfRange, match="plane 'scale' is float32"):
        fmt.encode_on_grid(x, grid | {"scale": grid["scale"].astype(np.float32)})
    with pytest.raises(ValueOutOfRange, match="holds NaN or Inf, expected finite scales"):
        fmt.encode_on_grid(x, grid | {"scale": grid["scale"] * np.float16(np.nan)})
    with pytest.raises(ValueOutOfRange, match=r"zero point 16 lies outside 0\.\.15"):
        fmt.encode_on_grid(x, grid | {"zero": np.full((2, 2), 16, np.uint8)})
