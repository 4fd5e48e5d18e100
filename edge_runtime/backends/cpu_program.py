"""A Part turned into the records of the cpu backend: where everything lies, and each op with its pointers."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.engine.formats import ENCODINGS, Array, get_format
from edge_runtime.engine.kv import cache_arrays, kv_format
from edge_runtime.engine.layout import ALIGN, lay_out
from edge_runtime.engine.memory import SMALLEST_GROUP, angle_tables, padded_cols, scratch_regions
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.packing import DEFAULT_GROUP, cpu_packing, pack, plane_items, unpack
from edge_runtime.errors import BadEngineFile

Side = Literal["k", "v"]
ENCODING_ID = {name: i for i, name in enumerate(ENCODINGS)}  # as in the generated header
ACTIVATIONS = {"silu": rec.SILU, "gelu": rec.GELU, "gelu_tanh": rec.GELU_TANH, "relu": rec.RELU}

# (encoding of the codes, scale per, encoding of the scales, zero points) that kernels exist for
_SHAPES = {
    ("f32", None, None, False),
    ("f16", None, None, False),
    ("bf16", None, None, False),
    ("e5m2", None, None, False),
    ("e4m3", "row", "f32", False),
    ("e4m3", "tensor", "f32", False),
    ("i8", "row", "f32", False),
    ("i8", "group", "f16", False),
    ("u4o8", "group", "f16", False),
    ("u4", "group", "f16", True),
    ("nf4", "group", "f16", False),
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


def allocate(nbytes: int) -> Array:
    """Zeroed, page-aligned bytes that the kernel gives back at once when the last view is gone."""
    memory = mmap.mmap(-1, max(nbytes, 1))
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages is slower, not wrong
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)[:nbytes]


class Arena:
    """All memory of a loaded part beside its weights: KV cache, activation buffers, scratch, in one block."""

    def __init__(self, part: Part, threads: int) -> None:
        layout = lay_out(part.program, part.step)
        self._regions = scratch_regions(part.program, part.step, threads)
        arrays = cache_arrays(part.program, part.kv)
        at = 0
        starts: list[int] = []
        for array in arrays:
            starts.append(at)
            at += _round_up(array.nbytes)
        buffers = at
        at += layout.nbytes
        self._offsets: dict[str, int] = {}
        for name, size in self._regions.items():
            self._offsets[name] = at
            at += size
        self.nbytes = at
        self._bytes = allocate(at)
        self._base = self._bytes.ctypes.data
        self._buffers = {name: self._base + buffers + offset for name, offset in layout.offsets.items()}
        # (pages, kv_heads, page_tokens, items) for each layer, k or v, and plane, in arena order
        self.cache_views = [
            self._bytes[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
            for start, a in zip(starts, arrays, strict=True)
        ]
        self._cache = {
            (a.layer, a.which, a.plane): view for a, view in zip(arrays, self.cache_views, strict=True)
        }
        code_stride = padded_cols(part.program)
        self.scratch = rec.Scratch(
            **{name: self._base + offset for name, offset in self._offsets.items()},
            code_stride=code_stride,
            group_stride=code_stride // SMALLEST_GROUP,
            attention_stride=self._regions["attention"] // threads // 4,
        )

    def buffer(self, name: str) -> int:
        """Address of an activation buffer."""
        return self._buffers[name]

    def scratch_address(self, name: str) -> int:
        return self._base + self._offsets[name]

    def cache(self, layer: int, which: Side, plane: str) -> Array:
        return self._cache[layer, which, plane]

    def view(self, region: str, dtype: Any, shape: tuple[int, ...]) -> Array:
        start = self._offsets[region]
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        values: Array = self._bytes[start : start + nbytes].view(dtype).reshape(shape)
        return values

    def release(self) -> None:
        """Drop the views, so that the memory goes once no logits of it are held."""
        self.cache_views = []
        self._cache = {}
        self._bytes = np.empty(0, np.uint8)
        self.nbytes = 0


@dataclass
class Compiled:
    """ctypes arrays and the arrays that they point into."""

    ops: Any
    cache: Any
    tables: Any
    table_count: int
    planes: list[Array] = field(default_factory=list)
    repacked_bytes: int = 0

    def release(self) -> None:
        self.planes = []
        self.repacked_bytes = 0


def compile_ops(part: Part, arena: Arena) -> Compiled:
    """Records of ops, cache slots and tables of angles. Raises BadEngineFile on a plane of a wrong size."""
    program = part.program
    weights = _Weights(part)
    keys = angle_tables(program)
    tables = (rec.Op * max(1, len(keys)))()
    at = arena.scratch_address("angles")
    for i, ((name, scale), count) in enumerate(keys.items()):
        tables[i] = rec.Op(kind=rec.ROPE, vec=weights.vector(name), out=at, freqs=count, scale=scale)
        at += part.step.tokens * 2 * count * 4
    ops = (rec.Op * len(program.ops))(*(_op(op, part, arena, weights, list(keys)) for op in program.ops))
    cache = (rec.Cache * max(1, len(program.cache)))(
        *(
            rec.Cache(
                k=_kv(arena, layer, "k", part.kv.k, slot.head_dim),
                v=_kv(arena, layer, "v", part.kv.v, slot.head_dim),
                kv_heads=slot.kv_heads,
                head_dim=slot.head_dim,
            )
            for layer, slot in enumerate(program.cache)
        )
    )
    return Compiled(ops, cache, tables, len(keys), weights.planes, weights.repacked_bytes)


def _op(
    op: AnyOp, part: Part, arena: Arena, weights: _Weights, angles: Sequence[tuple[str, float]]
) -> rec.Op:
    width, buffer = part.program.buffers, arena.buffer
    match op:
        case Embed():
            return rec.Op(
                kind=rec.EMBED,
                out=buffer(op.out),
                out_width=width[op.out],
                weight=weights.matrix(op.weight),
                scale=op.scale,
            )
        case Norm():
            return rec.Op(
                kind=rec.NORM_RMS if op.kind == "rms" else rec.NORM_LAYER,
                x=buffer(op.x),
                out=buffer(op.out),
                x_width=width[op.x],
                out_width=width[op.out],
                vec=weights.vector(op.weight),
                bias=weights.vector(op.bias),
                eps=op.eps,
                group=op.group,
            )
        case Linear():
            return rec.Op(
                kind=rec.LINEAR,
                x=buffer(op.x),
                out=buffer(op.out),
                x_width=width[op.x],
                out_width=width[op.out],
                weight=weights.matrix(op.weight),
                bias=weights.vector(op.bias),
            )
        case Rope():
            return rec.Op(
                kind=rec.ROPE,
                x=buffer(op.x),
                out=buffer(op.x),
                x_width=width[op.x],
                out_width=width[op.x],
                head_dim=op.head_dim,
                freqs=part.program.tensors[op.inv_freq].cols,
                angles=angles.index((op.inv_freq, op.scale)),
            )
        case KvAppend():
            return rec.Op(
                kind=rec.KV_APPEND, x=buffer(op.k), y=buffer(op.v), x_width=width[op.k], layer=op.layer
            )
        case Attention():
            return rec.Op(
                kind=rec.ATTENTION,
                x=buffer(op.q),
                out=buffer(op.out),
                x_width=width[op.q],
                out_width=width[op.out],
                layer=op.layer,
                heads=op.heads,
                kv_heads=op.kv_heads,
                head_dim=op.head_dim,
                scale=op.scale,
                window=op.window or 0,
                softcap=op.softcap or 0.0,
            )
        case Activation():
            return rec.Op(
                kind=ACTIVATIONS[op.kind],
                x=buffer(op.x),
                y=None if op.up is None else buffer(op.up),
                out=buffer(op.out),
                x_width=width[op.x],
                out_width=width[op.out],
            )
        case Add():
            return rec.Op(
                kind=rec.ADD,
                x=buffer(op.a),
                y=buffer(op.b),
                out=buffer(op.out),
                x_width=width[op.a],
                out_width=width[op.out],
                scale=op.scale,
            )
        case Logits():
            return rec.Op(
                kind=rec.LOGITS,
                x=buffer(op.x),
                out=arena.scratch_address("logits"),
                x_width=width[op.x],
                out_width=part.program.vocab_size,
                weight=weights.matrix(op.weight),
                bias=weights.vector(op.bias),
                scale=op.scale,
                softcap=op.softcap or 0.0,
            )


def _kv(arena: Arena, layer: int, which: Side, name: str, head_dim: int) -> rec.Kv:
    fmt = kv_format(name)
    planes = {p.name: arena.cache(layer, which, p.name) for p in fmt.planes}
    codes = planes[fmt.planes[0].name]
    scale, zero = planes.get("scale"), planes.get("zero")
    return rec.Kv(
        codes=codes.ctypes.data,
        scale=None if scale is None else scale.ctypes.data,
        zero=None if zero is None else zero.ctypes.data,
        encoding=ENCODING_ID[fmt.planes[0].encoding],
        row_bytes=codes.shape[3] * codes.itemsize,
        row_scales=0 if scale is None else scale.shape[3],
        group=fmt.group or head_dim,
    )


class _Weights:
    """Addresses of the tensors' planes; a tensor in another packing is repacked once and kept here."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._matrices: dict[str, rec.Matrix] = {}
        self._vectors: dict[str, int] = {}
        self.planes: list[Array] = []
        self.repacked_bytes = 0

    def matrix(self, name: str) -> rec.Matrix:
        if name not in self._matrices:
            tensor = self._tensor(name)
            fmt = get_format(tensor.format)
            shape = kernel_shape(tensor.format)
            assert shape is not None  # supports() has said so
            planes = self._packed(name, tensor, cpu_packing(tensor.format))
            self._matrices[name] = rec.Matrix(
                codes=self._keep(planes[fmt.planes[0].name]),
                scale=self._keep(planes["scale"]) if "scale" in planes else None,
                zero=self._keep(planes["zero"]) if "zero" in planes else None,
                rows=tensor.rows,
                cols=tensor.cols,
                encoding=ENCODING_ID[shape[0]],
                scale_per=rec.SCALE_PER[shape[1]],
                group=fmt.group or DEFAULT_GROUP,
            )
        return self._matrices[name]

    def vector(self, name: str | None) -> int | None:
        if name is None:
            return None
        if name not in self._vectors:
            tensor = self._tensor(name)
            planes = self._packed(name, tensor, "rows")
            if tensor.format == "f32":
                values = planes["w"]
            else:
                fmt = get_format(tensor.format)
                two_d = unpack(tensor.format, "rows", planes, tensor.rows, tensor.cols)
                values = fmt.decode(two_d, tensor.rows, tensor.cols).reshape(-1)
                self.repacked_bytes += _round_up(values.nbytes)
            self._vectors[name] = self._keep(values)
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
        if tensor.packing == packing:
            return dict(tensor.planes)
        two_d = unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
        planes = pack(tensor.format, packing, two_d, tensor.rows, tensor.cols)
        self.repacked_bytes += sum(_round_up(p.nbytes) for p in planes.values())
        return planes

    def _keep(self, plane: Array) -> int:
        contiguous = np.ascontiguousarray(plane)
        self.planes.append(contiguous)
        return int(contiguous.ctypes.data)


def _round_up(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN
