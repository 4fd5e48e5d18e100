"""Symmetric int8, codes -127..127: `int8_row` with f32 scales and `int8_g{32,64,128}` with f16 scales.

scale = absmax / 127 (a group's f16 is rounded up, so nothing clips), code = round_half_even(x / scale).
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import scaled
from edge_runtime.engine.formats.record import Array, Format, Per, Plane, Planes, register

LIMIT = 127


def _int8(name: str, per: Per) -> Format:
    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        absolute = np.maximum(np.abs(low), np.abs(high))
        if per == "row":
            return {"scale": scaled.f32_scale(absolute, LIMIT)}
        return {"scale": scaled.f16_scale(name, absolute / np.float32(LIMIT))}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        cols = x.shape[1]
        scaled.check_scales(name, grid)
        q = np.empty(x.shape, np.int8)
        for r, y in scaled.quotients(x, grid["scale"], scaled.width(per, cols)):
            np.rint(y, out=y)
            np.clip(y, -LIMIT, LIMIT, out=y)
            q[r] = y[:, :cols]
        return {"q": q, "scale": grid["scale"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = planes["q"].astype(np.float32)
        scale = planes["scale"].astype(np.float32)
        for r in scaled.row_chunks(rows, cols):
            out[r] *= scaled.spread(scale[r], scaled.width(per, cols), (rows, cols))
        return out

    def bound(values: Array, planes: Planes) -> Array:
        scale = np.abs(planes["scale"].astype(np.float64))
        step = scaled.spread(scale, scaled.width(per, values.shape[1]), values.shape)
        return scaled.error_bound(values, step / 2, -LIMIT * step, LIMIT * step)

    return Format(
        name,
        (Plane("q", "i8", 1), Plane("scale", "f32" if per == "row" else "f16", per)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, scaled.width(per, x.shape[1])))),
        decode,
        bound,
        "int",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        np.arange(-LIMIT, LIMIT + 1, dtype=np.float32),
    )


register(_int8("int8_row", "row"))
for _group in (32, 64, 128):
    register(_int8(f"int8_g{_group}", _group))
