"""Program: a model as a flat list of ops over named buffers, checked by shape before anything runs."""

from __future__ import annotations

from typing import Literal

import msgspec

from edge_runtime.engine import ops as op_table
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
from edge_runtime.errors import BadConfig

# Every integer of a program is bounded, so that products of three of them stay far below 2**63.
MAX_DIM = 1 << 24
MAX_OPS = 1 << 16
# Of a round op: never denormal, and its product with 448 is finite
LEAST_SCALE, GREATEST_SCALE = 2.0**-126, 2.0**119

# matrix: quantized freely; embedding/head: with more care; vector: norms, biases, tables, always f32
Role = Literal["matrix", "embedding", "head", "vector"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Shape and role of a weight: (rows, cols) = (outputs, inputs) for matrices, (1, n) for vectors."""

    rows: int
    cols: int
    role: Role

    @property
    def size(self) -> int:
        return self.rows * self.cols


class CacheSlot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layer's KV cache: heads and width of each, and the window beyond which keys are never read."""

    kv_heads: int
    head_dim: int
    window: int | None = None


class Program(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """ops run in order; buffers maps a name to its width (f32 values per token)."""

    ops: tuple[AnyOp, ...]
    tensors: dict[str, TensorSpec]
    buffers: dict[str, int]
    cache: tuple[CacheSlot, ...]
    vocab_size: int
    max_context: int

    @property
    def input_width(self) -> int | None:
        """Width of the rows that each step brings for its `input` op; None where tokens are looked up."""
        first = self.ops[0]
        return self.buffers[first.out] if isinstance(first, Input) else None

    @property
    def body(self) -> tuple[AnyOp, ...]:
        """The ops before the logits."""
        end = len(self.ops)
        while end > 0 and isinstance(self.ops[end - 1], Logits):
            end -= 1
        return self.ops[:end]

    @property
    def heads(self) -> tuple[Logits, ...]:
        """The logits ops that end the program, one for each block of the vocabulary."""
        heads = tuple(op for op in self.ops[len(self.body) :] if isinstance(op, Logits))
        assert heads  # check() proved it
        return heads

    @property
    def hidden_width(self) -> int:
        """Width of the rows that the logits read."""
        return self.buffers[self.heads[0].x]

    def check(self) -> None:
        """Prove every op's shape rule. Raises BadConfig naming the op; nothing runs before this passed."""
        if not 0 < len(self.ops) <= MAX_OPS:
            raise BadConfig(f"program: {len(self.ops)} ops, expected 1 to {MAX_OPS}")
        for name, value in (("vocab_size", self.vocab_size), ("max_context", self.max_context)):
            _dim(value, f"program.{name}")
        for name, width in self.buffers.items():
            _dim(width, f"buffer {name!r}")
        for name, spec in self.tensors.items():
            _dim(spec.rows, f"tensor {name!r} rows")
            _dim(spec.cols, f"tensor {name!r} cols")
        for i, slot in enumerate(self.cache):
            _dim(slot.kv_heads, f"cache slot {i} kv_heads")
            _dim(slot.head_dim, f"cache slot {i} head_dim")
            if slot.window is not None:
                _dim(slot.window, f"cache slot {i} window")
        if not isinstance(self.ops[-1], Logits) or any(isinstance(o, Logits) for o in self.body):
            raise BadConfig("program: logits ops are expected at the end, and only there")
        if isinstance(self.ops[0], Input) and any(isinstance(o, Embed | Input) for o in self.ops[1:]):
            raise BadConfig("program: one that begins with an input op has no embedding and no second input")
        written: set[str] = set()
        appended: set[int] = set()
        for i, op in enumerate(self.ops):
            where = f"op {i} ({type(op).__name__.lower()})"
            for name in op_table.reads(op):
                if name not in written:
                    raise BadConfig(f"{where}: reads buffer {name!r} before any op wrote it")
            for name in op_table.weights(op):
                if name not in self.tensors:
                    raise BadConfig(f"{where}: names tensor {name!r}, which the program does not declare")
            self._check_op(op, where, appended)
            written.update(op_table.writes(op))
        self._check_blocks()

    def _check_blocks(self) -> None:
        """Prove that each run of blocks, of an embedding or of the logits, has one row for every token id."""
        before: Embed | Logits | None = None
        end = self.vocab_size  # of the ids that the run has rows for; all, outside of one
        for i, op in enumerate(self.ops):
            where = f"op {i} ({type(op).__name__.lower()})"
            if end < self.vocab_size and not (
                type(op) is type(before) and msgspec.structs.replace(op, **_rows_of(before)) == before
            ):
                raise BadConfig(f"{where}: expected a block like op {i - 1} with the ids from {end} on")
            if not isinstance(op, Embed | Logits):
                continue
            again = isinstance(op, Logits) and op.first == 0 and i > len(self.body)
            if op.first != end % self.vocab_size or again:
                raise BadConfig(f"{where}: begins with the id {op.first}, expected {end % self.vocab_size}")
            before, end = op, op.first + self.tensors[op.weight].rows
            if end > self.vocab_size:
                raise BadConfig(f"{where}: has rows up to id {end - 1} of a vocabulary of {self.vocab_size}")
        if end < self.vocab_size:
            raise BadConfig(f"program: logits of the ids from {end} on are missing")

    def _check_op(self, op: AnyOp, where: str, appended: set[int]) -> None:
        def width(name: str) -> int:
            if name not in self.buffers:
                raise BadConfig(f"{where}: names buffer {name!r}, which the program does not declare")
            return self.buffers[name]

        def need(ok: bool, what: str) -> None:
            if not ok:
                raise BadConfig(f"{where}: {what}")

        def vector(name: str | None, n: int) -> None:
            if name is not None:
                spec = self.tensors[name]
                need(spec.rows == 1 and spec.cols == n, f"{name!r} is {_shape(spec)}, expected 1x{n}")
                need(spec.role == "vector", f"{name!r} has role {spec.role!r}, expected 'vector'")

        def matrix(name: str, rows: int, cols: int) -> None:
            spec = self.tensors[name]
            need(
                (spec.rows, spec.cols) == (rows, cols),
                f"{name!r} is {_shape(spec)}, expected {rows}x{cols}",
            )
            need(spec.role != "vector", f"{name!r} has role 'vector', expected a matrix role")

        match op:
            case Embed():
                matrix(op.weight, self.tensors[op.weight].rows, width(op.out))
            case Input():
                need(op is self.ops[0], "an input op must be the first")
                width(op.out)
            case Norm():
                n = width(op.x)
                need(width(op.out) == n, f"out is {width(op.out)} wide, x is {n}")
                need(0 <= op.group <= n and n % (op.group or n) == 0, f"group {op.group} does not divide {n}")
                need(op.eps >= 0.0, f"eps {op.eps} is negative")
                vector(op.weight, op.group or n)
                vector(op.bias, op.group or n)
            case Linear():
                need(op.out != op.x, "x and out must be different buffers")
                matrix(op.weight, width(op.out), width(op.x))
                vector(op.bias, width(op.out))
            case Rope():
                need(op.head_dim > 0 and width(op.x) % op.head_dim == 0, f"{width(op.x)} is not whole heads")
                n = self.tensors[op.inv_freq].cols
                vector(op.inv_freq, n)
                need(2 * n <= op.head_dim, f"{n} frequencies rotate more than head_dim {op.head_dim}")
            case KvAppend():
                need(0 <= op.layer < len(self.cache), f"cache slot {op.layer} does not exist")
                slot = self.cache[op.layer]
                for name in (op.k, op.v):
                    n = slot.kv_heads * slot.head_dim
                    need(width(name) == n, f"{name!r} is {width(name)} wide, cache slot {op.layer} takes {n}")
                need(op.layer not in appended, f"cache slot {op.layer} is written twice")
                appended.add(op.layer)
            case Attention():
                need(op.layer in appended, f"cache slot {op.layer} is read before it is written")
                slot = self.cache[op.layer]
                need(op.q != op.out, "q and out must be different buffers")
                need(
                    (op.kv_heads, op.head_dim, op.window) == (slot.kv_heads, slot.head_dim, slot.window),
                    "kv_heads, head_dim or window differ from the cache slot's",
                )
                shared = op.heads > 0 and op.heads % op.kv_heads == 0
                need(shared, f"{op.heads} heads over {op.kv_heads} kv heads")
                for name in (op.q, op.out):
                    n = op.heads * op.head_dim
                    need(width(name) == n, f"{name!r} is {width(name)} wide, expected {n}")
                need(op.softcap is None or op.softcap > 0, f"softcap {op.softcap} must be positive")
            case Activation():
                need(width(op.x) == width(op.out), "x and out differ in width")
                need(op.up is None or width(op.up) == width(op.x), "up and x differ in width")
            case Add():
                need(width(op.a) == width(op.b) == width(op.out), "a, b and out differ in width")
            case Gather():
                need(op.out != op.x, "x and out must be different buffers")
                width(op.x)
                vector(op.order, width(op.out))
            case Round():
                need(width(op.x) == width(op.out), "x and out differ in width")
                need(
                    op.scale is None or LEAST_SCALE <= op.scale <= GREATEST_SCALE,
                    f"scale {op.scale} is outside {LEAST_SCALE:.6g} to {GREATEST_SCALE:.6g}",
                )
            case Logits():
                rows = self.tensors[op.weight].rows
                matrix(op.weight, rows, width(op.x))
                vector(op.bias, rows)
                need(op.softcap is None or op.softcap > 0, f"softcap {op.softcap} must be positive")


def _rows_of(op: Embed | Logits | None) -> dict[str, object]:
    """What blocks of one vocabulary differ in."""
    assert op is not None  # a run has begun
    found: dict[str, object] = {"weight": op.weight, "first": op.first}
    return found | ({"bias": op.bias} if isinstance(op, Logits) else {})


def _shape(spec: TensorSpec) -> str:
    return f"{spec.rows}x{spec.cols}"


def _dim(value: int, what: str) -> None:
    if not 0 < value <= MAX_DIM:
        raise BadConfig(f"{what} is {value}, expected 1 to {MAX_DIM}")
