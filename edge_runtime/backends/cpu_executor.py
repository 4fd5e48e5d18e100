"""A loaded part on the cpu backend: each step one call of libedge_cpu.so, with the GIL released."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends import page_bytes
from edge_runtime.backends.batch import (
    check_adapters,
    check_arrays,
    check_move,
    check_page,
    host_inputs,
    refuse_tree,
)
from edge_runtime.backends.chain import check_chain
from edge_runtime.backends.cpu_adapters import CpuAdapter, pack_adapter
from edge_runtime.backends.cpu_program import Arena, compile_ops
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.engine.adapter import Adapter, check_adapter, free_number
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BackendUnavailable, BadRequest, EdgeError, NumericError

# Arrays of a StepBatch that hold int32; the second row may be absent
_NEEDED = ("tokens", "positions", "sequence", "page_tables", "logit_rows")
_OPTIONAL = ("parents", "places", "slots", "adapters")


class CpuExecutor(HostLogits):
    """A loaded part. One forward at a time: a second caller waits."""

    def __init__(self, library: ctypes.CDLL, part: Part, threads: int, simd: int) -> None:
        self._library = library
        self._part = part
        self._arena = Arena(part, threads)
        self._lock = threading.Lock()
        step, kv, program = part.step, part.kv, part.program
        compiled = compile_ops(part, self._arena)
        self._keep = compiled  # the records and repacked weights that the native side points to
        record = rec.ProgramRecord(
            ops=compiled.ops,
            cache=compiled.cache,
            tables=compiled.tables,
            scratch=self._arena.scratch,
            op_count=len(compiled.ops),
            cache_count=len(program.cache),
            table_count=compiled.table_count,
            vocab=program.vocab_size,
            context=min(step.context, program.max_context),
            page_tokens=kv.page_tokens,
            pages=kv.pages,
            max_tokens=step.tokens,
            max_sequences=step.sequences,
            max_logits=step.logits,
            threads=threads,
            simd=simd,
        )
        self._handle: int | None = library.edge_cpu_create(ctypes.byref(record))
        if not self._handle:
            raise BackendUnavailable(f"the cpu backend could not start {threads} threads or lacks a kernel")
        self._batch = rec.Batch()
        self._logits = self._arena.view("logits", np.float32, (step.logits, program.vocab_size))
        self._rows = self._arena.view("rows", np.float32, (step.logits, program.hidden_width))
        self._adapters: dict[int, CpuAdapter] = {}
        self._row_count = 0  # rows of the last step that are valid
        self._tokens = np.empty(step.sequences, np.int32)  # the likeliest of each sequence
        self._tokens_at = _address(self._tokens)
        self._prepared: StepBatch | None = None  # whose arrays the record points to
        self._arrays: list[Array | None] = []  # keeps them alive

    def forward(self, batch: StepBatch) -> Array:
        """Logits f32 (L, vocab), a view that the next call overwrites.

        The same batch may come again with other values in its arrays, which spares preparing it. Raises
        BadRequest on an index out of range, NumericError on NaN/Inf (no logits are then valid).
        """
        with self._lock:
            self._step(batch, self._library.edge_cpu_forward)
            self._row_count = self._batch.logit_count
            return self._logits[: self._row_count]

    def likeliest(self, batch: StepBatch) -> Array:
        """See `Executor.likeliest`; found by the library itself where each sequence has one token."""
        count = len(batch.tokens)
        if not count == len(batch.logit_rows) == len(batch.page_tables) <= len(self._tokens):
            return super().likeliest(batch)
        with self._lock:
            self._step(batch, self._library.edge_cpu_chain, 1, self._tokens_at)
            self._row_count = count
            return self._tokens[:count]

    def chain(self, batch: StepBatch, count: int) -> Array:
        """`count` greedy steps in one native call: int32 (count, S), see `Executor.chain`."""
        check_chain(batch)
        out = np.empty((count, len(batch.tokens)), np.int32)
        with self._lock:
            self._step(batch, self._library.edge_cpu_chain, count, _address(out))
        return out

    def _step(self, batch: StepBatch, call: Callable[..., int], *arguments: object) -> None:
        """One native call on a batch, under the lock; no row of it is valid before the caller says so."""
        handle = self._open()
        self._row_count = 0
        if batch is not self._prepared:
            self._prepare(batch)
        check_adapters(batch.adapters, self._adapters)
        b = self._batch
        status = call(handle, ctypes.byref(b), *arguments)
        if status != rec.OK:
            raise _error(self._part, status, b.index, b.value)

    def _prepare(self, batch: StepBatch) -> None:
        """Point the record at a batch's arrays, whose values the library itself checks at each step."""
        self._prepared = None
        check_arrays(batch, self._part.program)
        refuse_tree(batch, self._part.kv)
        arrays = {name: _int32(name, getattr(batch, name)) for name in _NEEDED}
        for name in _OPTIONAL:
            given = getattr(batch, name)
            if given is not None:
                arrays[name] = _int32(name, given)
        given = host_inputs(batch)
        inputs = None if given is None else np.ascontiguousarray(given)
        b = self._batch
        for name in _OPTIONAL:
            setattr(b, name, None)
        for name, array in arrays.items():
            setattr(b, name, _address(array))
        b.inputs = None if inputs is None else _address(inputs)
        b.token_count, b.logit_count = len(arrays["tokens"]), len(arrays["logit_rows"])
        b.sequence_count, b.pages_per_sequence = arrays["page_tables"].shape
        self._arrays = [*arrays.values(), inputs]
        if inputs is given and all(array is getattr(batch, name) for name, array in arrays.items()):
            self._prepared = batch  # no copies: what the caller writes into them is seen

    @property
    def hidden(self) -> Array:
        """Inputs of the logits op f32 (L, width) of the last `forward`, a view that the next one overwrites.

        No rows when it raised, or there was none.
        """
        self._open()
        return self._rows[: self._row_count]

    def copy_page(self, source: int, target: int) -> None:
        """Copy one KV page in every layer. Raises BadRequest on a page that does not exist."""
        for page in (source, target):
            check_page(page, self._part.kv)
        with self._lock:
            self._open()
            for pages in self._arena.cache_views:
                pages[target] = pages[source]

    def move(self, pages: Array, sources: Array, targets: Array) -> None:
        """Copy keys and values from places to places of one sequence. Raises BadRequest."""
        check_move(pages, sources, targets, self._part.kv)
        rows = [_int32(n, a) for n, a in (("pages", pages), ("sources", sources), ("targets", targets))]
        with self._lock:
            handle = self._open()
            self._library.edge_cpu_move(handle, *(row.ctypes.data for row in rows), len(sources))

    @property
    def page_nbytes(self) -> int:
        """Bytes of one KV page in all layers."""
        self._open()
        return page_bytes.page_nbytes(self._arena.cache_views)

    def read_page(self, page: int) -> Array:
        """The bytes of a page, u8 (page_nbytes,), a copy, in the order that the reference backend has too."""
        with self._lock:
            self._open()
            return page_bytes.read_page(self._arena.cache_views, page, self._part.kv)

    def write_page(self, page: int, data: Array) -> None:
        """What `read_page` of this or the reference backend gave. Raises BadRequest on a wrong size."""
        with self._lock:
            self._open()
            page_bytes.write_page(self._arena.cache_views, page, data, self._part.kv)

    def add_adapter(self, adapter: Adapter) -> int:
        """Copy a low-rank adapter (`engine.memory.adapter_nbytes`); returns the lowest free number.

        Raises BadRequest on a tensor that is no linear's weight, a wrong shape, or NaN/Inf.
        """
        check_adapter(adapter, self._part.program)
        with self._lock:
            handle = self._open()
            made = pack_adapter(adapter, self._part.program, self._part.step)
            number = free_number(self._adapters)
            if not self._library.edge_cpu_set_adapter(handle, number, ctypes.byref(made.record)):
                raise BackendUnavailable("the cpu backend has no memory for another adapter")
            self._adapters[number] = made
            return number

    def drop_adapter(self, number: int) -> None:
        """Free an adapter; its number may be given again. Raises BadRequest for one that is not loaded."""
        with self._lock:
            handle = self._open()
            if number not in self._adapters:
                raise BadRequest(f"adapter {number} is not loaded")
            self._library.edge_cpu_set_adapter(handle, number, None)
            del self._adapters[number]

    @property
    def memory_bytes(self) -> int:
        """Bytes held beyond the mapped weights: KV arena, buffers, scratch, repacked weights, adapters."""
        adapters = sum(a.nbytes for a in self._adapters.values())
        return self._arena.nbytes + self._keep.repacked_bytes + adapters

    def close(self) -> None:
        """End the threads and give the memory back; a second close does nothing."""
        with self._lock:
            if self._handle is not None:
                self._library.edge_cpu_destroy(self._handle)
                self._handle = None
                self._arena.release()
                self._keep.release()
                self._adapters.clear()
                self._logits = self._rows = np.empty((0, 0), np.float32)

    def _open(self) -> int:
        if self._handle is None:
            raise BackendUnavailable("this executor is closed")
        return self._handle

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()


