"""GGML's block types: how the bytes of a block are the planes of a format here, every value the same f32.

Layouts: ggml-common.h and ggml-quants.c of llama.cpp, which the `gguf` package repeats in quants.py. A row is
a run of blocks; a block's fields are cut out and its codes put in the order of their columns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from builders.sources.matrix import Home, Matrix
from edge_runtime.engine.formats import FORMATS, Array, codes, get_format
from edge_runtime.errors import BadCheckpoint

Fields = dict[str, Array]


@dataclass(frozen=True, slots=True)
class BlockType:
    """number: GGML's; block: values of one; nbytes: its bytes; format: its home here.

    split: blocks (n, nbytes) u8 -> (codes (n, block), the other planes by name, (n, items of a block)).
    """

    number: int
    block: int
    nbytes: int
    format: str
    split: Callable[[Array], tuple[Array, Fields]] | None = None


def _half(raw: Array) -> Array:
    return np.ascontiguousarray(raw).view("<f2")


def _cut(raw: Array, *sizes: int) -> list[Array]:
    """Blocks (n, bytes) cut into fields."""
    return np.split(raw, np.cumsum(sizes)[:-1], axis=1)


def _runs(raw: Array, bits: int, run: int) -> Array:
    """Codes of `bits` from runs of `run` bytes: the lowest of every byte of a run first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[None, None, :, None]
    return ((raw.reshape(len(raw), -1, 1, run) >> shifts) & np.uint8((1 << bits) - 1)).reshape(len(raw), -1)


def _fifth_bits(raw: Array) -> Array:
    return np.unpackbits(raw, axis=1, bitorder="little") << np.uint8(4)


def _six_bits(raw: Array) -> tuple[Array, Array]:
    """The 8 scales and 8 minima in the 12 bytes of Q4_K and Q5_K."""
    a, b, c = _cut(raw, 4, 4, 4)
    scale = np.concatenate([a & 63, (c & 15) | (a >> 6 << 4)], axis=1)
    least = np.concatenate([b & 63, (c >> 4) | (b >> 6 << 4)], axis=1)
    return scale, least


def _q4_0(raw: Array) -> tuple[Array, Fields]:
    d, q = _cut(raw, 2, 16)
    return _runs(q, 4, 16), {"scale": _half(d)}


def _q4_1(raw: Array) -> tuple[Array, Fields]:
    d, m, q = _cut(raw, 2, 2, 16)
    return _runs(q, 4, 16), {"scale": _half(d), "min": _half(m)}


def _q5_0(raw: Array) -> tuple[Array, Fields]:
    d, high, q = _cut(raw, 2, 4, 16)
    return _runs(q, 4, 16) | _fifth_bits(high), {"scale": _half(d)}


def _q5_1(raw: Array) -> tuple[Array, Fields]:
    d, m, high, q = _cut(raw, 2, 2, 4, 16)
    return _runs(q, 4, 16) | _fifth_bits(high), {"scale": _half(d), "min": _half(m)}


def _q8_0(raw: Array) -> tuple[Array, Fields]:
    d, q = _cut(raw, 2, 32)
    return q.view(np.int8), {"scale": _half(d)}


def _q2_k(raw: Array) -> tuple[Array, Fields]:
    scale_min, q, d, dmin = _cut(raw, 16, 64, 2, 2)
    return _runs(q, 2, 32), {"scale_min": scale_min, "super": _half(d), "super_min": _half(dmin)}


def _q3_k(raw: Array) -> tuple[Array, Fields]:
    mask, q, s, d = _cut(raw, 32, 64, 12, 2)
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    high = np.concatenate([(s[:, 8:] >> np.uint8(shift)) & 3 for shift in (0, 2, 4, 6)], axis=1)
    scale = (low | (high << 4)).astype(np.int8) - np.int8(32)
    return _runs(q, 2, 32) | (_runs(mask, 1, 32) << np.uint8(2)), {"scale": scale, "super": _half(d)}


