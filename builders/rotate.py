"""Rotations merged into the weights: the same function, with outliers spread over all channels.

QuaRot (Ashkboos et al. 2024, arXiv 2404.00456) and SpinQuant (Liu et al. 2024), the parts that cost nothing
at run time: Q on the residual stream, and one on the values of each head between v and o. With h' = h Q the
norm x = h / rms(h) * g turns with it, so linears that read it become W diag(g) Q with g = 1, and those that
write to the stream become Q^T W. A table that is embedding and head at once is then two tensors, unless the
last norm's g is the same everywhere. Any algorithm rounds the turned weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from builders.hadamard import Turn, make_turn
from builders.sources.matrix import Stored
from builders.weights import Weights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Add, AnyOp, Attention, Embed, KvAppend, Linear, Logits, Norm, Rope, writes
from edge_runtime.engine.program import Program
from edge_runtime.errors import Unsupported

_HEAD = "rotated.head"


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one tensor W of the new program.

    source: the tensor of the old program. gain: the norm whose weights multiply its columns. right, left: Q
    at its inputs, Q^T at its outputs (rows); heads_right, heads_left: the same for each head of that width.
    ones: it is a norm whose weights went into the linears.
    """

    source: str
    gain: str | None = None
    right: bool = False
    left: bool = False
    heads_right: int = 0
    heads_left: int = 0
    ones: bool = False


class RotatedWeights:
    """The turned weights of `base`, a provider as `builders.weights.Weights`."""

    def __init__(self, base: Weights, program: Program, changes: dict[str, _Change], seed: int) -> None:
        self.program = program
        self._base = base
        self._changes = changes
        self._stream = make_turn(_stream_width(base.program), seed)
        self._seed = seed
        self._heads: dict[int, Turn] = {}
        self._last: tuple[str, Array] | None = None  # a matrix turned at its outputs is made whole

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        change = self._changes.get(name)
        if change is None:
            return self._base.block(name, start, stop)
        if change.ones:
            return np.ones((1, self.program.tensors[name].cols), np.float32)
        if not (change.left or change.heads_left):
            return self._columns(change, self._base.block(change.source, start, stop)).astype(np.float32)
        if self._last is None or self._last[0] != name:
            self._last = None
            self._last = name, self._whole(name, change)
        return self._last[1][start:stop]

    def rows(self, name: str, ids: Array) -> Array:
        change = self._changes.get(name)
        if change is None or change.left or change.heads_left or change.ones:
            return self(name)[ids]
        return self._columns(change, self._base.rows(change.source, ids)).astype(np.float32)

    def stored(self, name: str, fmt: str) -> Stored | None:
        """Turned values are nobody's stored ones."""
        return None

    def unturned(self, hidden: Array) -> Array:
        """Rows of the residual stream, or of the last norm's output, as the model before had them."""
        return self._stream.back(hidden).astype(np.float32)

    def _columns(self, change: _Change, values: Array) -> Array:
        """Turn the columns of rows of a matrix, f64."""
        out: Array = values.astype(np.float64)
        if change.gain is not None:
            out = out * self._base(change.gain)[0]
        if change.right:
            out = self._stream.right(out)
        if change.heads_right:
            heads = out.reshape(-1, change.heads_right)
            out = self._head(change.heads_right).right(heads).reshape(out.shape)
        return out

    def _whole(self, name: str, change: _Change) -> Array:
        spec = self.program.tensors[name]
        out = np.empty((spec.rows, spec.cols), np.float32)
        # A bias is stored (1, rows): its one row turns as a column of outputs does
        outputs = 1 if spec.role == "vector" else 0
        values = self._columns(change, self._base(change.source))
        values = values if outputs else values.T  # (columns, outputs): outputs turn along the last axis
        if change.left:
            values = self._stream.right(values)
        if change.heads_left:
            heads = np.ascontiguousarray(values).reshape(-1, change.heads_left)
            values = self._head(change.heads_left).right(heads).reshape(values.shape)
        out[...] = values if outputs else values.T
        return out

    def _head(self, width: int) -> Turn:
        if width not in self._heads:
            self._heads[width] = make_turn(width, self._seed + 1)
        return self._heads[width]


def rotate(weights: Weights, seed: int) -> RotatedWeights:
    """The model of `weights` with its residual stream and its heads' values turned, the same function.

    Raises Unsupported where the program does something with the stream that no rotation commutes with.
    """
    plan = _Planner(weights)
    program = plan.run()
    program.check()
    return RotatedWeights(weights, program, plan.changes, seed)


def _stream_width(program: Program) -> int:
    first = program.ops[0]
    if not isinstance(first, Embed):
        raise Unsupported("--rotate: the program begins with no embedding, so it has no stream to turn")
    return program.buffers[first.out]


