"""A GGUF file as a Source: config, tokenizer and tensors under Hugging Face's names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from builders.sources.gguf.blocks import TYPES, Blocks
from builders.sources.gguf.config import Metadata, read_model_config
from builders.sources.gguf.header import Header, TensorInfo, read_header
from builders.sources.gguf.names import CONSUMED, Place, pair_order, places
from builders.sources.gguf.tokenizer import read_tokenizer
from builders.sources.matrix import Matrix
from builders.sources.source import Source
from edge_runtime.engine.folder import open_regular
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, Unsupported

_FLOATS = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}


class GgufSource(Source):
    """An open GGUF file. Raises BadCheckpoint where it is damaged, Unsupported for what has no home here."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.notices: list[str] = []
        self.generation_config: dict[str, Any] = {}
        self.tokenizer_config: dict[str, Any] = {}
        self._path = path.resolve()
        self._header = read_header(self._path)
        if self._header.metadata.get("split.count", 1) not in (0, 1):
            raise Unsupported(
                f"{path.name} is one of several files (split.count); merge them with llama-gguf-split --merge"
            )
        self._fd = open_regular(self._path)
        try:
            meta, self.config = _read_config(self._header, self._fd)
            found = read_tokenizer(self._header.metadata)
            self._places = places(meta.architecture, self.config, list(self._header.tensors))
            self.matrices: dict[str, Matrix] = {
                key: self._matrix_of(place)
                for key, place in self._places.items()
                if self._info(key).kind not in _FLOATS
            }
        except BaseException:
            self.close()
            raise
        self.tokenizer_json, self.chat_template = found.data, found.chat_template
        self.generation_config = found.special
        self._shapes = {key: self._info(key).shape for key in self._places}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def floats(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        shape = self.shape(key)
        start, stop = rows or (0, shape[0])
        if not 0 <= start <= stop <= shape[0]:
            raise BadCheckpoint(f"tensor {key!r} has shape {shape}; rows {start} to {stop} do not exist")
        place, info = self._places[key], self._info(key)
        raw = _rows(self._fd, info, start, stop, place.paired)
        values = _f32(raw, info.kind).reshape(stop - start, *shape[1:])
        return values + np.float32(place.offset) if place.offset else values

    def float_format(self, key: str) -> str:
        return TYPES[self._info(key).kind].format

    def files(self) -> dict[str, Path]:
        return {self._path.name: self._path}

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _info(self, key: str) -> TensorInfo:
        return self._header.tensors[self._places[key].tensor]

    def _matrix_of(self, place: Place) -> Blocks:
        info = self._header.tensors[place.tensor]
        if len(info.shape) != 2:
            raise BadCheckpoint(
                f"tensor {place.tensor!r} is {info.kind} of shape {info.shape}, expected a matrix"
            )
        rows, cols = info.shape
        return Blocks(
            place.tensor, (rows, cols), info.kind, lambda: _rows(self._fd, info, 0, rows, place.paired)
        )


def read_gguf_config(path: Path) -> dict[str, Any]:
    """The config of a GGUF file, without its tensors. Raises as GgufSource."""
    header = read_header(path.resolve())
    fd = open_regular(path.resolve())
    try:
        return _read_config(header, fd)[1]
    finally:
        os.close(fd)


def _read_config(header: Header, fd: int) -> tuple[Metadata, dict[str, Any]]:
    meta = Metadata(header)
    vectors = {name: header.tensors[name] for name in CONSUMED if name in header.tensors}
    for name, info in vectors.items():
        if info.kind != "F32" or len(info.shape) != 1:
            raise BadCheckpoint(
                f"tensor {name!r} is {info.kind} of shape {info.shape}, expected an F32 vector"
            )
    tables = {
        name: _rows(fd, info, 0, info.shape[0], 0).view("<f4").ravel() for name, info in vectors.items()
    }
    return meta, read_model_config(meta, tables)


def _rows(fd: int, info: TensorInfo, start: int, stop: int, paired: int) -> Array:
    """Bytes of rows [start, stop): u8 (rows, bytes of a row). paired: rows of a head stored in pairs."""
    width = info.nbytes // info.shape[0]
    first, last = start, stop
    if paired:  # whole heads hold all that rows of theirs need
        if info.shape[0] % paired:
            raise BadCheckpoint(f"a tensor of {info.shape[0]} rows is not whole heads of {paired}")
        first, last = start // paired * paired, -(-stop // paired) * paired
    out = np.empty((last - first, width), np.uint8)
    view, done = memoryview(out.reshape(-1).data), 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], info.offset + first * width + done)
        if got == 0:
            raise BadCheckpoint("the GGUF file ended inside a tensor; it was truncated while it was read")
        done += got
    if paired:
        out = out.reshape(-1, paired, width)[:, pair_order(paired)].reshape(-1, width)
    return out[start - first : stop - first]


def _f32(raw: Array, kind: str) -> Array:
    values = np.ascontiguousarray(raw).view(_FLOATS[kind])
    if kind == "BF16":
        return (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values.astype(np.float32)
