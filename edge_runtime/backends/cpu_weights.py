"""Weights for the native kernels: which formats they read, and the planes' addresses."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.backends.stored_indices import check_indices, check_order
from edge_runtime.engine.formats import ENCODINGS, Array, get_format
from edge_runtime.engine.layout import round_up
from edge_runtime.engine.packing import DEFAULT_GROUP, cpu_packing, pack, plane_items, unpack
from edge_runtime.errors import BadEngineFile

ENCODING_ID = {name: i for i, name in enumerate(ENCODINGS)}  # as in the generated header

# (encoding of the codes, scale per, encoding of the scales, zero points) that kernels exist for
_SHAPES = {
    ("f32", None, None, False),
    ("f16", None, None, False),
    ("bf16", None, None, False),
    ("e5m2", None, None, False),
    ("e4m3", "row", "f32", False),
    ("e4m3", "tensor", "f32", False),
    ("e4m3", "group", "f32", False),
    ("i8", "row", "f32", False),
    ("i8", "group", "f16", False),
    ("u4o8", "group", "f16", False),
    ("u4", "group", "f16", True),
    ("nf4", "group", "f16", False),
    ("nf4", "group", "f32", False),
    ("nf4", "group", "dynamic8", False),
}
_GROUPS = (32, 64, 128)


def kernel_shape(name: str) -> tuple[str, str | None] | None:
    """(encoding of the codes, scale per) of a format that the kernels read, else None."""
    fmt = get_format(name)
    scale, zero = fmt.plane("scale"), fmt.plane("zero")
    per = None if scale is None else "group" if isinstance(scale.per, int) else scale.per
    shape = (fmt.planes[0].encoding, per, scale.encoding if scale else None, zero is not None)
    known = shape in _SHAPES and (fmt.group is None or fmt.group in _GROUPS)
    return (shape[0], per) if known and (shape[0] != "nf4" or fmt.group == DEFAULT_GROUP) else None


class CpuWeights:
    """Addresses of the tensors' planes; a tensor in another packing is repacked once and kept here."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._matrices: dict[str, rec.Matrix] = {}
        self._vectors: dict[str, Array] = {}
        self.planes: list[Array] = []
        self.repacked_bytes = 0

    def matrix(self, name: str) -> rec.Matrix:
        if name not in self._matrices:
            tensor = self._tensor(name)
            fmt = get_format(tensor.format)
            shape = kernel_shape(tensor.format)
            assert shape is not None  # supports() has said so
            planes = self._packed(name, tensor, cpu_packing(tensor.format))
            kept = {plane: self._keep(data) for plane, data in planes.items()}
            scale = fmt.plane("scale")
            self._matrices[name] = rec.Matrix(
                codes=kept[fmt.planes[0].name],
                scale=kept.get("scale"),
                zero=kept.get("zero"),
                rows=tensor.rows,
                cols=tensor.cols,
                encoding=ENCODING_ID[shape[0]],
                scale_per=rec.SCALE_PER[shape[1]],
                group=fmt.group or DEFAULT_GROUP,
                scale_encoding=ENCODING_ID[scale.encoding] if scale else 0,
                second=kept.get("scale2"),
                offset=kept.get("offset"),
                outlier=kept.get("outlier"),
                index=kept.get("index"),
                outliers=planes["index"].size if "index" in planes else 0,
            )
        return self._matrices[name]

    def vector(self, name: str | None) -> int | None:
        return None if name is None else int(self._values(name).ctypes.data)

    def order(self, name: str, width: int) -> int:
        """Address of a gather op's columns, f32, each below `width`. Raises BadEngineFile."""
        values = self._values(name)
        check_order(name, values, width)
        return int(values.ctypes.data)

    def _values(self, name: str) -> Array:
        """A vector as f32 (n,), kept."""
        if name not in self._vectors:
            tensor = self._tensor(name)
            planes = self._packed(name, tensor, "rows")
            if tensor.format == "f32":
                values = planes["w"]
            else:
                fmt = get_format(tensor.format)
                two_d = unpack(tensor.format, "rows", planes, tensor.rows, tensor.cols)
                values = fmt.decode(two_d, tensor.rows, tensor.cols).reshape(-1)
                self.repacked_bytes += round_up(values.nbytes)
            self._keep(values)
            self._vectors[name] = self.planes[-1]
        return self._vectors[name]

    def _tensor(self, name: str) -> PackedTensor:
        tensor, spec = self._part.weights[name], self._part.program.tensors[name]
        if (tensor.rows, tensor.cols) != (spec.rows, spec.cols):
            raise BadEngineFile(
                f"tensor {name!r} is {tensor.rows}x{tensor.cols}, its program says {spec.rows}x{spec.cols}"
            )
        return tensor

    def _packed(self, name: str, tensor: PackedTensor, packing: str) -> dict[str, Array]:
        for plane, (count, dtype) in plane_items(
            tensor.format, tensor.packing, tensor.rows, tensor.cols
        ).items():
            got = tensor.planes.get(plane)
            if got is None or got.shape != (count,) or got.dtype != np.dtype(dtype):
                found = "is missing" if got is None else f"is {got.dtype} {got.shape}"
                raise BadEngineFile(f"tensor {name!r}: plane {plane!r} {found}, expected {dtype} ({count},)")
        check_indices(name, tensor)
        if tensor.packing == packing:
            return dict(tensor.planes)
        two_d = unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
        planes = pack(tensor.format, packing, two_d, tensor.rows, tensor.cols)
        self.repacked_bytes += sum(round_up(p.nbytes) for p in planes.values())
        return planes

    def _keep(self, plane: Array) -> int:
        contiguous = np.ascontiguousarray(plane)
        self.planes.append(contiguous)
        return int(contiguous.ctypes.data)
