"""A Part turned into the records of the cpu backend: where everything lies, and each op with its pointers."""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.cpu_weights import ENCODING_ID, CpuWeights
from edge_runtime.backends.protocol import Part
from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import cache_arrays, kv_format
from edge_runtime.engine.layout import lay_out, round_up
from edge_runtime.engine.memory import SMALLEST_GROUP, angle_tables, padded_cols, scratch_regions
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)

Side = Literal["k", "v"]
ACTIVATIONS = {"silu": rec.SILU, "gelu": rec.GELU, "gelu_tanh": rec.GELU_TANH, "relu": rec.RELU}


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
            at += round_up(array.nbytes)
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
    weights = CpuWeights(part)
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
    op: AnyOp, part: Part, arena: Arena, weights: CpuWeights, angles: Sequence[tuple[str, float]]
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
        case Input():
            return rec.Op(kind=rec.INPUT, out=buffer(op.out), out_width=width[op.out])
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
