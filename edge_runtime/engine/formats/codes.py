"""Codes of 1, 2, 4 or 8 bits in bytes, and codes whose bits lie in two planes.

Within a row the first code of a byte takes its lowest bits; unused bits of a row's last byte are 0. A format
with planes `q` and `high` has a code's lower bits in `q` and the others in `high`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from edge_runtime.engine.formats import nibbles, scaled
from edge_runtime.engine.formats.record import ENCODINGS, Array, Plane, Planes


def pack_bits(codes: Array, bits: int) -> Array:
    """(rows, cols) u8 codes below 2^bits -> (rows, ceil(cols * bits / 8)) bytes; bits is 1, 2, 4 or 8."""
    if bits == 8:
        return codes
    if bits == 4:
        return nibbles.join(codes)
    if bits == 1:
        return np.packbits(codes, axis=1, bitorder="little")
    padded = np.ascontiguousarray(np.pad(codes, ((0, 0), (0, -codes.shape[1] % 4))))
    wide = padded.view("<u4")
    # the low byte gathers two bits of each of the four
    folded = wide | (wide >> np.uint32(6)) | (wide >> np.uint32(12)) | (wide >> np.uint32(18))
    packed: Array = folded.astype(np.uint8)
    return packed


def unpack_bits(packed: Array, bits: int, cols: int) -> Array:
    """The inverse of `pack_bits`: (rows, cols) u8 codes."""
    if bits == 8:
        return packed
    if bits == 4:
        return nibbles.split(packed, cols)
    if bits == 1:
        return np.unpackbits(packed, axis=1, count=cols, bitorder="little")
    wide = packed.astype("<u4")
    wide |= (wide << np.uint32(6)) | (wide << np.uint32(12)) | (wide << np.uint32(18))
    wide &= np.uint32(0x03030303)
    return np.ascontiguousarray(wide).view(np.uint8)[:, :cols]


def join(planes: Sequence[Plane], codes: Array) -> dict[str, Array]:
    """Codes (rows, cols) u8 as the stored arrays of a format's `codes` planes, lower bits in the first."""
    stored: dict[str, Array] = {}
    shift = 0
    for plane in planes:
        bits = ENCODINGS[plane.encoding].bits
        part = codes if len(planes) == 1 else (codes >> np.uint8(shift)) & np.uint8((1 << bits) - 1)
        stored[plane.name] = pack_bits(part, bits)
        shift += bits
    return stored


def split(planes: Sequence[Plane], stored: Planes, cols: int) -> Array:
    """The inverse of `join`: codes (rows, cols) u8."""
    first = ENCODINGS[planes[0].encoding].bits
    codes = unpack_bits(stored[planes[0].name], first, cols)
    shift = first
    for plane in planes[1:]:
        bits = ENCODINGS[plane.encoding].bits
        codes = codes | (unpack_bits(stored[plane.name], bits, cols) << np.uint8(shift))
        shift += bits
    return codes


def in_chunks(planes: Sequence[Plane], stored: Planes, rows: int, cols: int) -> Iterator[tuple[slice, Array]]:
    """Row chunks of the codes as f32: (slice, (r, cols))."""
    for r in scaled.row_chunks(rows, cols):
        part = {p.name: stored[p.name][r] for p in planes}
        yield r, split(planes, part, cols).astype(np.float32)


def decode_centred(
    planes: Sequence[Plane], stored: Planes, scale: Array, group: int, shape: tuple[int, int], offset: int
) -> Array:
    """f32 (code - offset) * scale, scale f32 (rows, groups)."""
    out = np.empty(shape, np.float32)
    for r, code in in_chunks(planes, stored, *shape):
        code -= np.float32(offset)
        np.multiply(code, scaled.spread(scale[r], group, shape), out=out[r])
    return out


def decode_shifted(
    planes: Sequence[Plane],
    stored: Planes,
    scale: Array,
    shift: Array,
    group: int,
    shape: tuple[int, int],
) -> Array:
    """f32 code * scale + shift, both f32 (rows, groups)."""
    out = np.empty(shape, np.float32)
    for r, code in in_chunks(planes, stored, *shape):
        code *= scaled.spread(scale[r], group, shape)
        np.add(code, scaled.spread(shift[r], group, shape), out=out[r])
    return out
