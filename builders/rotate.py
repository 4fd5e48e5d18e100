"""Rotations merged into a model's weights: the same f32 function, without channels of outliers.

R1 turns the residual stream and R2 each head's values, as in QuaRot (Ashkboos et al. 2024) and SpinQuant
(Liu et al. 2024). RMS norms commute with a rotation once their weights are multiplied into the linears behind
them, and attention is linear in its values. What reads the stream becomes W diag(norm) R1, what writes to it
R1^T W; v becomes R2^T W per head and o W R2. Nothing is added to a step: rotations that would have to run
online (of queries and keys after rope, of the gated product) are left out.

A tied head is untied, since the embedding and the head are then different matrices, unless the final norm's
weights are all equal. Refused, because not exact: layer norms, biased norms, a norm between a linear and the
stream (post norms), anything else that works on single channels of the stream, programs without embedding.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import msgspec
import numpy as np

from builders.equalize import ScaleGroup, scale_groups
from builders.hadamard import rotation
from builders.sources.matrix import Stored
from builders.weights import SourceWeights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Add, AnyOp, Embed, Linear, Logits, Norm, reads, writes
from edge_runtime.engine.ops import weights as tensors_of
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.errors import Unsupported


@dataclass(frozen=True, slots=True)
class _Turn:
    """How one tensor changes: source (its name in the checkpoint), then W diag(norm) R1, R1^T W, and heads of
    `rows_head` rows or `cols_head` columns by R2; a vector's `out` turns its columns. ones: a folded norm."""

    source: str
    norm: str | None = None
    into: bool = False
    out: bool = False
    rows_head: int = 0
    cols_head: int = 0
    ones: bool = False


class RotatedWeights:
    """`SourceWeights` of the rotated program. `changed`: tensors that differ, for whom an adapter's factors
    would mean something else."""

    def __init__(self, program: Program, inner: SourceWeights, turns: dict[str, _Turn], seed: int) -> None:
        self.program = program
        self._inner = inner
        self._turns = turns
        self._seed = seed
        self._made: dict[int, Array] = {}
        self._last: tuple[str, Array] | None = None

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self._turns)

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        turn = self._turns.get(name)
        if turn is None:
            return self._inner.block(name, start, stop)
        if turn.ones:
            return np.ones((1, self.program.tensors[name].cols), np.float32)
        if self.program.tensors[name].role == "vector":
            return self._vector(turn)
        if turn.out or turn.rows_head:
            return self._whole(name, turn)[start:stop]
        return self._columns(turn, self._inner.block(turn.source, start, stop))

    def rows(self, name: str, ids: Array) -> Array:
        turn = self._turns.get(name)
        if turn is None:
            return self._inner.rows(name, ids)
        if turn.ones or turn.out or turn.rows_head:
            return self(name)[ids]
        return self._columns(turn, self._inner.rows(turn.source, ids))

    def stored(self, name: str, fmt: str) -> Stored | None:
        return None if name in self._turns else self._inner.stored(name, fmt)

    def _whole(self, name: str, turn: _Turn) -> Array:
        """A tensor whose rows mix; the last one is kept, for it is asked for block by block."""
        if self._last is None or self._last[0] != name:
            self._last = None
            w = self._columns(turn, self._inner(turn.source))
            if turn.rows_head:
                r2 = self._rotation(turn.rows_head, 1)
                w = (r2.T @ w.reshape(-1, turn.rows_head, w.shape[1])).reshape(w.shape)
            if turn.out:
                w = self._rotation(len(w), 0).T @ w
            self._last = name, w.astype(np.float32)
        return self._last[1]

    def _columns(self, turn: _Turn, values: Array) -> Array:
        if turn.norm is not None:
            values = values.astype(np.float64) * self._inner(turn.norm)
        if turn.cols_head:
            heads = values.reshape(len(values), -1, turn.cols_head)
            values = (heads @ self._rotation(turn.cols_head, 1)).reshape(len(values), -1)
        if turn.into:
            values = values @ self._rotation(values.shape[1], 0)
        return values.astype(np.float32)

    def _vector(self, turn: _Turn) -> Array:
        """A bias, (1, n): it turns as the outputs of its linear do."""
        values = self._inner(turn.source).astype(np.float64)
        if turn.rows_head:
            values = (values.reshape(-1, turn.rows_head) @ self._rotation(turn.rows_head, 1)).reshape(1, -1)
        if turn.out:
            values = values @ self._rotation(values.shape[1], 0)
        return values.astype(np.float32)

    def _rotation(self, n: int, kind: int) -> Array:
        """R1 (kind 0) or R2 (kind 1) of its size."""
        key = 2 * n + kind
        if key not in self._made:
            self._made[key] = rotation(n, self._seed + kind)
        return self._made[key]


def rotate(weights: SourceWeights, seed: int = 0) -> RotatedWeights:
    """The rotated model; its `program` differs where the head had to be untied, and is the one to build.

    Weights are read one tensor at a time. Raises Unsupported where a rotation would not be exact.
    """
    walk = _Walk(weights)
    for op in weights.program.ops:
        walk.step(op)
    walk.finish()
    for group in scale_groups(weights.program)[0]:
        if group.head_dim:
            walk.turn_heads(group)
    program = msgspec.structs.replace(weights.program, ops=tuple(walk.ops), tensors=walk.tensors)
    program.check()
    return RotatedWeights(program, weights, walk.turns, seed)


