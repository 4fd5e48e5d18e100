"""A finished calibration: statistics of what each linear and the head read, by tensor, from its folder."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np

from builders.calibration_folder import CalibrationFolder
from builders.segments import Segment, linear_groups
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array
from edge_runtime.engine.program import Program
from edge_runtime.engine.shard import Shard

_ARRAYS = ("hessian", "absmax", "mean_abs", "rows")


class Calibration:
    """`text` names what it was made on, `tokens` how many; `sha256` is a digest of all statistics."""

    def __init__(
        self, folder: CalibrationFolder, program: Program, segments: list[Segment], sha256: str
    ) -> None:
        identity = folder.identity
        self.text, self.tokens = identity.text, identity.samples * identity.length
        self.sha256 = sha256
        self.folder = folder.path
        self._folder = folder
        self._where = {
            tensor: (i, g)
            for i, segment in enumerate(segments)
            for g, group in enumerate(groups_of(program, segments, i))
            for tensor in group
        }
        self._last: tuple[tuple[int, int], InputStatistics] | None = None
        self._lock = threading.Lock()

    def statistics(self, tensor: str) -> InputStatistics | None:
        """Of the tensor's inputs; None for an embedding or a vector. Those of the last tensors that read the
        same values are kept in memory."""
        at = self._where.get(tensor)
        if at is None:
            return None
        with self._lock:
            if self._last is None or self._last[0] != at:
                self._last = None
                i, g = at
                path = self._folder.segment(i)
                with Shard(path, path.name) as shard:
                    stored = {key: shard.read(f"{g}.{key}") for key in _ARRAYS}
                self._last = at, unpacked(stored, self.tokens)
            return self._last[1]

    def close(self) -> None:
        """Let the folder go; the statistics stay in it for another build."""
        self._folder.close()

    def remove(self) -> None:
        """Delete the folder's files, when no other build is to use them."""
        self._folder.remove()

    def __enter__(self) -> Calibration:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def groups_of(program: Program, segments: list[Segment], i: int) -> list[tuple[str, ...]]:
    """Weights of segment i that read the same values, group by group; the head comes last of all."""
    groups = linear_groups(program, segments[i])
    if i == len(segments) - 1:
        groups.append(tuple(op.weight for op in program.heads))
    return groups


def unpacked(stored: dict[str, Array], count: int, drift: Array | None = None) -> InputStatistics:
    """Of the arrays of `Moments.packed`, with the whole symmetric moment."""
    width = len(stored["absmax"])
    hessian = np.empty((width, width), np.float32)
    for i, row in enumerate(_triangle_rows(stored.pop("hessian"), width)):
        hessian[i, i:] = row
        hessian[i + 1 :, i] = row[1:]
    return InputStatistics(count, hessian, stored["absmax"], stored["mean_abs"], stored["rows"], drift)


def _triangle_rows(triangle: Array, width: int) -> Iterator[Array]:
    """Row i of a packed upper triangle, from column i on."""
    at = 0
    for i in range(width):
        yield triangle[at : at + width - i]
        at += width - i
