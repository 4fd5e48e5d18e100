"""Proof that a StepBatch stays within what an executor was sized for, before any index is used."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadRequest


def check_batch(batch: StepBatch, program: Program, kv: KvPlan, step: StepShape) -> None:
    """Raises BadRequest naming the array, what it holds and what it may hold."""
    for name in ("tokens", "positions", "sequence", "logit_rows"):
        _integers(name, getattr(batch, name), 1)
    _integers("page_tables", batch.page_tables, 2)
    count = len(batch.tokens)
    if count == 0:
        raise BadRequest("the step has no tokens")
    for name in ("positions", "sequence"):
        if len(getattr(batch, name)) != count:
            raise BadRequest(f"{name} has {len(getattr(batch, name))} entries for {count} tokens")
    sequences = len(batch.page_tables)
    for what, have, most in (
        ("tokens", count, step.tokens),
        ("sequences", sequences, step.sequences),
        ("logit_rows", len(batch.logit_rows), step.logits),
    ):
        if have > most:
            raise BadRequest(f"the step has {have} {what}, the executor was sized for {most}")
    reach = min(step.context, program.max_context, batch.page_tables.shape[1] * kv.page_tokens)
    _within("tokens", batch.tokens, 0, program.vocab_size)
    _within("positions", batch.positions, 0, reach)
    _within("sequence", batch.sequence, 0, sequences)
    _within("page_tables", batch.page_tables, -1, kv.pages)
    _within("logit_rows", batch.logit_rows, 0, count)
    if (np.diff(batch.logit_rows) <= 0).any():
        raise BadRequest("logit_rows must ascend")
    places = batch.sequence.astype(np.int64) * reach + batch.positions
    if len(np.unique(places)) != count:
        raise BadRequest("two tokens of the step have the same sequence and position")
    pages = batch.page_tables[batch.sequence, batch.positions // kv.page_tokens]
    if (pages < 0).any():
        t = int(np.argmax(pages < 0))
        raise BadRequest(f"token {t} at position {int(batch.positions[t])} has no page")


def _integers(name: str, array: Array, ndim: int) -> None:
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise BadRequest(f"{name} is {array.ndim}-D {array.dtype}, expected {ndim}-D int32")


def _within(name: str, array: Array, least: int, end: int) -> None:
    if array.size and (int(array.min()) < least or int(array.max()) >= end):
        raise BadRequest(
            f"{name} holds {int(array.min())} to {int(array.max())}, expected {least} to {end - 1}"
        )
