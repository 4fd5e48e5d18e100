"""Codes packed into 32-bit words as one stream of bits, low first: 32 codes fill `bits` words."""

from __future__ import annotations

import math

import numpy as np

from edge_runtime.engine.formats import Array


def word_count(codes: int, bits: int) -> int:
    """Words that so many codes need."""
    return -(-codes * bits // 32)


def unpack(words: Array, bits: int, count: int) -> Array:
    """u8 codes of packed words, `count` along the first axis: (word_count, n) i32 -> (count, n)."""
    stream = words.view("<u4")
    period = 32 // math.gcd(bits, 32)  # codes after which a code begins a word again
    step = period * bits // 32
    out = np.empty((count, words.shape[1]), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for k in range(min(period, count)):
        word, shift = divmod(k * bits, 32)
        rows = -(-(count - k) // period)
        codes = stream[word::step][:rows] >> np.uint32(shift)
        if shift + bits > 32:  # the code ends in the next word
            codes = codes | (stream[word + 1 :: step][:rows] << np.uint32(32 - shift))
        out[k::period] = codes & mask
    return out