class _Planner:
    """Walks the ops once, knowing of every buffer whether it is in the turned basis."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._program = weights.program
        self.changes: dict[str, _Change] = {}
        self._turned: set[str] = set()
        self._gained: dict[str, str] = {}  # turned buffers whose norm's weight must go into their readers
        self._writer: dict[str, Linear] = {}  # buffers that hold just what a linear gave
        self._values: dict[int, Linear] = {}  # cache slot -> the linear that gave its values
        self._mixed: dict[str, int] = {}  # attention outputs -> cache slot

    def run(self) -> Program:
        _stream_width(self._program)
        for op in self._program.ops:
            self._op(op)
        return self._rewritten()

    def _op(self, op: AnyOp) -> None:
        match op:
            case Embed():
                self._set(op.weight, right=True)
                self._now(op.out, turned=True)
            case Norm() if op.x in self._turned:
                self._norm(op)
            case Linear():
                self._linear(op)
            case Logits():
                self._reads(op.weight, op.x)
            case Add() if {op.a, op.b} & self._turned:
                for name in (op.a, op.b):
                    self._turn_output(name)
                self._now(op.out, turned=True)
            case KvAppend():
                if op.v in self._writer:
                    self._values[op.layer] = self._writer[op.v]
            case Attention():
                self._now(op.out)
                self._mixed[op.out] = op.layer
            case Rope() | Norm():
                self._now(op.x if isinstance(op, Rope) else op.out)
            case _:
                used = {name for name in (getattr(op, "x", None), getattr(op, "up", None)) if name}
                if used & self._turned:
                    raise _cannot(f"{type(op).__name__.lower()} acts on the residual stream itself")
                for name in writes(op):
                    self._now(name)

    def _norm(self, op: Norm) -> None:
        if op.kind != "rms" or op.bias is not None or op.group:
            raise _cannot("only an RMS norm of the whole stream commutes with a rotation")
        gain = self._weights(op.weight)[0]
        self._now(op.out, turned=True)
        if not np.all(gain == gain[0]):
            self._gained[op.out] = op.weight
            self.changes[op.weight] = _Change(op.weight, ones=True)

    def _linear(self, op: Linear) -> None:
        if op.x in self._turned:
            self._reads(op.weight, op.x)
        elif op.x in self._mixed:
            self._turn_heads(op, self._mixed[op.x])
        self._now(op.out)
        self._writer[op.out] = op

    def _reads(self, weight: str, x: str) -> None:
        """A matrix that reads a turned buffer."""
        if x in self._turned:
            self._set(weight, right=True, gain=self._gained.get(x))

    def _turn_output(self, name: str) -> None:
        if name in self._turned:
            if name in self._gained:
                raise _cannot("a norm's output is added to the residual stream")
            return
        if name not in self._writer:
            raise _cannot(f"{name!r} is added to the residual stream, but no linear gave it")
        op = self._writer[name]
        for tensor in (op.weight, op.bias):
            if tensor is not None:
                self._set(tensor, left=True)

    def _turn_heads(self, op: Linear, slot: int) -> None:
        """Values of each head turn behind v and back in front of o."""
        giver = self._values.get(slot)
        width = self._program.cache[slot].head_dim
        if giver is None or width % 2:
            return  # something stands between v and the cache: its basis stays
        for tensor in (giver.weight, giver.bias):
            if tensor is not None:
                self._set(tensor, heads_left=width)
        self._set(op.weight, heads_right=width)

    def _set(self, tensor: str, **what: object) -> None:
        """Add to a tensor's change; a table changed in two ways becomes two, one of them for the head."""
        old = self.changes.get(tensor, _Change(tensor))
        new = replace(old, **what)  # type: ignore[arg-type]
        spec = self._program.tensors[tensor]
        if spec.role in ("embedding", "head") and tensor in self.changes and new != old:
            self.changes[_HEAD] = replace(_Change(tensor), **what)  # type: ignore[arg-type]
            return
        if tensor in self.changes and self._used_before(old, what):
            raise _cannot(f"{tensor!r} is used in two places of the stream")
        self.changes[tensor] = new

    @staticmethod
    def _used_before(old: _Change, what: dict[str, object]) -> bool:
        """Whether the same side was already turned otherwise."""
        return any(getattr(old, side) not in (None, False, 0, value) for side, value in what.items())

    def _now(self, name: str, turned: bool = False) -> None:
        """Buffer `name` holds a new value."""
        self._turned.discard(name)
        self._gained.pop(name, None)
        self._writer.pop(name, None)
        self._mixed.pop(name, None)
        if turned:
            self._turned.add(name)

    def _rewritten(self) -> Program:
        program = self._program
        if _HEAD not in self.changes:
            return program
        head = program.heads[0]
        tensors = dict(program.tensors)
        spec = tensors[head.weight]
        tensors[head.weight] = msgspec.structs.replace(spec, role="embedding")
        tensors[_HEAD] = msgspec.structs.replace(spec, role="head")
        ops: Sequence[AnyOp] = (*program.body, msgspec.structs.replace(head, weight=_HEAD))
        return msgspec.structs.replace(program, ops=tuple(ops), tensors=tensors)


def _cannot(why: str) -> Unsupported:
    return Unsupported(f"--rotate: this model cannot be rotated without a change of meaning: {why}")
