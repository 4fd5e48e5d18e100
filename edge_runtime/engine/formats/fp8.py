"""8-bit floats of the OCP 8-bit Floating Point Specification 1.0 (2023), rounded to nearest even.

`fp8_e4m3_{row,tensor,g128}`: E4M3FN, scale = absmax / 448 in f32, saturating at 448 (no infinities; 0x7f is
NaN and never written). `fp8_e4m3_g128` is the exact home of checkpoints with a scale per block of 128 x 128:
each scale is repeated for the block's rows. `fp8_e5m2`: no scale; a value beyond 57344 is a ValueOutOfRange.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.formats import scaled
from edge_runtime.engine.formats.record import Array, Format, Per, Plane, Planes, register
from edge_runtime.errors import ValueOutOfRange


@dataclass(frozen=True)
class Float8:
    """One 8-bit float: its mantissa bits, least normal exponent and greatest finite value and code."""

    mantissa: int
    least_exponent: int
    largest: float
    largest_code: int

    def codes(self, y: Array) -> Array:
        """f32 -> u8 codes, round to nearest even, saturating at the greatest finite value."""
        shift = np.uint32(23 - self.mantissa)
        a = np.minimum(np.abs(y), np.float32(self.largest))
        bits = a.view(np.uint32)
        normal = bits + ((bits >> shift) & np.uint32(1))
        normal += np.uint32((1 << (int(shift) - 1)) - 1)
        normal >>= shift
        normal -= np.uint32((127 + self.least_exponent - 1) << self.mantissa)
        # Below the least normal the codes count steps of 2^(least_exponent - mantissa).
        steps = np.rint(a * np.float32(2.0 ** (self.mantissa - self.least_exponent)))
        tiny = a < np.float32(2.0**self.least_exponent)
        code: Array = np.where(tiny, steps, normal).astype(np.uint8)
        code |= np.signbit(y).astype(np.uint8) << np.uint8(7)
        return code

    def table(self) -> Array:
        """f32 value of every code, by the definition; codes past the greatest finite one are NaN."""
        values = np.full(256, np.nan, np.float32)
        for code in range(self.largest_code + 1):
            exponent, fraction = code >> self.mantissa, code % (1 << self.mantissa)
            whole = 1 if exponent else 0
            scale = 2.0 ** (max(exponent, 1) - 1 + self.least_exponent)
            values[code] = (whole + fraction / (1 << self.mantissa)) * scale
            values[code | 0x80] = -values[code]
        return values


E4M3 = Float8(mantissa=3, least_exponent=-6, largest=448.0, largest_code=0x7E)
E5M2 = Float8(mantissa=2, least_exponent=-14, largest=57344.0, largest_code=0x7B)
_E4M3_TABLE = E4M3.table()
_E5M2_TABLE = E5M2.table()
_E4M3_LEVELS = np.unique(_E4M3_TABLE[np.isfinite(_E4M3_TABLE)])  # -0 and 0 are one level


def _look_up(table: Array, codes: Array) -> Array:
    """Values of codes, in row chunks: numpy widens an index to 8 bytes."""
    out = np.empty(codes.shape, np.float32)
    for r in scaled.row_chunks(*codes.shape):
        out[r] = table[codes[r]]
    return out


def _e4m3(name: str, per: Per) -> Format:
    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        absolute = np.maximum(np.abs(low), np.abs(high))  # (rows, groups)
        if per == "tensor":
            absolute = absolute.max(keepdims=True)
        return {"scale": scaled.f32_scale(absolute, E4M3.largest)}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scaled.check_scales(name, grid)
        q = np.empty(x.shape, np.uint8)
        for r, y in scaled.quotients(x, grid["scale"], scaled.width(per, x.shape[1])):
            q[r] = E4M3.codes(y)[:, : x.shape[1]]
        return {"q": q, "scale": grid["scale"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        out = _look_up(_E4M3_TABLE, planes["q"])
        scale = np.broadcast_to(planes["scale"], (rows, planes["scale"].shape[1]))
        for r in scaled.row_chunks(rows, cols):
            out[r] *= scaled.spread(scale[r], scaled.width(per, cols), (rows, cols))
        return out

    def bound(values: Array, planes: Planes) -> Array:
        scale = np.abs(planes["scale"].astype(np.float64))
        scale = scaled.spread(scale, scaled.width(per, values.shape[1]), values.shape)
        y = values / np.where(scale == 0, np.inf, scale)
        limit = E4M3.largest * scale
        half = half_step(E4M3, np.clip(y, -E4M3.largest, E4M3.largest)) * scale
        return scaled.error_bound(values, half, -limit, limit)

    return Format(
        name,
        (Plane("q", "e4m3", 1), Plane("scale", "f32", per)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, scaled.width(per, x.shape[1])))),
        decode,
        bound,
        "float",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(grid["scale"]),
        _E4M3_LEVELS,
    )


def half_step(kind: Float8, y: Array) -> Array:
    """Half the distance of the format's neighbours around y (f64)."""
    return scaled.half_ulp(y, kind.least_exponent, kind.mantissa)


def _encode_e5m2(x: Array) -> dict[str, Array]:
    q = np.empty(x.shape, np.uint8)
    for r in scaled.row_chunks(*x.shape):
        largest = float(np.abs(x[r]).max())
        if largest > E5M2.largest:
            raise ValueOutOfRange(
                f"fp8_e5m2: the tensor holds {largest:.6g}, but the format ends at 57344; use fp8_e4m3_row"
            )
        q[r] = E5M2.codes(x[r])
    return {"q": q}


def _decode_e5m2(planes: Planes, rows: int, cols: int) -> Array:
    return _look_up(_E5M2_TABLE, planes["q"])


def _bound_e5m2(values: Array, planes: Planes) -> Array:
    return half_step(E5M2, values.astype(np.float64))


register(_e4m3("fp8_e4m3_row", "row"))
register(_e4m3("fp8_e4m3_tensor", "tensor"))
register(_e4m3("fp8_e4m3_g128", 128))
register(Format("fp8_e5m2", (Plane("q", "e5m2", 1),), _encode_e5m2, _decode_e5m2, _bound_e5m2))
