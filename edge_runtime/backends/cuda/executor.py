"""A loaded part on a GPU: each step one upload, one graph launch and one wait for its answer.

Graphs are captured once for each size of step (tokens rounded up to a power of two), when the size first
comes or by `warm_up`; steps with adapters have graphs of their own. Where the driver has no graphs the same
launches are queued one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import numpy as np

from edge_runtime.backends.batch import (
    check_adapters,
    check_batch,
    check_move,
    check_page,
    refuse_tree,
    widest_window,
)
from edge_runtime.backends.chain import check_chain
from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.adapters import DeviceAdapters
from edge_runtime.backends.cuda.device_array import DeviceArray
from edge_runtime.backends.cuda.driver import Driver, Graph, Launch, Module
from edge_runtime.backends.cuda.launcher import Launcher
from edge_runtime.backends.cuda.mover import Mover
from edge_runtime.backends.cuda.placement import Placement
from edge_runtime.backends.cuda.staged_step import StagedStep
from edge_runtime.backends.cuda.tuner import Tuner, Watch
from edge_runtime.backends.cuda.tuning import Tuning
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.device_code import TOKEN_BLOCK, TOP
from edge_runtime.engine.formats import Array
from edge_runtime.engine.launches import LOGITS, ROWS, Lowered
from edge_runtime.engine.plan import MAX_DRAFT_LENGTH
from edge_runtime.errors import BackendUnavailable, BadRequest, NumericError

StepKey = tuple[int, bool, bool]  # its size, whether it is a chain's, whether sequences use adapters


class CudaExecutor:
    """A loaded part. One forward at a time: a second caller waits."""

    def __init__(self, driver: Driver, module: Module, lowered: Lowered, part: Part, tuning: Tuning) -> None:
        self._driver = driver
        self._part = part
        self._lock = threading.Lock()
        self._place = Placement(driver, part)
        step, program = part.step, part.program
        answer = self._place.region("answer")
        self._staged = StagedStep(driver, part, self._place.region("step"), answer)
        self._launcher = Launcher(
            driver, module, lowered, part, self._place, self._staged.record, tuning.forms
        )
        self._window = widest_window(part.program)
        self._lowered = lowered
        self._tuning = tuning
        self._mover = Mover(driver, part, lowered, self._place, self._launcher)
        self._adapters = DeviceAdapters(driver, part)
        self._launches: dict[StepKey, list[Launch]] = {}
        self._graphs: dict[StepKey, Graph] = {}
        self._likeliest: dict[int, list[Launch]] = {}
        self._answer = driver.pinned(4 * (1 + step.logits))
        self._results = driver.pinned(
            4 * max(step.logits * max(program.vocab_size, program.hidden_width, 2 * TOP), MAX_DRAFT_LENGTH)
        )
        self._row_count = 0
        self._hidden = np.empty((0, program.hidden_width), np.float32)
        self._open = True

    def forward(self, batch: StepBatch) -> Array:
        """Logits f32 (L, vocab), a view that the next call overwrites.

        Raises BadRequest on an index out of range, NumericError on NaN/Inf (no logits are then valid).
        """
        with self._turn():
            self._step(batch)
            logits = self._download(LOGITS, len(batch.logit_rows), self._part.program.vocab_size)
            self._finish()
            self._row_count = len(batch.logit_rows)
            return logits

    def likeliest(self, batch: StepBatch) -> Array:
        """`forward` of which only the likeliest token of each logit row crosses to the host: int32 (L,).

        Equals go to the lowest id. A view that the next call overwrites.
        """
        with self._turn():
            self._step(batch)
            self._finish()
            self._row_count = len(batch.logit_rows)
            tokens: Array = self._answer.array.view(np.int32)[1 : 1 + self._row_count]
            return tokens

    def top(self, batch: StepBatch, k: int) -> tuple[Array, Array]:
        """`forward` of which the `k` likeliest (1 to TOP) of each row cross: ids int32 and logits f32 (L, k).

        In descending order, equals by their lowest id. Raises BadRequest on another k.
        """
        most = min(TOP, self._part.program.vocab_size)
        if not 1 <= k <= most:
            raise BadRequest(f"the {k} likeliest tokens; expected 1 to {most}")
        with self._turn():
            self._step(batch)
            if k not in self._likeliest:
                self._likeliest[k] = self._launcher.likeliest(k)
            for launch in self._likeliest[k]:
                self._driver.run(launch)
            rows = len(batch.logit_rows)
            half = 4 * self._part.step.logits * TOP
            at = self._place.region("top")
            values = self._results.array[: 4 * rows * k]
            ids = self._results.array[half : half + 4 * rows * k]
            if rows:
                self._driver.download_async(values, at)
                self._driver.download_async(ids, at + half)
            self._finish()
            self._row_count = rows
            return ids.view(np.int32).reshape(rows, k), values.view(np.float32).reshape(rows, k)

    def chain(self, batch: StepBatch, count: int) -> Array:
        """`count` greedy steps queued one behind the other: int32 (count, S), see `Executor.chain`."""
        check_chain(batch)
        out = np.empty((count, len(batch.tokens)), np.int32)
        with self._turn():
            for begin in range(0, count, MAX_DRAFT_LENGTH):
                some = out[begin : begin + MAX_DRAFT_LENGTH]
                self._some_of_chain(batch, some)
                batch = replace(batch, tokens=some[-1], positions=batch.positions + np.int32(len(some)))
        return out

    def _some_of_chain(self, batch: StepBatch, out: Array) -> None:
        """As many steps of a chain as `out` (steps, S) has rows, for its tokens."""
        size = self._begin(batch)
        # A step in each page that the chain comes to: those between are then as good
        for n in sorted({*range(0, len(out), self._part.kv.page_tokens), len(out) - 1}):
            later = replace(batch, positions=batch.positions + np.int32(n))
            self._check(later)
        adapting = self._stage(batch)
        for _ in range(len(out)):
            self._run((size, True, adapting))
        history = self._results.array[: out.nbytes]
        self._driver.download_async(history, self._place.region("history"))
        self._finish()
        out[:] = history.view(np.int32).reshape(out.shape)

    def _begin(self, batch: StepBatch) -> int:
        """The size of step that a batch runs as."""
        self._row_count = 0
        self._hidden = self._hidden[:0]
        refuse_tree(batch, self._part.kv)
        return bucket(len(batch.tokens), self._part.step.tokens)

    def _step(self, batch: StepBatch) -> None:
        """Check, stage and queue a step."""
        size = self._begin(batch)
        self._check(batch)
        adapting = self._stage(batch)
        self._run((size, False, adapting))

    def _check(self, batch: StepBatch) -> None:
        """Raises BadRequest."""
        check_batch(
            batch, self._part.program, self._part.kv, self._part.step, device=True, window=self._window
        )
        check_adapters(batch.adapters, self._adapters)

    def _stage(self, batch: StepBatch) -> bool:
        """Queue the copies of a proved step; returns whether any of its sequences uses an adapter."""
        if batch.inputs is not None:  # first, as those on a device may be refused
            self._staged.stage_inputs(self._place.region("inputs"), batch.inputs, len(batch.tokens))
        using = None if batch.adapters is None else self._adapters.addresses(batch.adapters)
        self._staged.stage(batch, using)
        return using is not None and bool(using.any())

    def _run(self, key: StepKey) -> None:
        if not self._driver.graphs:
            self._queue(self._launches_of(key))
            return
        self._prepare(key)
        self._driver.launch_graph(self._graphs[key])

    def _prepare(self, key: StepKey) -> None:
        """The launches of a size of step, and their graph where the driver has graphs."""
        launches = self._launches_of(key)
        if self._driver.graphs and key not in self._graphs:
            with self._driver.capture() as graph:
                self._queue(launches)
            self._graphs[key] = graph

    def _launches_of(self, key: StepKey) -> list[Launch]:
        if key not in self._launches:
            size, advancing, adapting = key
            launches = self._launcher.step(size, adapting=adapting)
            self._launches[key] = [*launches, self._launcher.advance()] if advancing else launches
        return self._launches[key]

    def _queue(self, launches: Sequence[Launch]) -> None:
        for launch in launches:
            self._driver.run(launch)

    def _download(self, region: str, rows: int, width: int) -> Array:
        """Queue the copy of rows f32 (rows, width); they are valid after `_finish`."""
        found: Array = self._results.array[: 4 * rows * width]
        if rows:
            self._driver.download_async(found, self._place.buffer(region))
        return found.view(np.float32).reshape(rows, width)

    def _finish(self) -> None:
        """Wait for the step's answer. Raises NumericError where its status says so."""
        self._driver.download_async(self._answer.array, self._place.region("answer"))
        self._driver.synchronize()
        status = int(self._answer.array.view(np.uint32)[0])
        if not status:
            return
        self._driver.fill(self._place.region("answer"), 4)
        if status & rec.OUT_OF_RANGE:  # which may have become Inf behind it
            kv = self._part.kv
            raise NumericError(f"a key or value does not fit the KV formats {kv.k}/{kv.v}; use int8 or fp8")
        raise NumericError("the step produced NaN or Inf; no token was emitted")

    def warm_up(self, sizes: Sequence[int], chains: Sequence[int] = ()) -> None:
        """Capture the graphs of steps of so many tokens, and of chains of so many sequences; with adapters
        too, where one is loaded."""
        most = self._part.step.tokens
        steps = {(bucket(n, most), False) for n in sizes} | {(bucket(n, most), True) for n in chains}
        ways = (False, True) if len(self._adapters) else (False,)
        keys = {(size, advancing, adapting) for size, advancing in steps for adapting in ways}
        with self._turn():
            for key in sorted(keys):
                self._prepare(key)

    def tune(self, watch: Watch | None = None) -> Tuning:
        """Measure the forms of every product on this device, for steps of all sizes, and use the fastest.

        watch(product, form, microseconds) sees each figure. Takes a second or so; numbers do not change.
        """
        most = self._part.step.tokens
        sizes = sorted({bucket(n, most) for n in (TOKEN_BLOCK << i for i in range(most.bit_length()))})
        with self._turn():
            tuner = Tuner(self._driver, self._launcher, self._lowered, self._staged.record.counts)
            forms = tuner.run(sizes, watch)
            self._tuning = msgspec.structs.replace(self._tuning, forms=forms)
            self._launcher.use(forms)
            for graph in self._graphs.values():
                self._driver.release_graph(graph)
            self._graphs.clear()
            self._launches.clear()
        return self._tuning

    @property
    def hidden(self) -> Array:
        """Inputs of the logits op f32 (L, width) of the last step, a view that the next one overwrites."""
        with self._turn():
            if len(self._hidden) != self._row_count:
                width = self._part.program.hidden_width
                self._hidden = np.empty((self._row_count, width), np.float32)
                self._driver.download(self._hidden, self._place.buffer(ROWS))
            return self._hidden

    @property
    def device_logits(self) -> DeviceArray:
        """Logits f32 (L, vocab) of the last step where they lie in the GPU's memory, until the next step."""
        return self._on_device(LOGITS, self._part.program.vocab_size)

    @property
    def device_hidden(self) -> DeviceArray:
        """`hidden` where it lies in the GPU's memory, until the next step: for a head in torch or cupy."""
        return self._on_device(ROWS, self._part.program.hidden_width)

    def _on_device(self, name: str, width: int) -> DeviceArray:
        """Rows that the last step left, if it ended well; it has ended, so nothing is to be waited for."""
        with self._lock:
            self._check_open()
            shape = self._row_count, width
            return DeviceArray(self._place.buffer(name), shape, np.dtype(np.float32), owner=self)

    def copy_page(self, source: int, target: int) -> None:
        """Copy one KV page in every layer. Raises BadRequest on a page that does not exist."""
        for page in (source, target):
            check_page(page, self._part.kv)
        with self._turn():
            self._mover.copy_page(source, target)

    def move(self, pages: Array, sources: Array, targets: Array) -> None:
        """Copy keys and values from places to places of one sequence. Raises BadRequest."""
        check_move(pages, sources, targets, self._part.kv)
        with self._turn():
            self._mover.move(pages, sources, targets)

    @property
    def page_nbytes(self) -> int:
        """Bytes of one KV page in all layers."""
        self._check_open()
        return sum(self._place.page_nbytes())

    def read_page(self, page: int) -> Array:
        """The bytes of a page, u8 (page_nbytes,), in the order that the other backends have too."""
        check_page(page, self._part.kv)
        with self._turn():
            return self._mover.read_page(page)

    def write_page(self, page: int, data: Array) -> None:
        """What `read_page` of any backend gave. Raises BadRequest on a wrong page or size."""
        check_page(page, self._part.kv)
        with self._turn():
            size = sum(self._place.page_nbytes())
            if data.dtype != np.uint8 or data.shape != (size,):
                raise BadRequest(f"a page is uint8 ({size},) in this cache, not {data.dtype} {data.shape}")
            self._mover.write_page(page, data)

    def add_adapter(self, adapter: Adapter) -> int:
        """Copy a low-rank adapter (`engine.memory.adapter_nbytes`); returns the lowest free number.

        Raises BadRequest on a tensor that is no linear's weight, a wrong shape, or NaN/Inf; DoesNotFit.
        """
        with self._turn():
            return self._adapters.add(adapter)

    def drop_adapter(self, number: int) -> None:
        """Free an adapter; its number may be given again. Raises BadRequest for one that is not loaded."""
        with self._turn():
            self._adapters.drop(number)

    @property
    def memory_bytes(self) -> int:
        """Bytes of device memory held beyond the weights: KV pages, buffers, scratch and adapters."""
        held = self._place.nbytes - self._place.weights_nbytes + self._adapters.nbytes
        return held if self._open else 0

    def close(self) -> None:
        """Give the memory back and leave the context; a second close does nothing."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._graphs.clear()
            self._launches.clear()
            self._likeliest.clear()
            self._adapters.clear()
            self._hidden = np.empty((0, 0), np.float32)
            self._driver.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """One call at a time, in the context. Raises BackendUnavailable once closed, when there is none."""
        with self._lock:
            self._check_open()
            with self._driver.current:
                yield

    def _check_open(self) -> None:
        if not self._open:
            raise BackendUnavailable("this executor is closed")

    def __del__(self) -> None:
        if getattr(self, "_open", False):
            self.close()


def bucket(tokens: int, most: int) -> int:
    """The size of step that so many tokens run as: a power of two, or the largest step."""
    return min(1 << max(0, tokens - 1).bit_length(), most)