def _q4_k(raw: Array) -> tuple[Array, Fields]:
    d, dmin, s, q = _cut(raw, 2, 2, 12, 128)
    scale, least = _six_bits(s)
    grid = {"scale": scale, "min": least, "super": _half(d), "super_min": _half(dmin)}
    return _runs(q, 4, 32), grid


def _q5_k(raw: Array) -> tuple[Array, Fields]:
    d, dmin, s, high, q = _cut(raw, 2, 2, 12, 32, 128)
    scale, least = _six_bits(s)
    grid = {"scale": scale, "min": least, "super": _half(d), "super_min": _half(dmin)}
    return _runs(q, 4, 32) | (_runs(high, 1, 32) << np.uint8(4)), grid


def _q6_k(raw: Array) -> tuple[Array, Fields]:
    q, high, scale, d = _cut(raw, 128, 64, 16, 2)
    return _runs(q, 4, 64) | (_runs(high, 2, 32) << np.uint8(4)), {
        "scale": scale.view(np.int8),
        "super": _half(d),
    }


def _mxfp4(raw: Array) -> tuple[Array, Fields]:
    e, q = _cut(raw, 1, 16)
    return _runs(q, 4, 16), {"scale": e}


TYPES = {
    "F32": BlockType(0, 1, 4, "f32"),
    "F16": BlockType(1, 1, 2, "f16"),
    "BF16": BlockType(30, 1, 2, "bf16"),
    "Q4_0": BlockType(2, 32, 18, "int4_g32", _q4_0),
    "Q4_1": BlockType(3, 32, 20, "int4_g32_min", _q4_1),
    "Q5_0": BlockType(6, 32, 22, "int5_g32", _q5_0),
    "Q5_1": BlockType(7, 32, 24, "int5_g32_min", _q5_1),
    "Q8_0": BlockType(8, 32, 34, "int8_g32", _q8_0),
    "Q2_K": BlockType(10, 256, 84, "q2_k", _q2_k),
    "Q3_K": BlockType(11, 256, 110, "q3_k", _q3_k),
    "Q4_K": BlockType(12, 256, 144, "q4_k", _q4_k),
    "Q5_K": BlockType(13, 256, 176, "q5_k", _q5_k),
    "Q6_K": BlockType(14, 256, 210, "q6_k", _q6_k),
    "MXFP4": BlockType(39, 32, 17, "mxfp4_g32", _mxfp4),
}


class Blocks(Matrix):
    """A matrix of blocks. read: its bytes, u8 (rows, bytes of a row), in the order of rows that is wanted."""

    def __init__(self, name: str, shape: tuple[int, int], kind: str, read: Callable[[], Array]) -> None:
        super().__init__(shape)
        self.name, self.kind = name, TYPES[kind]
        self._read = read

    def read_codes(self) -> Array:
        return self._read()

    def ordered_values(self, start: int, stop: int) -> Array:
        return get_format(self.kind.format).decode(self._planes(start, stop), stop - start, self.shape[1])

    def exact_home(self) -> Home | None:
        return Home(self.kind.format) if self.kind.format in FORMATS else None

    def exact_planes(self, home: Home) -> dict[str, Array]:
        return self._planes(0, self.shape[0])

    def _planes(self, start: int, stop: int) -> dict[str, Array]:
        assert self.kind.split is not None  # float tensors are no Blocks
        rows, fmt = stop - start, get_format(self.kind.format)
        found, grid = self.kind.split(self.codes[start:stop].reshape(-1, self.kind.nbytes))
        for plane, values in grid.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise BadCheckpoint(
                    f"tensor {self.name!r} has NaN or Inf in its {plane}s; the file is damaged"
                )
        planes = codes.join(fmt.codes, found.reshape(rows, self.shape[1]))
        return planes | {name: np.ascontiguousarray(plane).reshape(rows, -1) for name, plane in grid.items()}
