"""The oracle: every op of a Program in numpy at f32, op by op, with every format. Slow is fine.

Matrix products are BLAS's, whose rounding depends on the shape; so unlike the other backends this one repeats
a token's numbers to f32 rounding, not to the bit, when the step around it changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from edge_runtime.backends import numpy_ops, page_bytes
from edge_runtime.backends.batch import (
    check_adapters,
    check_batch,
    host_inputs,
    places_seen,
    refuse_tree,
    straight_below,
)
from edge_runtime.backends.chain import run_chain
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.numpy_cache import KvArena
from edge_runtime.backends.numpy_weights import DecodedWeights
from edge_runtime.backends.protocol import DeviceCode, Part, StepBatch, Support
from edge_runtime.backends.stored_indices import check_indices, check_order
from edge_runtime.engine.adapter import Adapter, LowRank, check_adapter, free_number
from edge_runtime.engine.formats import FORMATS, Array
from edge_runtime.engine.layout import live_segments
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
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.probe import available_memory
from edge_runtime.engine.program import Program
from edge_runtime.errors import BackendUnavailable, BadRequest, NumericError, Unsupported, nearest

Provider = Callable[[str], Array]


@runtime_checkable
class RowProvider(Protocol):
    """A provider that also gives single rows of a tensor, f32 (len(ids), cols): for embeddings."""

    def rows(self, name: str, ids: Array) -> Array: ...


class ReferenceExecutor(HostLogits):
    """Runs a Program with f32 weights that `provider(name)` gives, (rows, cols), each time an op needs one.

    With a lazy provider only one tensor is alive at a time, so a model larger than memory can be evaluated.
    """

    def __init__(self, program: Program, provider: Provider, kv: KvPlan, step: StepShape) -> None:
        program.check()
        self._program = program
        self._provider = provider
        self._kv = kv
        self._step = step
        self._arena: KvArena | None = KvArena(program, kv)
        self._buffers: dict[str, Array] = {}
        self._read_last: dict[int, list[str]] = {}  # op -> buffers that no later op reads
        for name, ranges in live_segments(program).items():
            for _, last in ranges:
                self._read_last.setdefault(last, []).append(name)
        self._adapters: dict[int, Adapter] = {}
        self._hidden = np.empty((0, program.hidden_width), np.float32)
        for op in program.ops:
            if isinstance(op, Gather):
                check_order(op.order, provider(op.order), program.buffers[op.x])

    def forward(self, batch: StepBatch) -> Array:
        """Logits f32 (L, vocab) of `batch.logit_rows`. Raises BadRequest, or NumericError on NaN/Inf."""
        self._hidden = self._hidden[:0]
        hidden = self.run_hidden(batch)[batch.logit_rows]
        logits = self.logits(hidden, _adapters(batch)[batch.logit_rows])
        self._hidden = hidden
        return logits

    @property
    def hidden(self) -> Array:
        """Inputs of the logits op f32 (L, width) of the last `forward`; no rows when there was none."""
        self._open()
        return self._hidden

    def chain(self, batch: StepBatch, count: int) -> Array:
        """See `Executor.chain`."""
        return run_chain(self, batch, count)

    def run_hidden(self, batch: StepBatch) -> Array:
        """Run the step and give the logits op's input for ALL its tokens, f32 (T, hidden).

        With `logits`, an evaluation takes the logits of a long text in pieces that fit into memory.
        """
        _, buffers = deque(self.walk_hidden(batch), maxlen=1)[0]
        hidden = buffers[self._program.heads[0].x]
        _finite(hidden, "the final hidden state")
        return hidden

    def walk_hidden(self, batch: StepBatch) -> Iterator[tuple[int, Mapping[str, Array]]]:
        """As `run_hidden`, op by op: after each, its index and the buffers that are still to be read, f32
        (T, width). Copy what shall outlive the next op, which may work in place.
        """
        arena = self._open()
        check_batch(batch, self._program, self._kv, self._step)
        check_adapters(batch.adapters, self._adapters)
        refuse_tree(batch, self._kv)
        self._buffers = {}
        for index, op in enumerate(self._program.body):
            # Overflow is found by the finite checks, not by a warning
            with np.errstate(over="ignore", invalid="ignore"):
                self._run(op, batch, arena)
            for name in self._read_last.get(index, ()):
                del self._buffers[name]
            yield index, self._buffers
        self._buffers = {}

    def logits(self, hidden: Array, adapters: Array | None = None) -> Array:
        """Logits f32 (rows, vocab) of hidden rows (rows, hidden), `adapters` (rows,) numbers or -1.

        Raises NumericError on NaN/Inf.
        """
        used = np.full(len(hidden), -1) if adapters is None else adapters
        heads = self._program.heads
        with np.errstate(over="ignore", invalid="ignore"):
            blocks = [self._product(hidden, op, used) * np.float32(op.scale) for op in heads]
        out = blocks[0] if len(blocks) == 1 else np.concatenate(blocks, axis=1)
        _finite(out, "the logits")  # before a soft cap, which would make Inf finite
        if heads[0].softcap is not None:
            out = numpy_ops.capped(out, heads[0].softcap)
        return np.asarray(out, np.float32)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one KV page in every layer. Raises BadRequest on a page that does not exist."""
        self._open().copy_page(source, target)

    def move(self, pages: Array, sources: Array, targets: Array) -> None:
        """Copy keys and values from places to places of one sequence. Raises BadRequest."""
        self._open().move(pages, sources, targets)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one KV page in all layers."""
        return page_bytes.page_nbytes(self._open().arrays)

    def read_page(self, page: int) -> Array:
        """The bytes of a page, u8 (page_nbytes,), a copy, in the order that the cpu backend has too."""
        return page_bytes.read_page(self._open().arrays, page, self._kv)

    def write_page(self, page: int, data: Array) -> None:
        """What `read_page` of this or the cpu backend gave. Raises BadRequest on a wrong page or size."""
        page_bytes.write_page(self._open().arrays, page, data, self._kv)

    def add_adapter(self, adapter: Adapter) -> int:
        """Copy a low-rank adapter; returns its number, the lowest free one.

        Raises BadRequest on a tensor that is no linear's weight, a wrong shape, or NaN/Inf.
        """
        self._open()
        check_adapter(adapter, self._program)
        number = free_number(self._adapters)
        self._adapters[number] = {
            name: LowRank(low.a.copy(), low.b.copy(), low.scale) for name, low in adapter.items()
        }
        return number

    def drop_adapter(self, number: int) -> None:
        """Free an adapter; its number may be given again. Raises BadRequest for one that is not loaded."""
        self._open()
        if number not in self._adapters:
            raise BadRequest(f"adapter {number} is not loaded")
        del self._adapters[number]

    @property
    def memory_bytes(self) -> int:
        """KV arena, decoded weights and adapters. Buffers come and go with numpy and are not counted."""
        kept = getattr(self._provider, "nbytes", 0)
        adapters = sum(low.nbytes for adapter in self._adapters.values() for low in adapter.values())
        return (self._arena.nbytes if self._arena is not None else 0) + int(kept) + adapters

    def close(self) -> None:
        self._adapters = {}
        self._arena = None
        self._provider = _closed

    def _open(self) -> KvArena:
        if self._arena is None:
            raise BackendUnavailable("this executor is closed")
        return self._arena

    def _run(self, op: AnyOp, batch: StepBatch, arena: KvArena) -> None:
        b, weight = self._buffers, self._provider
        match op:
            case Embed():
                if op.first == 0:
                    b[op.out] = np.empty((len(batch.tokens), self._program.buffers[op.out]), np.float32)
                ids = batch.tokens - op.first
                here = (ids >= 0) & (ids < self._program.tensors[op.weight].rows)
                if isinstance(weight, RowProvider):
                    rows = weight.rows(op.weight, ids[here])
                else:
                    rows = weight(op.weight)[ids[here]]
                b[op.out][here] = rows * np.float32(op.scale)
            case Input():
                inputs = host_inputs(batch)
                assert inputs is not None  # check_batch proved it
                _finite(inputs, "the step's inputs")
                b[op.out] = inputs
            case Norm():
                shift = None if op.bias is None else weight(op.bias)[0]
                b[op.out] = numpy_ops.norm(b[op.x], weight(op.weight)[0], shift, op.eps, op.kind, op.group)
            case Linear():
                out = self._product(b[op.x], op, _adapters(batch))
                _finite(out, f"the product with {op.weight!r}")
                b[op.out] = out
            case Rope():
                table = weight(op.inv_freq)[0]
                b[op.x] = numpy_ops.rope(b[op.x], batch.positions, table, op.head_dim, op.scale)
            case KvAppend():
                slot = self._program.cache[op.layer]
                places = batch.positions if batch.places is None else batch.places
                pages = batch.page_tables[batch.sequence, places // self._kv.page_tokens]
                slots = places % self._kv.page_tokens
                for which, name in (("k", op.k), ("v", op.v)):
                    rows = b[name].reshape(-1, slot.kv_heads, slot.head_dim)
                    arena.append(op.layer, which, rows, pages, slots)
            case Attention():
                b[op.out] = self._attention(op, batch, arena)
            case Activation():
                out = numpy_ops.activation(b[op.x], op.kind)
                b[op.out] = out if op.up is None else out * b[op.up]
            case Add():
                b[op.out] = b[op.a] + np.float32(op.scale) * b[op.b]
            case Gather():
                _finite(b[op.x], f"the input of the order {op.order!r}")  # also where it is not chosen
                b[op.out] = b[op.x][:, weight(op.order)[0].astype(np.int64)]
            case Round():
                _finite(b[op.x], f"the input of a rounding to {op.format}")
                b[op.out] = numpy_ops.rounded(b[op.x], op.format, op.scale)
            case Logits():
                pass  # `logits` does it, for the rows that are wanted

    def _product(self, x: Array, op: Linear | Logits, adapters: Array) -> Array:
        """weight @ x + bias for each row, and the update of the adapter that the row uses (-1 = none)."""
        out: Array = x @ self._provider(op.weight).T
        if op.bias is not None:
            out += self._provider(op.bias)
        for number in np.unique(adapters[adapters >= 0]).tolist():
            low = self._adapters[number].get(op.weight)
            if low is not None:
                mine = adapters == number
                inner = x[mine] @ low.a.astype(np.float32).T
                out[mine] += np.float32(low.scale) * (inner @ low.b.astype(np.float32).T)
        return out

    def _attention(self, op: Attention, batch: StepBatch, arena: KvArena) -> Array:
        q = self._buffers[op.q].reshape(-1, op.heads, op.head_dim)
        out = np.empty((len(q), op.heads * op.head_dim), np.float32)
        size = self._kv.page_tokens
        for mine in self._groups(batch):
            positions = batch.positions[mine]
            # Keys that any of these tokens can see: the window's start to the last position
            first = 0 if op.window is None else max(int(positions.min()) - op.window + 1, 0)
            seen = places_seen(batch, int(mine[np.argmax(positions)]), first)
            table = batch.page_tables[batch.sequence[mine[0]]]
            keys = arena.read(op.layer, "k", table, seen, op.head_dim)
            if self._kv.per_channel:  # the group is of one page, which it sees as it came
                own = seen >= positions[0] // size * size
                keys[own] = arena.read_exact(op.layer, table, seen[own])
            out[mine] = numpy_ops.attention(
                q[mine],
                keys,
                arena.read(op.layer, "v", table, seen, op.head_dim),
                positions,
                first,
                scale=op.scale,
                window=op.window,
                softcap=op.softcap,
            )
        return out

    def _groups(self, batch: StepBatch) -> list[Array]:
        """Rows that attend together: those whose keys lie at their positions by sequence, and by page too
        where K is per channel; the others one by one.
        """
        straight = batch.positions < straight_below(batch)
        page = (
            batch.positions // self._kv.page_tokens
            if self._kv.per_channel
            else np.zeros_like(batch.positions)
        )
        kinds = np.unique(np.stack([batch.sequence, page])[:, straight], axis=1)
        groups = [np.flatnonzero(straight & (batch.sequence == s) & (page == p)) for s, p in kinds.T]
        return groups + [np.array([t]) for t in np.flatnonzero(~straight)]


def _adapters(batch: StepBatch) -> Array:
    """The adapter of each token (T,), -1 = none."""
    if batch.adapters is None:
        return np.full(len(batch.tokens), -1)
    return batch.adapters[batch.sequence]


def _finite(values: Array, what: str) -> None:
    if not np.isfinite(values).all():
        row = int(np.argmin(np.isfinite(values).all(axis=1)))
        raise NumericError(f"{what} holds NaN or Inf for row {row} of the step; no token was emitted")


def _closed(name: str) -> Array:
    raise BackendUnavailable("this executor is closed")


class ReferenceBackend:
    """numpy; runs every op and every format, whatever the packing."""

    name = "reference"
    packing: Mapping[str, str] = {fmt: "rows" for fmt in FORMATS}
    exact = False

    def available(self) -> Support:
        return Support(True)

    def supports(self, program: Program, formats: Mapping[str, str]) -> Support:
        for tensor, fmt in formats.items():
            if fmt not in FORMATS:
                return Support(
                    False, f"tensor {tensor!r} has the unknown format {fmt!r}; {nearest(fmt, FORMATS)}"
                )
        missing = sorted(set(program.tensors) - set(formats))
        if missing:
            return Support(False, f"tensor {missing[0]!r} of the program has no format")
        return Support(True)

    def check_code(self, code: DeviceCode) -> None:
        """Nothing: no device code is used."""

    def memory(self) -> tuple[int, str]:
        return available_memory()

    def release(self) -> None:
        """Nothing is kept."""

    def load(self, part: Part, *, threads: int = 0) -> ReferenceExecutor:
        """`threads` has no effect: BLAS has its own pool. Raises Unsupported, BadEngineFile (bad indices)."""
        answer = self.supports(part.program, {name: t.format for name, t in part.weights.items()})
        if not answer.ok:
            raise Unsupported(f"the reference backend cannot run this engine: {answer.why}")
        for name, tensor in part.weights.items():
            check_indices(name, tensor)
        return ReferenceExecutor(part.program, DecodedWeights(part.weights), part.kv, part.step)


BACKEND = ReferenceBackend()
