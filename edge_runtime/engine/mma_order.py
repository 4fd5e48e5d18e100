"""Byte order m16 of the cuda backend: codes as the fragments of tensor-core products (mma) want them.

A panel of 16 rows is cut into chunks, an equal part of each for a warp's 32 lanes, so that a lane loads its
share of a product at once and nothing is shuffled: 16 bytes a lane where codes have 4 bits or more, 8 or 4 of
codes of 2 or 1. Lane 4r + q holds rows r and r + 8 (PTX ISA, matrix fragments for mma.m16n8k32 and m16n8k16
with 8-bit and mma.m16n8k16 with 16-bit operands). A fragment is words w of four bytes; with half = w >> 1 and
row = r + 8 * (w & 1), the columns k of a chunk are

    int8            32 columns  byte i of word w:                     k = 16*half + 4*q + i
    4-bit integers  64          nibble m of byte i of word w:         k = 32*m + 16*half + 4*q + i
    2-bit integers  64          bits 2w, 2w + 1 of byte i of word m:  the same
    1-bit integers  64          bit 4m + w of byte i:                 the same
    f16, bf16       16          item i of word w:                     k = 8*half + 2*q + i
    fp8             32          byte 2*m + i:                         k = 16*m + 8*half + 2*q + i
    nf4, e2m1       64          nibble 2*m + i:                       k = 16*m + 8*half + 2*q + i

Low halves of a byte come first. What weights of a row share (scales and the like) lies by the same rows:
[panel][run][r][row r, row r + 8][items of a run], a run being a unit of columns, or the columns of an item
where they are more; so a lane loads its two rows' share of a unit at once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from edge_runtime.engine.formats import ENCODINGS, Array, Format

PANEL = 16
LANES = 32
WORDS = 4  # of 4 bytes of a fragment, which a lane loads at once
CHUNK_BYTES = LANES * WORDS * 4  # of codes of 4 bits or more
UNIT = 64  # columns are padded to a multiple of it, and of the group
# Products by m16n8k32 or m16n8k16, whose operands are bytes
_INTEGERS = ("i8", "u4o8", "u4", "u4o16", "u4o32", "u2", "u2o2", "u2o4", "u1")
_FLOATS = ("f16", "bf16", "e4m3", "e5m2", "nf4", "e2m1")  # products by m16n8k16
_SHARED = {"scale", "zero", "min", "scale_min", "super", "super_min", "scale2", "offset"}


def has_order(fmt: Format) -> bool:
    """Whether a format's planes have this order: codes of encodings, and shares, that the kernels read."""
    first, *more = fmt.codes
    known = first.encoding in (*_INTEGERS, *_FLOATS) and all(p.encoding in _INTEGERS for p in more)
    return known and {plane.name for plane in fmt.grid_planes} <= _SHARED


def chunk_columns(encoding: str) -> int:
    """Columns of a chunk."""
    return min(UNIT, CHUNK_BYTES * 8 // (PANEL * ENCODINGS[encoding].bits))


@lru_cache(maxsize=16)
def chunk_order(encoding: str) -> Array:
    """For each code of a chunk in stored order (lane, byte, place in it): row * columns + column, i64."""
    bits = ENCODINGS[encoding].bits
    codes = PANEL * chunk_columns(encoding) // LANES  # of a lane
    lane, at = np.meshgrid(np.arange(LANES), np.arange(codes), indexing="ij")
    r, q = lane // 4, lane % 4
    per_byte, per_word = max(1, 8 // bits), 32 // bits
    if encoding in _INTEGERS:
        byte, place = at // per_byte, at % per_byte
        i = byte % 4
        part = byte // 4 * per_byte + place  # 4m + w, but of 4-bit codes 2w + m
        m, word = (part % 2, part // 2) if bits == 4 else (part // 4, part % 4)
        column = 32 * m + 16 * (word >> 1) + 4 * q + i
    else:
        word, item = at // per_word, at % per_word
        column = 16 * (item // 2) + 8 * (word >> 1) + 2 * q + item % 2
    row = r + 8 * (word & 1)
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


def to_runs(shared: Array, run: int) -> Array:
    """Items that weights share (panels * 16, n), `run` of them for a unit's columns, in stored order, 1-D."""
    cut = shared.reshape(-1, 2, PANEL // 2, shared.shape[1] // run, run)
    return np.ascontiguousarray(cut.transpose(0, 3, 2, 1, 4)).reshape(-1)


def from_runs(stored: Array, run: int, count: int) -> Array:
    """What `to_runs` gave, back to (panels * 16, count)."""
    cut = stored.reshape(-1, count // run, PANEL // 2, 2, run).transpose(0, 3, 2, 1, 4)
    return np.ascontiguousarray(cut).reshape(-1, count)
