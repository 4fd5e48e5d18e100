"""A part's tensors as a backend that packs them takes them: proved, and brought into its packing."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.backends.stored_indices import check_indices
from edge_runtime.engine.formats import Array
from edge_runtime.engine.packing import pack, plane_items, unpack
from edge_runtime.errors import BadEngineFile


def tensor_of(part: Part, name: str) -> PackedTensor:
    """A tensor of the shape that its program says. Raises BadEngineFile."""
    tensor, spec = part.weights[name], part.program.tensors[name]
    if (tensor.rows, tensor.cols) != (spec.rows, spec.cols):
        raise BadEngineFile(
            f"tensor {name!r} is {tensor.rows}x{tensor.cols}, its program says {spec.rows}x{spec.cols}"
        )
    return tensor


def check_planes(name: str, tensor: PackedTensor) -> None:
    """Raises BadEngineFile for a plane that is missing or has another size, and for numbers of columns that
    are none."""
    items = plane_items(tensor.format, tensor.packing, tensor.rows, tensor.cols)
    for plane, (count, dtype) in items.items():
        got = tensor.planes.get(plane)
        if got is None or got.shape != (count,) or got.dtype != np.dtype(dtype):
            found = "is missing" if got is None else f"is {got.dtype} {got.shape}"
            raise BadEngineFile(f"tensor {name!r}: plane {plane!r} {found}, expected {dtype} ({count},)")
    check_indices(name, tensor)


def in_packing(tensor: PackedTensor, packing: str) -> dict[str, Array]:
    """A proved tensor's planes in a packing: its own where it lies so, else new ones."""
    if tensor.packing == packing:
        return dict(tensor.planes)
    two_d = unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
    return pack(tensor.format, packing, two_d, tensor.rows, tensor.cols)
