"""NormalFloat4 in groups of 64: `nf4_g64`, the 16 values of QLoRA (Dettmers et al. 2023, appendix E).

scale = absmax of the group as f16 (rounded up), nibble = index of the table value nearest to x / scale; of
two equally near ones the lower index.
"""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import nibbles, scaled
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
ZERO = 7  # index of the value 0


def _thresholds() -> Array:
    """The greatest f32 at or below each midpoint: y > threshold is then exactly y > midpoint."""
    middle = (NF4[:-1].astype(np.float64) + NF4[1:].astype(np.float64)) / 2
    near = middle.astype(np.float32)
    return np.where(near > middle, np.nextafter(near, np.float32(-2)), near)


_THRESHOLDS = _thresholds()


def _nf4(name: str, group: int) -> Format:
    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        return {"scale": scaled.f16_scale(name, np.maximum(np.abs(low), np.abs(high)))}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        rows, cols = x.shape
        scaled.check_scales(name, grid)
        q = np.empty((rows, -(-cols // 2)), np.uint8)
        for r, y in scaled.quotients(x, grid["scale"], group):
            code = np.zeros(y.shape, np.uint8)
            above = np.empty(y.shape, np.bool_)
            for threshold in _THRESHOLDS:  # counting is faster than a search: 15 passes in cache
                np.greater(y, threshold, out=above)
                code += above.view(np.uint8)
            q[r] = nibbles.join(code[:, :cols])
        return {"q": q, "scale": grid["scale"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = np.empty((rows, cols), np.float32)
        scale = planes["scale"].astype(np.float32)
        for r in scaled.row_chunks(rows, cols):
            value = np.take(NF4, nibbles.split(planes["q"][r], cols))
            np.multiply(value, scaled.spread(scale[r], group, (rows, cols)), out=out[r])
        return out

    def bound(values: Array, planes: Planes) -> Array:
        scale = scaled.spread(np.abs(planes["scale"].astype(np.float64)), group, values.shape)
        sign = np.where(scaled.spread(planes["scale"], group, values.shape) < 0, -1.0, 1.0)
        table = NF4.astype(np.float64)
        y = np.clip(sign * values / np.where(scale == 0, np.inf, scale), -1, 1)
        above = np.clip(np.searchsorted(table, y), 1, 15)  # y lies between table[above - 1] and table[above]
        half = (table[above] - table[above - 1]) / 2
        return scaled.error_bound(values, half * scale, -scale, scale)

    return Format(
        name,
        (Plane("q", "nf4", 1), Plane("scale", "f16", group)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        bound,
        "table",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        NF4,
    )


register(_nf4("nf4_g64", 64))
