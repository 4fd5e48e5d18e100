"""PackedTensor: a weight as it lies in an engine file, ready for a backend to read in place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.engine.formats import Array


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A weight as it lies in the engine: planes are 1-D arrays (views of the mmap) in `packing` order."""

    rows: int
    cols: int
    format: str
    packing: str
    planes: Mapping[str, Array]
