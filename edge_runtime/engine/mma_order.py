"""Byte order m16 of the cuda backend: codes as the fragments of tensor-core products (mma) want them.

A panel of 16 rows is cut into chunks of 512 bytes, 16 of each of a warp's 32 lanes, so that a lane loads its
share of a product with one 16-byte load and nothing is shuffled. Lane 4r + q holds rows r and r + 8 (PTX ISA,
matrix fragments for mma.m16n8k32 with 8-bit and mma.m16n8k16 with 16-bit operands). With words w of four
bytes, half = w >> 1 and row = r + 8 * (w & 1), the columns k of a chunk are

    int8            32 columns  byte i of word w:         k = 16*half + 4*q + i
    4-bit integers  64          byte i, low/high nibble m: k = 32*m + 16*half + 4*q + i
    f16, bf16       16          item i of word w:         k = 8*half + 2*q + i
    fp8             32          byte 2*m + i:             k = 16*m + 8*half + 2*q + i
    nf4, e2m1       64          nibble 2*m + i:           k = 16*m + 8*half + 2*q + i
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from edge_runtime.engine.formats import ENCODINGS, Array, Format

PANEL = 16
LANES = 32
WORDS = 4  # of 4 bytes that a lane loads at once
CHUNK_BYTES = LANES * WORDS * 4
UNIT = 64  # columns are padded to a multiple of it, and of the group
_INTEGERS = ("i8", "u4o8", "u4")  # products by m16n8k32, whose operands are bytes
_FLOATS = ("f16", "bf16", "e4m3", "e5m2", "nf4", "e2m1")  # products by m16n8k16


def has_order(fmt: Format) -> bool:
    """Whether a format's codes have this order: one plane of them, of an encoding that the kernels read."""
    if len(fmt.codes) != 1 or fmt.codes[0].encoding not in (*_INTEGERS, *_FLOATS):
        return False
    grid = {plane.name for plane in fmt.grid_planes}
    return grid <= {"scale", "zero", "scale2", "offset", "super"}


def chunk_columns(encoding: str) -> int:
    """Columns of a chunk."""
    return CHUNK_BYTES * 8 // (PANEL * ENCODINGS[encoding].bits)


@lru_cache(maxsize=16)
def chunk_order(encoding: str) -> Array:
    """For each code of a chunk in stored order (lane, word, item): 16-row index * columns + column, i64."""
    bits = ENCODINGS[encoding].bits
    lane, word, item = np.meshgrid(np.arange(LANES), np.arange(WORDS), np.arange(32 // bits), indexing="ij")
    r, q, half = lane // 4, lane % 4, word >> 1
    row = r + 8 * (word & 1)
    if encoding in _INTEGERS:
        byte, nibble = (item, 0) if bits == 8 else (item // 2, item % 2)
        column = 32 * nibble + 16 * half + 4 * q + byte
    else:
        column = 16 * (item // 2) + 8 * half + 2 * q + item % 2
    order: Array = (row * chunk_columns(encoding) + column).reshape(-1)
    return order


def to_chunks(codes: Array, encoding: str) -> Array:
    """Codes (panels * 16, width), one an item, -> the same in stored order, 1-D."""
    columns = chunk_columns(encoding)
    panels, chunks = codes.shape[0] // PANEL, codes.shape[1] // columns
    cut = codes.reshape(panels, PANEL, chunks, columns).transpose(0, 2, 1, 3).reshape(panels * chunks, -1)
    stored: Array = cut[:, chunk_order(encoding)].reshape(-1)
    return stored


def from_chunks(stored: Array, encoding: str, width: int) -> Array:
    """What `to_chunks` gave, one code an item, back to (panels * 16, width)."""
    columns = chunk_columns(encoding)
    cut = np.empty((stored.size // (PANEL * columns), PANEL * columns), stored.dtype)
    cut[:, chunk_order(encoding)] = stored.reshape(cut.shape)
    chunks = width // columns
    codes: Array = cut.reshape(-1, chunks, PANEL, columns).transpose(0, 2, 1, 3).reshape(-1, width)
    return codes
