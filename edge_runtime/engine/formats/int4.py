"""Group-wise int4 with f16 scales: `int4_g{32,64,128}` symmetric, `int4_g{32,64,128}_zp` with zero points.

Symmetric: scale = absmax / 7, nibble u = code + 8, value = (u - 8) * scale. The default fit uses -7..7;
a given grid may use -8 as well.
Zero point: the range is widened to include 0, scale = (max - min) / 15, zero = round(-min / scale) in 0..15,
value = (u - zero) * scale. Scales are rounded up to f16, so that nothing clips by more than half a step.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import nibbles, scaled
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.errors import ValueOutOfRange


def _symmetric(name: str, group: int) -> Format:
    def fit(x: Array) -> dict[str, Array]:
        return {"scale": scaled.f16_scale(name, scaled.absmax(x, group) / np.float32(7))}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        rows, cols = x.shape
        scaled.check_scales(name, grid)
        q = np.empty((rows, -(-cols // 2)), np.uint8)
        for r, y in scaled.quotients(x, grid["scale"], group):
            np.rint(y, out=y)
            np.clip(y, -8, 7, out=y)
            y += np.float32(8)
            q[r] = nibbles.join(y.astype(np.uint8)[:, :cols])
        return {"q": q, "scale": grid["scale"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = np.empty((rows, cols), np.float32)
        scale = planes["scale"].astype(np.float32)
        for r in scaled.row_chunks(rows, cols):
            code = nibbles.split(planes["q"][r], cols).astype(np.float32) - np.float32(8)
            np.multiply(code, scaled.spread(scale[r], group, (rows, cols)), out=out[r])
        return out

    def bound(values: Array, planes: Planes) -> Array:
        step = scaled.spread(planes["scale"].astype(np.float64), group, values.shape)
        ends = (-8 * step, 7 * step)
        return scaled.error_bound(values, np.abs(step) / 2, np.minimum(*ends), np.maximum(*ends))

    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        return {"scale": scaled.signed_f16_scale(name, scaled.nearest_scale(low, high, -8, 7))}

    return Format(
        name,
        (Plane("q", "u4o8", 1), Plane("scale", "f16", group)),
        lambda x: on_grid(x, fit(x)),
        decode,
        bound,
        "int",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        np.arange(-8, 8, dtype=np.float32),
    )


def _zero_point(name: str, group: int) -> Format:
    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        with np.errstate(over="ignore"):
            scale = scaled.f16_scale(name, (high - low) / np.float32(15))
        divisor = scale.astype(np.float32)
        divisor[divisor == 0] = np.inf
        return {"scale": scale, "zero": np.rint(-low / divisor).astype(np.uint8)}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        rows, cols = x.shape
        scaled.check_scales(name, grid)
        if grid["zero"].max() > 15:
            raise ValueOutOfRange(f"{name}: the given zero point {grid['zero'].max()} lies outside 0..15")
        zero = grid["zero"].astype(np.float32)
        q = np.empty((rows, -(-cols // 2)), np.uint8)
        for r, y in scaled.quotients(x, grid["scale"], group):
            np.rint(y, out=y)
            y.reshape(y.shape[0], -1, group)[...] += zero[r, :, None]
            np.clip(y, 0, 15, out=y)
            q[r] = nibbles.join(y.astype(np.uint8)[:, :cols])
        return {"q": q, "scale": grid["scale"], "zero": grid["zero"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = np.empty((rows, cols), np.float32)
        scale, zero = planes["scale"].astype(np.float32), planes["zero"].astype(np.float32)
        for r in scaled.row_chunks(rows, cols):
            code = nibbles.split(planes["q"][r], cols).astype(np.float32)
            code -= scaled.spread(zero[r], group, (rows, cols))
            np.multiply(code, scaled.spread(scale[r], group, (rows, cols)), out=out[r])
        return out

    def bound(values: Array, planes: Planes) -> Array:
        step = scaled.spread(planes["scale"].astype(np.float64), group, values.shape)
        zero = scaled.spread(planes["zero"].astype(np.float64), group, values.shape)
        ends = (-zero * step, (15 - zero) * step)
        return scaled.error_bound(values, np.abs(step) / 2, np.minimum(*ends), np.maximum(*ends))

    def affine(grid: Planes) -> tuple[Array, Array]:
        scale = grid["scale"].astype(np.float32)
        return scale, -scale * grid["zero"]

    return Format(
        name,
        (Plane("q", "u4", 1), Plane("scale", "f16", group), Plane("zero", "u8", group)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        bound,
        "int",
        on_grid,
        grid_for,
        affine,
        np.arange(16, dtype=np.float32),
    )


for _group in (32, 64, 128):
    register(_symmetric(f"int4_g{_group}", _group))
    register(_zero_point(f"int4_g{_group}_zp", _group))
