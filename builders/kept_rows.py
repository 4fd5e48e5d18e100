"""Rows of every token between two segments: in memory while they are few, always on disk for a resumed run.

They are read by pread, not mapped, so that no page of the file counts as this process's memory.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from edge_runtime.engine.folder import open_regular
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadConfig


class RowsWriter:
    """Takes rows of windows one batch after another; `memory` is the most bytes that are also held."""

    def __init__(self, file: BinaryIO, shape: tuple[int, int, int], memory: int) -> None:
        self._file = file
        self.held = np.empty(shape, np.float32) if 4 * int(np.prod(shape)) <= memory else None
        self._at = 0

    def add(self, rows: Array) -> None:
        """f32 (windows, length, width)."""
        if self.held is not None:
            self.held[self._at : self._at + len(rows)] = rows
        self._file.write(memoryview(np.ascontiguousarray(rows).data).cast("B"))
        self._at += len(rows)


class RowsReader:
    """f32 rows (windows, length, width) from memory or a file. Raises BadConfig for one of another size."""

    def __init__(self, path: Path, shape: tuple[int, int, int], held: Array | None = None) -> None:
        self._path, self._shape, self._held, self._fd = path, shape, held, -1
        if held is None:
            self._fd = open_regular(path)
            size = os.fstat(self._fd).st_size
            if size != 4 * int(np.prod(shape)):
                self.close()
                raise BadConfig(
                    f"{path} has {size} bytes, its rows take {4 * int(np.prod(shape))}; remove it"
                )

    def read(self, start: int, stop: int) -> Array:
        """Rows of windows [start, stop)."""
        if self._held is not None:
            return self._held[start:stop]
        found = np.empty((stop - start, *self._shape[1:]), np.float32)
        view = memoryview(found.data).cast("B")
        at, offset = 0, start * (found.nbytes // max(stop - start, 1))
        while at < found.nbytes:
            got = os.preadv(self._fd, [view[at:]], offset + at)
            if got == 0:
                raise BadConfig(f"{self._path} ended early; remove it and calibrate again")
            at += got
        return found

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
