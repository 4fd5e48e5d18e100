"""4-bit floats with a shared scale for every few weights: `mxfp4_g32` and `nvfp4_g16`.

Codes are E2M1 (OCP Microscaling Formats (MX) Specification 1.0, 2023, section 5.3.3): sign, two exponent
bits, one mantissa bit, values 0, 0.5, 1, 1.5, 2, 3, 4, 6; rounded to nearest even, saturating at 6.

mxfp4_g32: an E8M0 scale, 2^(u - 127), for 32 weights. The fit is section 6.3 of that specification:
    2^(floor(log2(absmax)) - 2), so that a greatest value above 6 steps saturates; value = code * scale.
nvfp4_g16: an E4M3 scale for 16 weights and one f32 for the tensor (NVIDIA, "Pretraining Large Language Models
    with NVFP4", 2025): super = absmax of the tensor / (448 * 6), scale = E4M3 nearest to absmax / 6 / super;
    value = code * (scale * super), each product rounded to f32. A group whose scale rounds to 0 becomes 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_runtime.engine.formats import nibbles, scaled
from edge_runtime.engine.formats.fp8 import E4M3, Float8, half_step
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.errors import ValueOutOfRange

E2M1 = Float8(mantissa=1, least_exponent=0, largest=6.0, largest_code=7)
E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_LEVELS = np.unique(E2M1_VALUES)  # -0 and 0 are one level
_E4M3_TABLE = E4M3.table()
_E8M0_TABLE = np.append(np.ldexp(1.0, np.arange(255) - 127), np.nan).astype(np.float32)  # 255 is NaN


def _e2m1(
    name: str,
    group: int,
    shared: tuple[Plane, ...],
    scales: Callable[[Planes], Array],
    grid_for: Callable[[Array, Array], dict[str, Array]],
) -> Format:
    """`scales(grid)`: f32 (rows, groups)."""

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        rows, cols = x.shape
        scale = scales(grid)
        if not np.isfinite(scale).all():
            raise ValueOutOfRange(f"{name}: a given scale is NaN or Inf, expected finite scales")
        q = np.empty((rows, -(-cols // 2)), np.uint8)
        for r, y in scaled.quotients(x, scale, group):
            code = E2M1.codes(y)
            code = (code & np.uint8(7)) | ((code >> np.uint8(4)) & np.uint8(8))
            q[r] = nibbles.join(code[:, :cols])
        return {"q": q, **{p.name: grid[p.name] for p in shared}}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = np.empty((rows, cols), np.float32)
        scale = scales(planes)
        for r in scaled.row_chunks(rows, cols):
            value = np.take(E2M1_VALUES, nibbles.split(planes["q"][r], cols))
            np.multiply(value, scaled.spread(scale[r], group, (rows, cols)), out=out[r])
        return out

    def bound(values: Array, planes: Planes) -> Array:
        scale = scaled.spread(np.abs(scales(planes).astype(np.float64)), group, values.shape)
        y = values / np.where(scale == 0, np.inf, scale)
        half = half_step(E2M1, np.clip(y, -E2M1.largest, E2M1.largest)) * scale
        return scaled.error_bound(values, half, -E2M1.largest * scale, E2M1.largest * scale)

    return Format(
        name,
        (Plane("q", "e2m1", 1), *shared),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        bound,
        "int",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(scales(grid)),
        _LEVELS,
    )


def _mx_grid(low: Array, high: Array) -> dict[str, Array]:
    exponent = np.frexp(np.maximum(np.abs(low), np.abs(high)))[1] - 1  # floor(log2), -1 for 0
    u = np.clip(exponent - 2 + 127, 0, 254)
    u[(low == 0) & (high == 0)] = 0
    return {"scale": u.astype(np.uint8)}


def tensor_scales(grid: Planes) -> Array:
    """f32 (rows, groups) of E4M3 scales `scale` times one f32 `super` for the tensor."""
    scale: Array = _E4M3_TABLE[grid["scale"]]
    with np.errstate(over="ignore", under="ignore"):
        scale *= grid["super"]
    return scale


def tensor_grid(wanted: Array, unit: Array | None = None) -> dict[str, Array]:
    """Planes `scale` and `super` whose scales are nearest to those wanted, f32 (rows, groups), not negative.

    unit: a given `super`, f32 (1, 1); else the one with which the largest E4M3 number is the largest scale.
    """
    if unit is None:
        unit = scaled.f32_scale(wanted.max(keepdims=True), E4M3.largest)
    return {"scale": E4M3.codes(wanted / (unit if unit[0, 0] else np.float32(np.inf))), "super": unit}


def _nv_grid(low: Array, high: Array) -> dict[str, Array]:
    absolute = np.maximum(np.abs(low), np.abs(high))
    unit = scaled.f32_scale(absolute.max(keepdims=True), E4M3.largest * E2M1.largest)
    return tensor_grid(absolute / np.float32(E2M1.largest), unit)


register(_e2m1("mxfp4_g32", 32, (Plane("scale", "e8m0", 32),), lambda g: _E8M0_TABLE[g["scale"]], _mx_grid))
register(
    _e2m1(
        "nvfp4_g16",
        16,
        (Plane("scale", "e4m3", 16), Plane("super", "f32", "tensor")),
        tensor_scales,
        _nv_grid,
    )
)
