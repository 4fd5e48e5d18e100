"""The header of a GGUF file: metadata and the table of tensors, every size proved before it is believed.

All arithmetic is Python's, which does not wrap; no count allocates more than the bytes that are left.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from builders.sources.gguf.blocks import TYPES
from edge_runtime.engine.folder import open_regular
from edge_runtime.engine.formats import Array
from edge_runtime.engine.program import MAX_DIM
from edge_runtime.errors import BadCheckpoint, Unsupported

MAGIC, SUFFIX = b"GGUF", ".gguf"
_POINTER = b"version https://git-lfs"
VERSIONS = (2, 3)
MAX_ENTRIES = 1 << 16  # keys, and tensors
MAX_STRING = 16 << 20
MAX_HEADER = 1 << 30
_MAX_DIMS = 4
_STRING, _ARRAY, _BOOL = 8, 9, 7
_NUMBERS = {
    0: "u1",
    1: "i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "u1",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor. shape: outermost first (GGUF lists it innermost first); offset: from the file's start."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """metadata: numbers, texts, bools, numpy arrays and lists of texts by key."""

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: Path) -> bool:
    """Whether a regular file begins as a GGUF file does. Raises BadCheckpoint where it cannot be read, or is
    named like one and begins as none."""
    fd = open_regular(path)
    try:
        head = os.pread(fd, len(_POINTER), 0)
    finally:
        os.close(fd)
    if head.startswith(MAGIC) or path.suffix.lower() != SUFFIX:
        return head.startswith(MAGIC)
    if head == _POINTER:
        raise BadCheckpoint(
            f"{path.name} is a Git LFS pointer, not the weights; run 'git lfs pull' beside it"
        )
    begins = f"it begins with {head[:4]!r}" if head else "it is empty"
    raise BadCheckpoint(
        f"{path.name} is not a GGUF file: {begins}, expected 'GGUF'; download or convert it again"
    )


def read_header(path: Path) -> Header:
    """Raises BadCheckpoint on anything malformed or truncated, Unsupported on a type without a home here."""
    with os.fdopen(open_regular(path), "rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _Reader(file, size, path.name).header()


class _Reader:
    """A cursor over a file of `size` bytes that never passes its end."""

    def __init__(self, file: io.BufferedReader, size: int, name: str) -> None:
        self._file, self._size, self._name = file, min(size, MAX_HEADER), name
        self._nbytes = size
        self._at = 0

    def header(self) -> Header:
        if self._take(4, "magic") != MAGIC:
            raise self._bad("does not begin with GGUF")
        version = self._whole("<u4", "version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
            what = "big-endian" if swapped in VERSIONS else f"version {version}"
            raise Unsupported(f"{self._name} is a GGUF file of {what}, only little-endian 2 and 3 are read")
        tensors, keys = self._count("tensor count"), self._count("metadata count")
        metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text("a metadata key")
            if not key or key in metadata:
                raise self._bad(f"metadata key {key!r} is empty or appears twice")
            metadata[key] = self._value(self._whole("<u4", key), key)
        table = [self._tensor(i) for i in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 1 <= alignment <= 1 << 16 or alignment & (alignment - 1):
            raise self._bad(f"general.alignment is {alignment!r}, expected a power of two")
        return Header(metadata, self._placed(table, -(-self._at // alignment) * alignment, alignment))

    def _placed(
        self, table: list[tuple[str, str, tuple[int, ...], int]], start: int, alignment: int
    ) -> dict[str, TensorInfo]:
        """Tensors with offsets from the file's start, proved to lie in the file and apart from each other."""
        found: dict[str, TensorInfo] = {}
        for name, kind, shape, offset in table:
            if name in found:
                raise self._bad(f"tensor {name!r} appears twice")
            values, nbytes = TYPES[kind].block, TYPES[kind].nbytes
            if shape[-1] % values:
                raise self._bad(
                    f"tensor {name!r} has rows of {shape[-1]}, {kind} needs a multiple of {values}"
                )
            total = nbytes * (shape[-1] // values)
            for n in shape[:-1]:
                total *= n
            if offset % alignment or start + offset + total > self._nbytes:
                raise self._bad(
                    f"tensor {name!r} ({total} bytes from {start + offset} on) is not aligned to {alignment} "
                    f"or lies beyond the file's {self._nbytes} bytes"
                )
            found[name] = TensorInfo(kind, shape, start + offset, total)
        end = 0
        for name, info in sorted(found.items(), key=lambda item: item[1].offset):
            if info.offset < end:
                raise self._bad(f"tensor {name!r} overlaps another")
            end = info.offset + info.nbytes
        return found

    def _tensor(self, index: int) -> tuple[str, str, tuple[int, ...], int]:
        name = self._text(f"the name of tensor {index}")
        count = self._whole("<u4", name)
        if not 1 <= count <= _MAX_DIMS:
            raise self._bad(f"tensor {name!r} has {count} dimensions, expected 1 to {_MAX_DIMS}")
        shape = tuple(self._whole("<u8", name) for _ in range(count))[::-1]
        if any(not 1 <= n <= MAX_DIM for n in shape):
            raise self._bad(f"tensor {name!r} has shape {shape}, expected 1 to {MAX_DIM} a dimension")
        number = self._whole("<u4", name)
        kind = next((kind for kind, entry in TYPES.items() if entry.number == number), None)
        if kind is None:
            raise Unsupported(
                f"{self._name}: tensor {name!r} has the GGML type {number}, only {', '.join(TYPES)} are read;"
                " quantize it to one of them"
            )
        return name, kind, shape, self._whole("<u8", name)

    def _value(self, kind: int, key: str, *, nested: bool = False) -> Any:
        if kind == _STRING:
            return self._text(key)
        if kind == _ARRAY and not nested:
            return self._array(key)
        if kind not in _NUMBERS:
            raise self._bad(f"metadata {key!r} has the unknown type {kind}")
        value = self._numbers(kind, 1, key)[0].item()
        return bool(value) if kind == _BOOL else value

    def _array(self, key: str) -> Any:
        kind, count = self._whole("<u4", key), self._whole("<u8", key)
        if kind in _NUMBERS:
            return self._numbers(kind, count, key)
        if kind != _STRING:
            raise self._bad(f"metadata {key!r} is an array of the type {kind}, which is not read")
        if count * 8 > self._size - self._at:  # every text has a length of 8 bytes
            raise self._bad(f"metadata {key!r} has {count} texts, more than the file holds")
        return [self._text(key) for _ in range(count)]

    def _numbers(self, kind: int, count: int, key: str) -> Array:
        dtype = np.dtype(_NUMBERS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize, key), dtype)

    def _text(self, what: str) -> str:
        length = self._whole("<u8", what)
        if length > MAX_STRING:
            raise self._bad(f"{what} is a text of {length} bytes, expected at most {MAX_STRING}")
        return self._take(length, what).decode("utf-8", errors="replace")

    def _count(self, what: str) -> int:
        count = self._whole("<u8", what)
        if count > MAX_ENTRIES:
            raise self._bad(f"the {what} is {count}, expected at most {MAX_ENTRIES}")
        return count

    def _whole(self, dtype: str, what: str) -> int:
        number: int = struct.unpack({"<u4": "<I", "<u8": "<Q"}[dtype], self._take(int(dtype[2]), what))[0]
        return number

    def _take(self, count: int, what: str) -> bytes:
        if count > self._size - self._at:
            raise self._bad(f"{what} needs {count} bytes at {self._at}, the file ends at {self._size}")
        data = self._file.read(count)
        if len(data) != count:
            raise self._bad(f"it ended inside {what}")
        self._at += count
        return data

    def _bad(self, what: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self._name} is a damaged GGUF file: {what}")
