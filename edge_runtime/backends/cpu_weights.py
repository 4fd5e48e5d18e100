"""Weights for the native kernels: which formats they read, and the planes' addresses."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.packed_planes import check_planes, in_packing, tensor_of
from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.backends.stored_indices import check_order
from edge_runtime.engine.formats import ENCODINGS, Array, Format, Plane, get_format
from edge_runtime.engine.formats.record import Per
from edge_runtime.engine.layout import round_up
from edge_runtime.engine.packing import DEFAULT_GROUP, cpu_packing, unpack

ENCODING_ID = {name: i for i, name in enumerate(ENCODINGS)}  # as in the generated header

# What kernels exist for: encodings of the planes of codes, what a scale covers, encodings of other planes.
_GROUPS = (32, 64, 128)
_F16 = {"scale": "f16"}
_WITH_ZERO = {"scale": "f16", "zero": "u8"}
_WITH_MIN = {"scale": "f16", "min": "f16"}
_SIGNED_K = {"scale": "i8", "super": "f16"}
_K_WITH_MIN = {"scale": "u8", "min": "u8", "super": "f16", "super_min": "f16"}
_SHAPES: tuple[tuple[tuple[str, ...], tuple[Per | None, ...], dict[str, str]], ...] = (
    (("f32",), (None,), {}),
    (("f16",), (None,), {}),
    (("bf16",), (None,), {}),
    (("e5m2",), (None,), {}),
    (("e4m3",), ("row", "tensor", 128), {"scale": "f32"}),
    (("i8",), ("row",), {"scale": "f32"}),
    (("i8",), ("row",), {"scale": "f32", "outlier": "f16", "index": "i32"}),
    (("i8",), _GROUPS, _F16),
    (("nf4",), (DEFAULT_GROUP,), _F16),
    (("nf4",), (DEFAULT_GROUP,), {"scale": "f32"}),
    (("nf4",), (DEFAULT_GROUP,), {"scale": "dynamic8", "scale2": "f32", "offset": "f32"}),
    (("u2o2",), _GROUPS, _F16),
    (("u2o4", "u1"), _GROUPS, _F16),
    (("u4o8",), _GROUPS, _F16),
    (("u4o16", "u1"), _GROUPS, _F16),
    (("u4o32", "u2"), _GROUPS, _F16),
    (("u2",), _GROUPS, _WITH_ZERO),
    (("u2", "u1"), _GROUPS, _WITH_ZERO),
    (("u4",), _GROUPS, _WITH_ZERO),
    (("u4",), _GROUPS, _WITH_MIN),
    (("u4", "u1"), _GROUPS, _WITH_MIN),
    (("u2",), (16,), {"scale_min": "u4u4", "super": "f16", "super_min": "f16"}),
    (("u2o4", "u1"), (16,), _SIGNED_K),
    (("u4o32", "u2"), (16,), _SIGNED_K),
    (("u4",), (32,), _K_WITH_MIN),
    (("u4", "u1"), (32,), _K_WITH_MIN),
    (("e2m1",), (16,), {"scale": "e4m3", "super": "f32"}),
    (("e2m1",), (32,), {"scale": "e8m0"}),
    (("tcq2",), (DEFAULT_GROUP,), {"scale": "e4m3", "super": "f32"}),
    (("tcq3", "u1"), (DEFAULT_GROUP,), {"scale": "e4m3", "super": "f32"}),
    (("tcq4",), (DEFAULT_GROUP,), {"scale": "e4m3", "super": "f32"}),
)


def kernel_shape(name: str) -> tuple[str, str | None] | None:
    """(encoding of the codes' lower bits, scale per) of a format that the kernels read, else None."""
    fmt = get_format(name)
    scale = _scale_plane(fmt)
    codes = tuple(p.encoding for p in fmt.codes)
    shape = (codes, scale.per if scale else None, {p.name: p.encoding for p in fmt.grid_planes})
    if not any(shape[0] == c and shape[1] in pers and shape[2] == grid for c, pers, grid in _SHAPES):
        return None
    return codes[0], None if scale is None else "group" if isinstance(scale.per, int) else scale.per


def _scale_plane(fmt: Format) -> Plane | None:
    return fmt.plane("scale") or fmt.plane("scale_min")


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
            tensor = tensor_of(self._part, name)
            fmt = get_format(tensor.format)
            shape = kernel_shape(tensor.format)
            assert shape is not None  # supports() has said so
            planes = self._packed(name, tensor, cpu_packing(tensor.format))
            kept = {plane: self._keep(data) for plane, data in planes.items()}
            scale, high = _scale_plane(fmt), fmt.codes[1:]
            self._matrices[name] = rec.Matrix(
                codes=kept[fmt.codes[0].name],
                scale=kept[scale.name] if scale else None,
                zero=kept.get("zero"),
                rows=tensor.rows,
                cols=tensor.cols,
                encoding=ENCODING_ID[shape[0]],
                scale_per=rec.SCALE_PER[shape[1]],
                group=fmt.group or DEFAULT_GROUP,
                high_bits=ENCODINGS[high[0].encoding].bits if high else 0,
                high=kept[high[0].name] if high else None,
                min=kept.get("min"),
                super=kept.get("super"),
                super_min=kept.get("super_min"),
                second=kept.get("scale2"),
                offset=kept.get("offset"),
                outlier=kept.get("outlier"),
                index=kept.get("index"),
                outliers=planes["index"].size if "index" in planes else 0,
                scale_encoding=ENCODING_ID[scale.encoding] if scale else 0,
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
            tensor = tensor_of(self._part, name)
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

    def _packed(self, name: str, tensor: PackedTensor, packing: str) -> dict[str, Array]:
        check_planes(name, tensor)
        planes = in_packing(tensor, packing)
        if tensor.packing != packing:
            self.repacked_bytes += sum(round_up(p.nbytes) for p in planes.values())
        return planes

    def _keep(self, plane: Array) -> int:
        contiguous = np.ascontiguousarray(plane)
        self.planes.append(contiguous)
        return int(contiguous.ctypes.data)
