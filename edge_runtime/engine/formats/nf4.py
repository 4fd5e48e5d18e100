"""NormalFloat4 in groups of 64, the 16 values of QLoRA (Dettmers et al. 2023, appendix E).

`nf4_g64`: scale = absmax of the group as f16 (rounded up). `nf4_g64_f32`: the absmax itself in f32, as
bitsandbytes stores it without double quantization; any of its NF4 tensors with blocks of 64 whose rows are
whole blocks has its exact home here. The nibble is the index of the table value nearest to x / scale; of two
equally near ones the lower index. value = NF4[nibble] * scale, one f32 product.
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
GROUP = 64


def thresholds(table: Array) -> Array:
    """The greatest f32 at or below each midpoint of a table: y > threshold is then exactly y > midpoint."""
    middle = (table[:-1].astype(np.float64) + table[1:].astype(np.float64)) / 2
    near = middle.astype(np.float32)
    return np.where(near > middle, np.nextafter(near, np.float32(-2)), near)


_THRESHOLDS = thresholds(NF4)


def codes(x: Array, scale: Array) -> Array:
    """Nibbles (rows, ceil(cols/2)) of f32 weights (rows, cols) by their groups' scales (rows, groups)."""
    rows, cols = x.shape
    q = np.empty((rows, -(-cols // 2)), np.uint8)
    for r, y in scaled.quotients(x, scale, GROUP):
        code = np.zeros(y.shape, np.uint8)
        above = np.empty(y.shape, np.bool_)
        for threshold in _THRESHOLDS:  # counting is faster than a search: 15 passes in cache
            np.greater(y, threshold, out=above)
            code += above.view(np.uint8)
        q[r] = nibbles.join(code[:, :cols])
    return q


def values(q: Array, scale: Array, rows: int, cols: int) -> Array:
    """f32 (rows, cols) of nibbles and f32 scales (rows, groups)."""
    out = np.empty((rows, cols), np.float32)
    for r in scaled.row_chunks(rows, cols):
        value = np.take(NF4, nibbles.split(q[r], cols))
        np.multiply(value, scaled.spread(scale[r], GROUP, (rows, cols)), out=out[r])
    return out


def error_bound(x: Array, scale: Array) -> Array:
    """f64 bound of |x - decoded| for scales (rows, groups): half the gap of the table around x / scale."""
    wide = scaled.spread(scale.astype(np.float64), GROUP, x.shape)
    size = np.abs(wide)
    table = NF4.astype(np.float64)
    y = np.clip(np.where(wide < 0, -1.0, 1.0) * x / np.where(size == 0, np.inf, size), -1, 1)
    above = np.clip(np.searchsorted(table, y), 1, 15)  # y lies between table[above - 1] and table[above]
    half = (table[above] - table[above - 1]) / 2
    return scaled.error_bound(x, half * size, -size, size)


def _nf4(name: str, encoding: str) -> Format:
    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        absolute = np.maximum(np.abs(low), np.abs(high))
        if encoding == "f32":
            return {"scale": scaled.f32_scale(absolute, 1)}
        return {"scale": scaled.f16_scale(name, absolute)}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scaled.check_scales(name, grid)
        return {"q": codes(x, grid["scale"]), "scale": grid["scale"]}

    return Format(
        name,
        (Plane("q", "nf4", 1), Plane("scale", encoding, GROUP)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, GROUP))),
        lambda planes, rows, cols: values(planes["q"], planes["scale"].astype(np.float32), rows, cols),
        lambda x, planes: error_bound(x, planes["scale"]),
        "table",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        NF4,
    )


register(_nf4("nf4_g64", "f16"))
register(_nf4("nf4_g64_f32", "f32"))
