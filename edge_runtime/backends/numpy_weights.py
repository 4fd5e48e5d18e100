"""Weights of an engine as f32, for numpy: whole tensors, or only the rows that an embedding looks up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from edge_runtime.backends.protocol import PackedTensor
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.formats.record import whole_runs
from edge_runtime.engine.packing import unpack

PANEL = 16  # rows that the n16 and n16k4 packings keep together
KEEP_BYTES = 1 << 30  # decoded weights that a loaded engine keeps; the rest is decoded at each use


class DecodedWeights:
    """Weights of an engine as f32: kept decoded up to `keep` bytes, in program order; decoded anew beyond."""

    def __init__(self, weights: Mapping[str, PackedTensor], keep: int = KEEP_BYTES) -> None:
        self._weights = weights
        self._kept: dict[str, Array] = {}
        for name, tensor in weights.items():
            size = tensor.rows * tensor.cols * 4
            if size <= keep:
                self._kept[name] = decode(tensor)
                keep -= size

    def __call__(self, name: str) -> Array:
        return self._kept[name] if name in self._kept else decode(self._weights[name])

    def rows(self, name: str, ids: Array) -> Array:
        return self._kept[name][ids] if name in self._kept else decode_rows(self._weights[name], ids)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self._kept.values())


def decode(tensor: PackedTensor) -> Array:
    """A stored tensor as f32 (rows, cols)."""
    planes = unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
    return get_format(tensor.format).decode(planes, tensor.rows, tensor.cols)


def decode_rows(tensor: PackedTensor, ids: Array) -> Array:
    """Rows `ids` of a stored tensor, f32 (len(ids), cols), without decoding the others."""
    fmt = get_format(tensor.format)
    height = 1 if tensor.packing == "rows" else PANEL
    panels = -(-tensor.rows // height)
    taken, place = whole_runs(ids, max(height, fmt.run), panels * height)
    wanted = taken[::height] // height
    part = {
        p.name: tensor.planes[p.name]
        if p.whole
        else np.asarray(tensor.planes[p.name]).reshape(panels, -1)[wanted].reshape(-1)
        for p in fmt.planes
    }
    count = len(taken)
    values: Array = fmt.decode(
        unpack(tensor.format, tensor.packing, part, count, tensor.cols), count, tensor.cols
    )
    out: Array = values[place]
    return out