def _error(part: Part, status: int, index: int, value: int) -> EdgeError:
    """What the library found, in words: `index` is a row of the step, `value` what stands there."""
    program, step, kv = part.program, part.step, part.kv
    context = min(step.context, program.max_context)
    match status:
        case rec.NOT_FINITE:
            return NumericError("the step produced NaN or Inf; no token was emitted")
        case rec.OUT_OF_RANGE:
            return NumericError(
                f"a key or value does not fit the KV formats {kv.k}/{kv.v}; use f32, int8 or fp8"
            )
        case rec.BAD_TOKEN:
            return BadRequest(f"token {index} has the id {value}, expected 0 to {program.vocab_size - 1}")
        case rec.BAD_POSITION:
            return BadRequest(
                f"token {index} is at position {value}, expected 0 to {context - 1} in its page table"
            )
        case rec.BAD_SEQUENCE:
            return BadRequest(f"token {index} names sequence {value}, which has no page table")
        case rec.BAD_PAGE:
            return BadRequest(
                f"token {index} needs page {value} of its sequence's table, expected 0 to {kv.pages - 1}"
            )
        case rec.BAD_LOGIT_ROW:
            return BadRequest(f"logit_rows[{index}] is {value}; expected ascending rows of the step")
        case rec.TWICE:
            return BadRequest(f"token {index} is the second at position {value} of its sequence")
        case rec.BAD_PARENT:
            return BadRequest(
                f"token {index} names row {value} as its parent; expected -1 or an earlier row of its "
                "sequence, one position before it"
            )
        case rec.BAD_PLACE:
            return BadRequest(
                f"token {index} has the place {value}, expected one from where its path leaves the cache to "
                f"{context - 1} in its page table"
            )
        case rec.BAD_SLOT:
            return BadRequest(
                f"sequence {index} has the slot {value}, expected 0 to {step.sequences - 1}, each once"
            )
        case rec.BAD_RUN:
            return BadRequest(
                f"token {index} at position {value}: with K in {kv.k} the tokens of a sequence must be one "
                "run of consecutive positions"
            )
        case rec.NOT_HELD:
            return BadRequest(
                f"token {index} at position {value} continues a page whose keys its slot does not hold; with "
                f"K in {kv.k} a sequence keeps its slot, begins at a multiple of {kv.page_tokens} and is "
                "rolled back no further than into the page before its last"
            )
    what, most = (("tokens", step.tokens), ("logit rows", step.logits), ("sequences", step.sequences))[index]
    return BadRequest(f"the step has {value} {what}, the executor was sized for {most}")


def _address(array: Array) -> int:
    """Where an array's items lie; `array.ctypes.data` takes several times as long."""
    address: int = array.__array_interface__["data"][0]
    return address


def _int32(name: str, array: Array) -> Array:
    """int32 and contiguous, without a copy where it is so. Raises BadRequest on a value that does not fit."""
    if (
        array.dtype != np.int32
        and array.size
        and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31
    ):
        raise BadRequest(f"{name} holds {int(array.min())} to {int(array.max())}, which no int32 holds")
    return np.ascontiguousarray(array, dtype=np.int32)
