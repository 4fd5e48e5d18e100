"""The running step on its way to the device: one pinned record, uploaded in one copy."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.batch import straight_below
from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.device_array import as_address
from edge_runtime.backends.cuda.driver import Driver
from edge_runtime.backends.protocol import OnDevice, Part, StepBatch
from edge_runtime.engine.device_memory import STEP_ARRAYS, step_layout
from edge_runtime.engine.formats import Array


class StagedStep:
    """The record in pinned memory and on the device; page tables are uploaded only when they changed."""

    def __init__(self, driver: Driver, part: Part, address: int, status: int) -> None:
        self._driver = driver
        self._offsets, length = step_layout(part.program, part.kv, part.step)
        self._address = address
        self._pinned = driver.pinned(4 * length)
        record: Array = self._pinned.array.view(np.int32)
        record[:] = 0
        at = self._offsets["page_tables"]
        self._head, self._tables = record[:at], record[at:]
        self._arrays = {name: record[self._offsets[name] :] for name in (*STEP_ARRAYS, "logit_rows")}
        at = self._offsets["adapters"]
        self._adapters = record[at : at + 2 * part.step.sequences].view(np.int64)
        self._width = self._tables.size // part.step.sequences
        self._shown: tuple[int, int] = (0, 0)  # rows and columns of the tables on the device
        self._values = part.program.input_width
        self._inputs = driver.pinned(4 * part.step.tokens * self._values) if self._values else None
        self.record = rec.Step(
            **{n: address + 4 * at for n, at in self._offsets.items() if n != "adapters"}, status=status
        )

    def stage(self, batch: StepBatch, adapters: Array | None = None) -> None:
        """Fill the record from a proved batch, and queue its copy. Nothing may be running that reads it.

        adapters: int64 (S,) address of each sequence's, 0 = none; may be left out where no launch reads them.
        """
        count = len(batch.tokens)
        rows, columns = batch.page_tables.shape
        columns = min(columns, self._width)
        self._head[: rec.COUNTS] = 0
        self._head[rec.TOKENS], self._head[rec.SEQUENCES] = count, rows
        self._head[rec.LOGITS], self._head[rec.TABLE_STRIDE] = len(batch.logit_rows), columns
        arrays = self._arrays
        arrays["tokens"][:count] = batch.tokens
        arrays["positions"][:count] = batch.positions
        arrays["sequence"][:count] = batch.sequence
        arrays["logit_rows"][: len(batch.logit_rows)] = batch.logit_rows
        if adapters is not None:
            self._adapters[:rows] = adapters
        if batch.parents is None or batch.places is None:
            arrays["places"][:count] = batch.positions
            arrays["parents"][:count] = -1
            arrays["bends"][:count] = np.iinfo(np.int32).max
        else:
            arrays["places"][:count] = batch.places
            arrays["parents"][:count] = batch.parents
            arrays["bends"][:count] = straight_below(batch)
        tables = self._tables[: rows * columns].reshape(rows, columns)
        if self._shown != (rows, columns) or not np.array_equal(tables, batch.page_tables[:, :columns]):
            tables[:] = batch.page_tables[:, :columns]
            self._driver.upload_async(self._address + 4 * self._offsets["page_tables"], tables)
            self._shown = (rows, columns)
        self._driver.upload_async(self._address, self._head)

    def stage_inputs(self, address: int, inputs: Array | OnDevice, count: int) -> None:
        """Queue the copy of the step's rows f32 (`count`, width) for its input op, which finds NaN and Inf.

        Raises BadRequest for an array in device memory that is none of these.
        """
        assert self._inputs is not None and self._values  # check_batch proved that the program takes inputs
        if not isinstance(inputs, np.ndarray):
            source = as_address(inputs, (count, self._values), np.float32)
            self._driver.follow(inputs)
            self._driver.copy(address, source, 4 * count * self._values)
            return
        pinned = self._inputs.array.view(np.float32)[: inputs.size]
        pinned[:] = inputs.reshape(-1)
        self._driver.upload_async(address, pinned)

    def release(self) -> None:
        self._driver.release_pinned(self._pinned)
        if self._inputs is not None:
            self._driver.release_pinned(self._inputs)
