"""Unquantized formats: f32, f16 and bf16. One plane `w`, no scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.engine.formats.scaled import half_ulp, row_chunks
from edge_runtime.errors import ValueOutOfRange


def _check_range(name: str, x: Array, limit: float) -> None:
    largest = max(float(x.max()), -float(x.min()))
    if largest > limit:
        raise ValueOutOfRange(
            f"{name}: the tensor holds {largest:.6g}, but the format ends at {limit:.6g}; use bf16 or f32"
        )


def _encode_f32(x: Array) -> dict[str, Array]:
    return {"w": x.astype("<f4")}


def _encode_f16(x: Array) -> dict[str, Array]:
    _check_range("f16", x, 65504.0)
    return {"w": x.astype("<f2")}


def _encode_bf16(x: Array) -> dict[str, Array]:
    w = np.empty(x.shape, "<u2")
    for r in row_chunks(*x.shape):
        bits = x[r].view(np.uint32)
        # Round to nearest even: add just under half, and the kept lowest bit.
        w[r] = (bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)
    if ((w & np.uint16(0x7FFF)) == 0x7F80).any():
        raise ValueOutOfRange("bf16: a value rounds beyond 3.3895e38, the format's end; use f32")
    return {"w": w}


def _decode_float(planes: Planes, rows: int, cols: int) -> Array:
    return planes["w"].astype(np.float32)


def _decode_bf16(planes: Planes, rows: int, cols: int) -> Array:
    bits = planes["w"].astype(np.uint32)
    bits <<= np.uint32(16)
    return bits.view(np.float32)


def _bound(least_exponent: int, mantissa_bits: int) -> Callable[[Array, Planes], Array]:
    def bound(values: Array, planes: Planes) -> Array:
        return half_ulp(values.astype(np.float64), least_exponent, mantissa_bits)

    return bound


def _exact(values: Array, planes: Planes) -> Array:
    return np.zeros(values.shape, np.float64)


register(Format("f32", (Plane("w", "f32", 1),), _encode_f32, _decode_float, _exact))
register(Format("f16", (Plane("w", "f16", 1),), _encode_f16, _decode_float, _bound(-14, 10)))
register(Format("bf16", (Plane("w", "bf16", 1),), _encode_bf16, _decode_bf16, _bound(-126, 7)))