@dataclass(frozen=True, slots=True)
class _Normed:
    """A value that is the stream normalised; `norm` names the weights that were folded, None if all equal."""

    norm: str | None


class _Walk:
    """Follows the residual stream through a program and notes how each tensor has to turn."""

    def __init__(self, weights: SourceWeights) -> None:
        self.ops: list[AnyOp] = []
        self.tensors = dict(weights.program.tensors)
        self.turns: dict[str, _Turn] = {}
        self._weights = weights
        self._holds: dict[str, Linear | _Normed | Literal["stream"] | None] = {}  # by buffer, None: plain
        self._embeddings: set[str] = set()
        self._unturned: set[str] = set()  # tensors that were used outside the stream

    def step(self, op: AnyOp) -> None:
        new: Linear | _Normed | Literal["stream"] | None = None
        held = {name: self._holds.get(name) for name in reads(op)}
        match op:
            case Embed():
                self._note(op.weight, _Turn(op.weight, into=True))
                self._embeddings.add(op.weight)
                new = "stream"
            case Norm() if held[op.x] == "stream":
                if op.kind != "rms" or op.bias is not None or op.group not in (0, self._width(op.x)):
                    raise _inexact("its norms are not plain RMS norms of the whole residual stream")
                new = self._fold(op.weight)
            case Linear() if held[op.x] == "stream" or isinstance(held[op.x], _Normed):
                self._note(op.weight, _Turn(op.weight, norm=_norm_of(held[op.x]), into=True))
                new = op
            case Logits() if held[op.x] == "stream" or isinstance(held[op.x], _Normed):
                op = self._logits(op, _norm_of(held[op.x]))
            case Add() if "stream" in held.values():
                for name in (op.a, op.b):
                    self._write(held[name])
                new = "stream"
            case _:
                if any(h == "stream" or isinstance(h, _Normed) for h in held.values()):
                    raise _inexact(
                        f"a {type(op).__name__.lower()} op works on channels of its residual stream"
                    )
                self._unturned.update(tensors_of(op) if not isinstance(op, Linear) else ())
                new = op if isinstance(op, Linear) else None
        for name in writes(op):
            self._holds[name] = new
        self.ops.append(op)

    def finish(self) -> None:
        if not self._embeddings:
            raise _inexact("it begins with rows of values instead of an embedding")
        if shared := sorted(self._unturned & self.turns.keys()):
            raise _inexact(f"{shared[0]!r} is used both on the residual stream and elsewhere")

    def turn_heads(self, group: ScaleGroup) -> None:
        """R2 between v and the linears that read attention's output."""
        for name in group.sources:
            turn = self.turns.setdefault(name, _Turn(name))
            self.turns[name] = replace(turn, rows_head=group.head_dim)
        for name in group.linears:
            turn = self.turns.setdefault(name, _Turn(name))
            self.turns[name] = replace(turn, cols_head=group.head_dim)

    def _fold(self, name: str) -> _Normed:
        values = self._weights(name)
        if (values == values[0, 0]).all():  # commutes with the rotation as it is
            self._unturned.add(name)
            return _Normed(None)
        self._note(name, _Turn(name, ones=True))
        return _Normed(name)

    def _write(self, held: object) -> None:
        """A summand of the stream: the stream itself, or the output of a linear, whose rows then turn."""
        if held == "stream":
            return
        if not isinstance(held, Linear):
            raise _inexact(
                "something else than a linear is added to its residual stream, such as a post norm"
            )
        turn = self.turns.get(held.weight, _Turn(held.weight))
        self.turns[held.weight] = replace(turn, out=True)
        if held.bias is not None:
            self._note(held.bias, _Turn(held.bias, out=True))

    def _logits(self, op: Logits, norm: str | None) -> Logits:
        if op.weight not in self._embeddings or norm is None:
            self._note(op.weight, _Turn(op.weight, norm=norm, into=True))
            return op
        name = next(n for n in ("head", "rotated_head") if n not in self.tensors)
        spec = self.tensors[op.weight]
        self.tensors[name] = TensorSpec(spec.rows, spec.cols, "head")
        self.tensors[op.weight] = TensorSpec(spec.rows, spec.cols, "embedding")
        self.turns[name] = _Turn(op.weight, norm=norm, into=True)
        return msgspec.structs.replace(op, weight=name)

    def _note(self, name: str, turn: _Turn) -> None:
        if self.turns.setdefault(name, turn) != turn:
            raise _inexact(f"{name!r} is used in places that would have to turn differently")

    def _width(self, buffer: str) -> int:
        return self._weights.program.buffers[buffer]


def _norm_of(held: object) -> str | None:
    return held.norm if isinstance(held, _Normed) else None


def _inexact(why: str) -> Unsupported:
    return Unsupported(f"this model cannot be rotated exactly: {why}; build it without rotation")
