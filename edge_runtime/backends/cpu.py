"""The cpu backend: a Program compiled into records for libedge_cpu.so, one native call for each forward pass.

A token's numbers do not depend on what shares the step, on the number of threads or on the instruction set:
activations are int8 per token and group, the dot inside a group is exact, groups are summed in a fixed order,
and every output is summed by one thread (ARCHITECTURE, exactness contract).
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np

import edge_runtime
from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.cpu_program import Arena, compile_ops, kernel_shape
from edge_runtime.backends.protocol import Part, StepBatch, Support
from edge_runtime.engine.formats import FORMATS, Array, abi_hash
from edge_runtime.engine.packing import cpu_packing
from edge_runtime.engine.program import Program
from edge_runtime.errors import BackendUnavailable, BadConfig, BadRequest, NumericError, Unsupported, nearest

MAX_THREADS = 256
LIBRARY = "libedge_cpu.so"


def library_path() -> Path:
    """Where the library lies: beside the package in a wheel, in site-packages for an editable install."""
    folders = [Path(p) / "_native" for p in edge_runtime.__path__]
    return next((f / LIBRARY for f in folders if (f / LIBRARY).is_file()), folders[0] / LIBRARY)


@lru_cache(maxsize=4)
def open_library(path: Path) -> ctypes.CDLL:
    """The library, its functions declared. Raises BackendUnavailable when missing, stale or another ABI's."""
    if not path.is_file():
        raise BackendUnavailable(
            f"the native library is not built: {path} does not exist; run 'pip install .'"
        )
    try:
        library = rec.declare(ctypes.CDLL(str(path)))
    except (OSError, AttributeError) as error:
        raise BackendUnavailable(
            f"{path} cannot be used ({error}); build it again with 'pip install .'"
        ) from error
    for what, have, want in (
        ("number formats", int(library.edge_cpu_abi()), abi_hash()),
        ("records", int(library.edge_cpu_records()), rec.RECORDS),
    ):
        if have != want:
            raise BackendUnavailable(
                f"{path} was built for other {what}: it says {have:016x}, this package says {want:016x}; "
                "build it again with 'pip install .'"
            )
    return library


class CpuExecutor:
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

    def forward(self, batch: StepBatch) -> Array:
        """Logits f32 (L, vocab), a view that the next call overwrites.

        Raises BadRequest on an index out of range, NumericError on NaN/Inf (no logits are then valid).
        """
        arrays = {name: _int32(name, getattr(batch, name)) for name in _ARRAYS}
        count = len(arrays["tokens"])
        for name in ("positions", "sequence"):
            if len(arrays[name]) != count:
                raise BadRequest(f"{name} has {len(arrays[name])} entries for {count} tokens")
        with self._lock:
            if self._handle is None:
                raise BackendUnavailable("this executor is closed")
            b = self._batch
            for name, array in arrays.items():
                setattr(b, name, array.ctypes.data)
            b.token_count, b.logit_count = count, len(arrays["logit_rows"])
            b.sequence_count, b.pages_per_sequence = arrays["page_tables"].shape
            status = self._library.edge_cpu_forward(self._handle, ctypes.byref(b))
            if status != rec.OK:
                raise self._error(status, b.index, b.value)
            return self._logits[: b.logit_count]

    def copy_page(self, source: int, target: int) -> None:
        """Copy one KV page in every layer. Raises BadRequest on a page that does not exist."""
        for page in (source, target):
            if not 0 <= page < self._part.kv.pages:
                raise BadRequest(f"page {page} does not exist, the cache has {self._part.kv.pages}")
        with self._lock:
            for pages in self._arena.cache_views:
                pages[target] = pages[source]

    @property
    def memory_bytes(self) -> int:
        """Bytes held beyond the mapped weights: KV arena, buffers, scratch, repacked weights."""
        return self._arena.nbytes + self._keep.repacked_bytes

    def close(self) -> None:
        """End the threads and give the memory back; a second close does nothing."""
        with self._lock:
            if self._handle is not None:
                self._library.edge_cpu_destroy(self._handle)
                self._handle = None
                self._arena.release()
                self._keep.release()
                self._logits = np.empty((0, 0), np.float32)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            self.close()

    def _error(self, status: int, index: int, value: int) -> Exception:
        program, step, kv = self._part.program, self._part.step, self._part.kv
        context = min(step.context, program.max_context)
        sizes = (("tokens", step.tokens), ("logit rows", step.logits), ("sequences", step.sequences))
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
        what, most = sizes[index]
        return BadRequest(f"the step has {value} {what}, the executor was sized for {most}")


_ARRAYS = ("tokens", "positions", "sequence", "page_tables", "logit_rows")


def _int32(name: str, array: Array) -> Array:
    dims = 2 if name == "page_tables" else 1
    if array.ndim != dims or array.dtype.kind not in "iu":
        raise BadRequest(f"{name} is {array.ndim}-D {array.dtype}, expected {dims}-D int32")
    if (
        array.dtype != np.int32
        and array.size
        and not -(2**31) <= int(array.min()) <= int(array.max()) < 2**31
    ):
        raise BadRequest(f"{name} holds {int(array.min())} to {int(array.max())}, which no int32 holds")
    return np.ascontiguousarray(array, dtype=np.int32)


class CpuBackend:
    """C++ kernels on the cores of this process."""

    name = "cpu"
    packing: Mapping[str, str] = {fmt: cpu_packing(fmt) for fmt in FORMATS}
    exact = True

    def available(self) -> Support:
        try:
            open_library(library_path())
        except BackendUnavailable as error:
            return Support(False, str(error))
        return Support(True)

    def supports(self, program: Program, formats: Mapping[str, str]) -> Support:
        for tensor, spec in program.tensors.items():
            if tensor not in formats:
                return Support(False, f"tensor {tensor!r} of the program has no format")
            name = formats[tensor]
            if name not in FORMATS:
                return Support(
                    False, f"tensor {tensor!r} has the unknown format {name!r}; {nearest(name, FORMATS)}"
                )
            if spec.role != "vector" and kernel_shape(name) is None:
                return Support(
                    False, f"the cpu backend has no kernel for format {name!r} (tensor {tensor!r})"
                )
        return Support(True)

    def load(self, part: Part, *, threads: int = 0, simd: str = "auto") -> CpuExecutor:
        """`simd` picks an instruction set, for tests: results do not depend on it.

        Raises BackendUnavailable, BadConfig (threads, simd), Unsupported, BadEngineFile (a plane's size).
        """
        if not 0 <= threads <= MAX_THREADS:
            raise BadConfig(f"threads is {threads}, expected 0 (all cores of this process) to {MAX_THREADS}")
        if simd not in rec.SIMD:
            raise BadConfig(f"unknown instruction set {simd!r}; {nearest(simd, rec.SIMD)}")
        part.program.check()
        answer = self.supports(part.program, {name: t.format for name, t in part.weights.items()})
        if not answer.ok:
            raise Unsupported(f"the cpu backend cannot run this engine: {answer.why}")
        library = open_library(library_path())
        if simd != "auto" and not library.edge_cpu_features() >> rec.SIMD[simd] & 1:
            raise BackendUnavailable(f"this CPU or this build has no {simd} path")
        return CpuExecutor(library, part, threads or _cores(), rec.SIMD[simd])


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(os.cpu_count() or 1, MAX_THREADS)


BACKEND = CpuBackend()
