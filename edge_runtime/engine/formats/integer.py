"""Group-wise integers: `int{2..6}_g{32,64,128}` symmetric, `int{2,3,4}_g{32,64,128}_zp` with zero points and
`int{4,5}_g32_min` with minima.

Symmetric: top = 2^(bits-1) - 1, scale = absmax / top, u = code + top + 1, value = (u - top - 1) * scale. The
default fit uses -top..top; a given grid may use the code below as well.
Zero point: the range is widened to include 0, top = 2^bits - 1, scale = (max - min) / top, zero =
round(-min / scale) in 0..top, value = (u - zero) * scale.
Minimum (llama.cpp's Q4_1 and Q5_1): min rounded down to f16, scale = (max - min) / top, value =
u * scale + min, the sum rounded once.
Scales are rounded up to f16, so that nothing clips by more than half a step. Codes of 3, 5 and 6 bits lie in
two planes, see codes.py.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import codes, scaled
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.errors import ValueOutOfRange

_LOW_BITS = {2: 2, 3: 2, 4: 4, 5: 4, 6: 4}  # of the first plane


def code_planes(bits: int, offset: int) -> tuple[Plane, ...]:
    """Planes of codes of 2 to 6 bits; an offset is part of the first one's encoding."""
    low = _LOW_BITS[bits]
    first = Plane("q", f"u{low}o{offset}" if offset else f"u{low}", 1)
    return (first,) if bits == low else (first, Plane("high", f"u{bits - low}", 1))


def _symmetric(name: str, bits: int, group: int) -> Format:
    top = (1 << (bits - 1)) - 1
    stored = code_planes(bits, top + 1)

    def fit(x: Array) -> dict[str, Array]:
        return {"scale": scaled.f16_scale(name, scaled.absmax(x, group) / np.float32(top))}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scaled.check_scales(name, grid)
        u = scaled.centred_codes(x, grid["scale"], group, top)
        return {**codes.join(stored, u), "scale": grid["scale"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        scale = planes["scale"].astype(np.float32)
        return codes.decode_centred(stored, planes, scale, group, (rows, cols), top + 1)

    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        return {"scale": scaled.signed_f16_scale(name, scaled.nearest_scale(low, high, -top - 1, top))}

    return Format(
        name,
        (*stored, Plane("scale", "f16", group)),
        lambda x: on_grid(x, fit(x)),
        decode,
        lambda values, planes: scaled.centred_bound(values, planes["scale"], group, top),
        "int",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        np.arange(-top - 1, top + 1, dtype=np.float32),
    )


def _zero_point(name: str, bits: int, group: int) -> Format:
    top = (1 << bits) - 1
    stored = code_planes(bits, 0)

    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        with np.errstate(over="ignore"):
            scale = scaled.f16_scale(name, (high - low) / np.float32(top))
        divisor = scale.astype(np.float32)
        divisor[divisor == 0] = np.inf
        return {"scale": scale, "zero": np.rint(-low / divisor).astype(np.uint8)}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        rows, cols = x.shape
        scaled.check_scales(name, grid)
        if grid["zero"].max() > top:
            raise ValueOutOfRange(f"{name}: the given zero point {grid['zero'].max()} lies outside 0..{top}")
        zero = grid["zero"].astype(np.float32)
        u = np.empty((rows, cols), np.uint8)
        for r, y in scaled.quotients(x, grid["scale"], group):
            np.rint(y, out=y)
            y.reshape(y.shape[0], -1, group)[...] += zero[r, :, None]
            np.clip(y, 0, top, out=y)
            u[r] = y[:, :cols]
        return {**codes.join(stored, u), "scale": grid["scale"], "zero": grid["zero"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = np.empty((rows, cols), np.float32)
        scale, zero = planes["scale"].astype(np.float32), planes["zero"].astype(np.float32)
        for r, code in codes.in_chunks(stored, planes, rows, cols):
            code -= scaled.spread(zero[r], group, (rows, cols))
            np.multiply(code, scaled.spread(scale[r], group, (rows, cols)), out=out[r])
        return out

    def bound(values: Array, planes: Planes) -> Array:
        step = scaled.spread(planes["scale"].astype(np.float64), group, values.shape)
        zero = scaled.spread(planes["zero"].astype(np.float64), group, values.shape)
        ends = (-zero * step, (top - zero) * step)
        return scaled.error_bound(values, np.abs(step) / 2, np.minimum(*ends), np.maximum(*ends))

    def affine(grid: Planes) -> tuple[Array, Array]:
        scale = grid["scale"].astype(np.float32)
        return scale, -scale * grid["zero"]

    return Format(
        name,
        (*stored, Plane("scale", "f16", group), Plane("zero", "u8", group)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        bound,
        "int",
        on_grid,
        grid_for,
        affine,
        np.arange(top + 1, dtype=np.float32),
    )


def _minimum(name: str, bits: int, group: int) -> Format:
    top = (1 << bits) - 1
    stored = code_planes(bits, 0)

    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        least = scaled.f16_below(name, low)
        with np.errstate(over="ignore"):
            span = np.maximum(high - least.astype(np.float32), np.float32(0))
            return {"scale": scaled.f16_scale(name, span / np.float32(top)), "min": least}

    def affine(grid: Planes) -> tuple[Array, Array]:
        return grid["scale"].astype(np.float32), grid["min"].astype(np.float32)

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scaled.check_scales(name, grid, "scale", "min")
        u = scaled.shifted_codes(x, *affine(grid), group, top)
        return {**codes.join(stored, u), "scale": grid["scale"], "min": grid["min"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        return codes.decode_shifted(stored, planes, *affine(planes), group, (rows, cols))

    return Format(
        name,
        (*stored, Plane("scale", "f16", group), Plane("min", "f16", group)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        lambda values, planes: scaled.shifted_bound(values, *affine(planes), group, top),
        "int",
        on_grid,
        grid_for,
        affine,
        np.arange(top + 1, dtype=np.float32),
    )


for _bits in (2, 3, 4, 5, 6):
    for _group in (32, 64, 128):
        register(_symmetric(f"int{_bits}_g{_group}", _bits, _group))
        if _bits <= 4:
            register(_zero_point(f"int{_bits}_g{_group}_zp", _bits, _group))
for _bits in (4, 5):
    register(_minimum(f"int{_bits}_g32_min", _bits, 32))
