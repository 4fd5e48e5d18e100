"""Two 4-bit codes a byte: column 2j in the low nibble, 2j+1 in the high one. An odd last nibble is 0."""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats.record import Array


def join(codes: Array) -> Array:
    """(rows, cols) u8 codes below 16 -> (rows, ceil(cols/2)) bytes."""
    if codes.shape[1] % 2:
        codes = np.pad(codes, ((0, 0), (0, 1)))
    if codes.flags.c_contiguous:
        pairs = codes.view("<u2")  # low byte = even column; (p | p >> 4) keeps both nibbles in the low byte
        joined: Array = (pairs | (pairs >> np.uint16(4))).astype(np.uint8)
        return joined
    joined = codes[:, ::2] | (codes[:, 1::2] << np.uint8(4))
    return joined


def split(packed: Array, cols: int) -> Array:
    """(rows, ceil(cols/2)) bytes -> (rows, cols) u8 codes."""
    wide = packed.astype("<u2")
    wide |= wide << np.uint16(4)
    wide &= np.uint16(0x0F0F)
    return np.ascontiguousarray(wide).view(np.uint8)[:, :cols]
