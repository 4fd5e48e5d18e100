"""Scales of quantized planes: how rows are cut into groups, how a scale is rounded, and the error it allows.

All functions work in row chunks, so that encoding a large matrix needs little more memory than its codes.
`group` is the number of columns that share a scale; a last group may be partial.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edge_runtime.engine.formats.record import Array, Per, Planes
from edge_runtime.errors import ValueOutOfRange

CHUNK = 1 << 17  # f32 elements worked on at a time; three such arrays fit a 2 MiB cache
TINY = np.float32(2.0**-126)  # f32 scales are never denormal: a kernel may flush denormals to zero


def row_chunks(rows: int, cols: int) -> Iterator[slice]:
    """Slices of rows that hold about CHUNK elements each."""
    step = max(1, CHUNK // cols)
    for start in range(0, rows, step):
        yield slice(start, min(rows, start + step))


def width(per: Per, cols: int) -> int:
    """Columns that share a scale."""
    return per if isinstance(per, int) else cols


def grouped(x: Array, group: int) -> Array:
    """(r, cols) as (r, groups, group), zero-padded when the last group is partial."""
    rows, cols = x.shape
    groups = -(-cols // group)
    if groups * group != cols:
        x = np.pad(x, ((0, 0), (0, groups * group - cols)))
    return x.reshape(rows, groups, group)


def extent(x: Array, group: int) -> tuple[Array, Array]:
    """Least and greatest value of every group, both (rows, groups), widened to include 0."""
    rows, cols = x.shape
    low = np.empty((rows, -(-cols // group)), np.float32)
    high = np.empty_like(low)
    for r in row_chunks(rows, cols):
        g = grouped(x[r], group)
        g.min(axis=2, out=low[r])
        g.max(axis=2, out=high[r])
    return np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))


def absmax(x: Array, group: int) -> Array:
    """Greatest magnitude of every group: (rows, groups) f32."""
    low, high = extent(x, group)
    return np.abs(np.maximum(high, -low))  # the maximum of 0 and -0 may be either


def f16_scale(name: str, wanted: Array) -> Array:
    """The least f16 at or above each wanted scale: no value clips. Raises ValueOutOfRange beyond f16."""
    with np.errstate(over="ignore"):
        scale = wanted.astype(np.float16)
    short = scale.astype(np.float32) < wanted
    scale[short] = np.nextafter(scale[short], np.float16(np.inf))
    if not np.isfinite(scale).all():
        raise ValueOutOfRange(
            f"{name}: a group needs the scale {wanted.max():.6g}, but its f16 scale ends at 65504; "
            "use a format with f32 scales (int8_row, fp8_e4m3_row) or mend the outlier"
        )
    return scale


def f32_scale(absolute: Array, largest: float) -> Array:
    """absolute / largest as f32: 0 for a row of zeros, else never denormal; largest * it never overflows."""
    with np.errstate(over="ignore", under="ignore"):
        scale: Array = np.maximum(absolute / np.float32(largest), TINY)
        scale[absolute == 0] = 0
        beyond = np.isinf(scale * np.float32(largest))
    scale[beyond] = np.nextafter(scale[beyond], np.float32(0))
    return scale


def quotients(x: Array, scale: Array, group: int) -> Iterator[tuple[slice, Array]]:
    """Row chunks of x / scale as (slice, (r, groups*group) f32); a zero scale gives 0.

    scale: (rows, groups), or (1, 1) for one scale in all. One f32 division: at most 2^-24 relative error.
    """
    rows, cols = x.shape
    divisor = scale.astype(np.float32)
    divisor[divisor == 0] = np.inf
    divisor = np.broadcast_to(divisor, (rows, divisor.shape[1]))
    for r in row_chunks(rows, cols):
        g = grouped(x[r], group)
        with np.errstate(over="ignore", under="ignore"):
            yield r, (g / divisor[r, :, None]).reshape(g.shape[0], -1)


def spread(plane: Array, group: int, shape: tuple[int, int]) -> Array:
    """A scale or zero plane repeated to one entry per weight: (rows, cols), or broadcastable to it."""
    return plane if plane.shape[1] == 1 else np.repeat(plane, group, axis=1)[:, : shape[1]]


def error_bound(x: Array, half_step: Array, low: Array, high: Array) -> Array:
    """f64 bound of |x - decoded|: half a step inside the grid [low, high], outside it the way to its end.

    The division x / scale and the product code * scale each err by at most 2^-24 of their result.
    """
    v = x.astype(np.float64)
    outside = np.maximum(np.maximum(v - high, low - v), 0)
    bound: Array = np.maximum(half_step * (1 + 2.0**-22), outside) + np.abs(v) * 2.0**-22 + 2.0**-149
    return bound


def half_ulp(y: Array, least_exponent: int, mantissa_bits: int) -> Array:
    """Half the distance of neighbours around y (f64) in a binary float with gradual underflow."""
    exponent = np.frexp(y)[1] - 1
    exponent[y == 0] = least_exponent
    half: Array = np.ldexp(1.0, np.maximum(exponent, least_exponent) - mantissa_bits - 1)
    return half


def f16_below(name: str, wanted: Array) -> Array:
    """The greatest f16 at or below each wanted minimum. Raises ValueOutOfRange beyond f16."""
    with np.errstate(over="ignore"):
        least: Array = (wanted + np.float32(0)).astype(np.float16)  # -0 becomes 0
    beyond = least.astype(np.float32) > wanted
    least[beyond] = np.nextafter(least[beyond], np.float16(-np.inf))
    if not np.isfinite(least).all():
        raise ValueOutOfRange(
            f"{name}: a group begins at {wanted.min():.6g}, but its f16 minimum ends at -65504; "
            "use a format with f32 scales (int8_row, fp8_e4m3_row) or mend the outlier"
        )
    return least


def centred_codes(x: Array, scale: Array, group: int, top: int) -> Array:
    """Codes u8 of round(x / scale) + top + 1, clipped to -top - 1..top before the shift."""
    u = np.empty(x.shape, np.uint8)
    for r, y in quotients(x, scale, group):
        np.rint(y, out=y)
        np.clip(y, -top - 1, top, out=y)
        y += np.float32(top + 1)
        u[r] = y[:, : x.shape[1]]
    return u


def centred_bound(values: Array, scale: Array, group: int, top: int) -> Array:
    """`error_bound` of values = (code - top - 1) * scale."""
    step = spread(scale.astype(np.float64), group, values.shape)
    ends = ((-top - 1) * step, top * step)
    return error_bound(values, np.abs(step) / 2, np.minimum(*ends), np.maximum(*ends))


def shifted_codes(x: Array, scale: Array, shift: Array, group: int, top: int) -> Array:
    """u8 codes round_half_even((x - shift) / scale) in 0..top, (rows, cols); a zero scale gives 0.

    scale, shift: f32 (rows, groups). The difference and the quotient are each rounded to f32.
    """
    rows, cols = x.shape
    u = np.empty((rows, cols), np.uint8)
    divisor = np.where(scale == 0, np.float32(np.inf), scale)
    for r in row_chunks(rows, cols):
        with np.errstate(over="ignore", under="ignore"):
            y = (grouped(x[r], group) - shift[r, :, None]) / divisor[r, :, None]
        np.rint(y, out=y)
        np.clip(y, 0, top, out=y)
        u[r] = y.reshape(y.shape[0], -1)[:, :cols]
    return u


def shifted_bound(values: Array, scale: Array, shift: Array, group: int, top: int) -> Array:
    """`error_bound` where value = code * scale + shift, scale and shift f32 (rows, groups).

    The f32 difference x - shift and the f32 sum err by at most 2^-24 of numbers no larger than |x| + |shift|.
    """
    step = spread(scale.astype(np.float64), group, values.shape)
    start = spread(shift.astype(np.float64), group, values.shape)
    ends = (start, start + top * step)
    bound = error_bound(values, np.abs(step) / 2, np.minimum(*ends), np.maximum(*ends))
    bound += np.abs(start) * 2.0**-22
    return bound


def check_scales(name: str, grid: Planes, *planes: str) -> None:
    """Raises ValueOutOfRange when an item of the given planes (default: `scale`) is not finite."""
    for plane in planes or ("scale",):
        if not np.isfinite(grid[plane]).all():
            raise ValueOutOfRange(
                f"{name}: the given plane {plane!r} holds NaN or Inf, expected finite scales"
            )


def nearest_scale(low: Array, high: Array, least: float, greatest: float) -> Array:
    """The scale of least magnitude with which levels least..greatest (around 0) cover [low, high].

    It is negative where the longer end of the levels serves the longer end of the range only when flipped.
    """
    low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
    plain = np.maximum(low / np.float32(least), high / np.float32(greatest))
    flipped = np.maximum(high / np.float32(-least), low / np.float32(-greatest))
    scale: Array = np.where(flipped < plain, -flipped, plain).astype(np.float32)
    return scale


def signed_f16_scale(name: str, wanted: Array) -> Array:
    """`f16_scale` of the magnitudes, with the signs of `wanted`."""
    scale: Array = np.copysign(f16_scale(name, np.abs(wanted)), wanted.astype(np.float16))
    return scale


def unshifted(scale: Array) -> tuple[Array, Array]:
    """(scale, shift) of a grid without shift, f32."""
    wide = scale.astype(np.float32)
    return wide, np.zeros_like(wide)
