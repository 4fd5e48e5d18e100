"""A Part turned into the records of the cpu backend: where everything lies, and each op with its pointers."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.cpu_weights import ENCODING_ID, CpuWeights
from edge_runtime.backends.protocol import Part
from edge_runtime.engine.angles import angle_tables
from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import cache_arrays, kv_format, open_arrays, per_channel
from edge_runtime.engine.layout import lay_out, round_up
from edge_runtime.engine.memory import SMALLEST_GROUP, padded_cols, scratch_regions
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Gather,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
    Round,
)
from edge_runtime.engine.program import Program
from edge_runtime.errors import Unsupported

Side = Literal["k", "v"]
ACTIVATIONS = {"silu": rec.SILU, "gelu": rec.GELU, "gelu_tanh": rec.GELU_TANH, "relu": rec.RELU}
ROUNDINGS = {"fp8_e4m3": rec.ROUND_E4M3, "int8": rec.ROUND_I8}


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
        beside = open_arrays(part.program, part.kv, part.step)
        at = 0
        starts: list[int] = []
        for array in arrays:
            starts.append(at)
            at += round_up(array.nbytes)
        open_starts: list[int] = []  # of each layer's open pages, then of the step's own keys
        for shape in (*beside.pages, beside.fresh) if beside is not None else ():
            open_starts.append(at)
            at += round_up(4 * math.prod(shape))
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
        # (pages, kv_heads, rows, items) for each layer, k or v, and plane, in arena order
        self.cache_views = [
            self._bytes[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
            for start, a in zip(starts, arrays, strict=True)
        ]
        self._cache = {
            (a.layer, a.which, a.plane): view for a, view in zip(arrays, self.cache_views, strict=True)
        }
        self._open = [self._base + start for start in open_starts]
        code_stride = padded_cols(part.program)
        self.scratch = rec.Scratch(
            **{name: self._base + offset for name, offset in self._offsets.items()},
            fresh=self._open[-1] if self._open else None,
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

    def open_pages(self, layer: int) -> int | None:
        """Address of a layer's unquantized keys; None where K is not per channel."""
        return self._open[layer] if self._open else None

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
    """Records of ops, cache slots and tables of angles.

    Raises BadEngineFile on a plane of a wrong size, Unsupported where K cannot be per channel.
    """
    program = part.program
    if part.kv.per_channel:
        _check_channels(program, part.kv.k)
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
                open=arena.open_pages(layer),
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
                first=op.first,
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
        case Gather():
            return rec.Op(
                kind=rec.GATHER,
                x=buffer(op.x),
                out=buffer(op.out),
                vec=weights.order(op.order, width[op.x]),
                x_width=width[op.x],
                out_width=width[op.out],
            )
        case Round():
            return rec.Op(
                kind=ROUNDINGS[op.format],
                x=buffer(op.x),
                out=buffer(op.out),
                x_width=width[op.x],
                out_width=width[op.out],
                scale=op.scale or 0.0,
            )
        case Logits():
            return rec.Op(
                kind=rec.LOGITS,
                x=buffer(op.x),
                out=arena.scratch_address("logits") + 4 * op.first,
                x_width=width[op.x],
                out_width=part.program.vocab_size,
                weight=weights.matrix(op.weight),
                bias=weights.vector(op.bias),
                scale=op.scale,
                softcap=op.softcap or 0.0,
            )


def _check_channels(program: Program, name: str) -> None:
    """The step's own keys lie in one array, so a layer must attend before the next one appends."""
    last = -1
    for op in program.ops:
        if isinstance(op, KvAppend):
            last = op.layer
        elif isinstance(op, Attention) and op.layer != last:
            raise Unsupported(
                f"K in {name}: attention reads layer {op.layer} after layer {last} was appended, which the "
                "cpu backend cannot; use a K with a scale for each token"
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
        per_channel=per_channel(name),
    )
