"""One .safetensors file, read by pread a few rows at a time, so that no mapped page counts as our memory.

The safetensors library validates the container; the offsets are then checked once more against the
descriptor that is read. Its numpy side cannot give bf16 or fp8, hence the conversions here.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from edge_runtime.engine.folder import open_regular, parse_object
from edge_runtime.errors import BadCheckpoint

Array = npt.NDArray[Any]
MAX_HEADER = 64 << 20

_CONVERT = (
    'if you trust it (loading a pickle runs its code), convert it with: python -c "from transformers import '
    "AutoModelForCausalLM as A; A.from_pretrained('IN').save_pretrained('OUT')\""
)
_MAGIC = (
    (b"PK\x03\x04", "is a zip archive (torch.save), which may run code when loaded; " + _CONVERT),
    (b"GGUF", "is a GGUF file, not safetensors; give that file itself to edge-build"),
    (b"version https://git-lfs", "is a Git LFS pointer, not the weights; run 'git lfs pull' in the folder"),
    (b"\x89HDF\r\n", "is an HDF5 file; give a safetensors checkpoint"),
)


def _float8(exponent_bits: int, bias: int, finite: bool) -> Array:
    """The 256 values of an OCP FP8 code (e4m3fn has no infinity; e5m2 is IEEE-like)."""
    codes = np.arange(256)
    mantissa_bits = 7 - exponent_bits
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent = (codes >> mantissa_bits) & ((1 << exponent_bits) - 1)
    mantissa = (codes & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    value = np.where(
        exponent == 0, mantissa * 2.0 ** (1 - bias), (1 + mantissa) * 2.0 ** (exponent - float(bias))
    )
    top = exponent == (1 << exponent_bits) - 1
    if finite:
        value = np.where((codes & 0x7F) == 0x7F, np.nan, value)
    else:
        value = np.where(top, np.where(mantissa == 0, np.inf, np.nan), value)
    return (sign * value).astype(np.float32)


_E4M3, _E5M2 = _float8(4, 7, True), _float8(5, 15, False)


def _bf16(raw: Array) -> Array:
    return (raw.astype(np.uint32) << 16).view(np.float32)


# safetensors dtype -> numpy storage of the whole numbers and codes that quantized checkpoints hold
_CODES = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U8": "u1", "F8_E8M0": "u1"}
# safetensors dtype -> (storage dtype, to f32)
_FLOATS: dict[str, tuple[str, Callable[[Array], Array]]] = {
    "F64": ("<f8", lambda raw: raw.astype(np.float32)),
    "F32": ("<f4", lambda raw: raw),
    "F16": ("<f2", lambda raw: raw.astype(np.float32)),
    "BF16": ("<u2", _bf16),
    "F8_E4M3": ("u1", lambda raw: _E4M3[raw]),
    "F8_E5M2": ("u1", lambda raw: _E5M2[raw]),
}


def _storage(dtype: str) -> str:
    return _FLOATS[dtype][0] if dtype in _FLOATS else _CODES[dtype]


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor of a shard: where it lies (absolute byte offset) and what it is."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def sniff(head: bytes, name: str) -> None:
    """Refuse by content, whatever the name says, a file that is not safetensors. Raises BadCheckpoint."""
    for magic, what in _MAGIC:
        if head.startswith(magic):
            raise BadCheckpoint(f"{name} {what}")
    # Protocol 2 and above begin 0x80 N; a safetensors length field that starts so would have byte 8 == '{'.
    if len(head) >= 2 and head[0] == 0x80 and 1 <= head[1] <= 5 and head[8:9] != b"{":
        raise BadCheckpoint(f"{name} is a Python pickle, which may run code when loaded; {_CONVERT}")
    if len(head) < 9 or head[8:9] != b"{":
        raise BadCheckpoint(f"{name} is not a safetensors file; {_CONVERT}")


class Shard:
    """An open .safetensors file; `read` gives f32 rows. `max_header`: bytes of header that are believed."""

    def __init__(self, path: Path, name: str, max_header: int = MAX_HEADER) -> None:
        self.name = name
        self._max_header = max_header
        self._fd = open_regular(path)
        try:
            self.entries = self._read_entries(path)
        except BaseException:
            self.close()
            raise

    def _read_entries(self, path: Path) -> dict[str, Entry]:
        sniff(os.pread(self._fd, 64, 0), self.name)
        size = os.fstat(self._fd).st_size
        (length,) = struct.unpack("<Q", os.pread(self._fd, 8, 0))
        if length > self._max_header:
            raise BadCheckpoint(
                f"{self.name}: header of {length} bytes, expected at most {self._max_header}; it is damaged"
            )
        if 8 + length > size:
            raise BadCheckpoint(f"{self.name}: header of {length} bytes in a file of {size}; it is truncated")
        try:
            with safe_open(path, framework="numpy") as checked:  # the library's own validation; reads no data
                checked.keys()
        except SafetensorError as error:
            raise BadCheckpoint(f"{self.name} is damaged: {error}") from None
        header = parse_object(os.pread(self._fd, length, 8), f"{self.name} header")
        header.pop("__metadata__", None)
        return {key: self._entry(key, item, 8 + length, size) for key, item in header.items()}

    def _entry(self, key: str, item: Any, start: int, size: int) -> Entry:
        try:
            dtype, shape, (begin, end) = item["dtype"], tuple(item["shape"]), item["data_offsets"]
            ok = isinstance(dtype, str) and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
        except (TypeError, KeyError, ValueError):
            ok = False
        if not ok or not begin <= end <= size - start:
            raise BadCheckpoint(f"{self.name}: tensor {key!r} has a malformed entry or lies beyond the file")
        if dtype in _FLOATS or dtype in _CODES:
            want = np.dtype(_storage(dtype)).itemsize
            for n in shape:
                want *= n
            if want != end - begin:
                raise BadCheckpoint(
                    f"{self.name}: tensor {key!r} has {end - begin} bytes, its shape needs {want}"
                )
        return Entry(dtype, shape, start + begin, end - begin)

    def read(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        """f32 tensor `key`, or only its rows [start, stop) along the first axis. Raises BadCheckpoint."""
        entry = self.entries[key]
        if entry.dtype not in _FLOATS:
            raise BadCheckpoint(
                f"tensor {key!r} has dtype {entry.dtype}; expected one of {', '.join(_FLOATS)}"
            )
        convert = _FLOATS[entry.dtype][1]
        return np.asarray(convert(self.raw(key, rows)), dtype=np.float32)

    def raw(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        """Tensor `key` as it lies in the file: 8-bit floats as u8, bf16 as u16. Raises BadCheckpoint."""
        entry = self.entries[key]
        if entry.dtype not in _FLOATS and entry.dtype not in _CODES:
            raise BadCheckpoint(f"tensor {key!r} has dtype {entry.dtype}, which no reader here knows")
        shape, offset, nbytes = entry.shape, entry.offset, entry.nbytes
        if rows is not None:
            start, stop = rows
            if not shape or not 0 <= start <= stop <= shape[0]:
                raise BadCheckpoint(f"tensor {key!r} has shape {shape}; rows {start} to {stop} do not exist")
            stride = nbytes // shape[0] if shape[0] else 0
            shape, offset, nbytes = (
                (stop - start, *shape[1:]),
                offset + start * stride,
                (stop - start) * stride,
            )
        storage = _storage(entry.dtype)
        raw = np.empty(nbytes // np.dtype(storage).itemsize, dtype=storage)
        view = memoryview(raw.view(np.uint8).data)
        done = 0
        while done < nbytes:
            got = os.preadv(self._fd, [view[done:]], offset + done)
            if got == 0:
                raise BadCheckpoint(f"{self.name}: the file ended inside tensor {key!r}; it is truncated")
            done += got
        return raw.reshape(shape)

    def __enter__(self) -> Shard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
