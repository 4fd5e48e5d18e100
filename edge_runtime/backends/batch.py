"""Proof that a StepBatch stays within what an executor was sized for, before any index is used."""

from __future__ import annotations

from collections.abc import Container

import numpy as np

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Attention
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadRequest


def check_batch(
    batch: StepBatch,
    program: Program,
    kv: KvPlan,
    step: StepShape,
    *,
    device: bool = False,
    window: int | None = None,
) -> None:
    """Raises BadRequest naming the array or row, what it holds and what it may hold.

    A program without cache slots stores nothing, so its steps need no pages and may name a position twice.
    window: of `widest_window`, where the caller has kept it.
    """
    check_arrays(batch, program, device=device)
    count = len(batch.tokens)
    sequences = len(batch.page_tables)
    for what, have, most in (
        ("tokens", count, step.tokens),
        ("sequences", sequences, step.sequences),
        ("logit_rows", len(batch.logit_rows), step.logits),
    ):
        if have > most:
            raise BadRequest(f"the step has {have} {what}, the executor was sized for {most}")
    context = min(step.context, program.max_context)
    reach = min(context, batch.page_tables.shape[1] * kv.page_tokens) if program.cache else context
    if program.input_width is None:
        _within("tokens", batch.tokens, 0, program.vocab_size)
    _within("positions", batch.positions, 0, reach if batch.parents is None else context)
    _within("sequence", batch.sequence, 0, sequences)
    _within("logit_rows", batch.logit_rows, 0, count)
    if (np.diff(batch.logit_rows) <= 0).any():
        raise BadRequest("logit_rows must ascend")
    if program.cache:
        widest = widest_window(program) if window is None else window
        _check_places(batch, widest or reach, kv, reach)


def widest_window(program: Program) -> int:
    """Keys that some attention of the program sees, 0 = all that came before."""
    windows = [op.window or 0 for op in program.ops if isinstance(op, Attention)]
    return 0 if 0 in windows else max(windows, default=1)


def check_arrays(batch: StepBatch, program: Program, *, device: bool = False) -> None:
    """Presence, type and shape of every array. Raises BadRequest.

    device: inputs may lie in a GPU's memory; the caller then proves what those are.
    """
    for name in ("tokens", "positions", "sequence", "logit_rows"):
        _integers(name, getattr(batch, name), 1)
    _integers("page_tables", batch.page_tables, 2)
    if (batch.parents is None) != (batch.places is None):
        raise BadRequest("a tree needs both parents and places, a plain step neither")
    count = len(batch.tokens)
    if count == 0:
        raise BadRequest("the step has 0 tokens, expected at least one")
    for name in ("positions", "sequence", "parents", "places"):
        _counted(name, getattr(batch, name), count, "tokens")
    _counted("slots", batch.slots, len(batch.page_tables), "sequences")
    _counted("adapters", batch.adapters, len(batch.page_tables), "sequences")
    width, inputs = program.input_width, batch.inputs
    if width is None:
        if inputs is not None:
            raise BadRequest("the step brings inputs, but the program looks its tokens up")
    elif inputs is None:
        raise BadRequest(f"the program needs inputs f32 ({count}, {width}) with each step")
    elif not isinstance(inputs, np.ndarray):
        _check_foreign(inputs, f"float32 ({count}, {width})", device)
    elif inputs.dtype != np.float32 or inputs.shape != (count, width):
        raise BadRequest(f"inputs is {inputs.dtype} {inputs.shape}, expected float32 ({count}, {width})")


def host_inputs(batch: StepBatch) -> Array | None:
    """The step's inputs, which `check_arrays` proved to be none of a device."""
    assert batch.inputs is None or isinstance(batch.inputs, np.ndarray)
    return batch.inputs


def _check_foreign(inputs: object, expected: str, device: bool) -> None:
    """Raises BadRequest for inputs that are no numpy array, unless a device may have them and has."""
    kind = type(inputs).__name__
    if not hasattr(inputs, "__cuda_array_interface__"):
        raise BadRequest(f"inputs is a {kind}, expected {expected}")
    if not device:
        raise BadRequest(
            f"inputs is a {kind} in a GPU's memory, which the cuda backend alone takes; copy it to the host"
        )


def check_adapters(adapters: Array | None, loaded: Container[int]) -> None:
    """Raises BadRequest on a sequence whose adapter is not loaded; -1 is none."""
    for s, number in enumerate(() if adapters is None else adapters.tolist()):
        if number != -1 and number not in loaded:
            raise BadRequest(f"sequence {s} uses adapter {number}, which is not loaded")


def check_page(page: int, kv: KvPlan) -> None:
    """Raises BadRequest on a page that does not exist."""
    if not 0 <= page < kv.pages:
        raise BadRequest(f"page {page} does not exist, the cache has {kv.pages}")


def check_move(pages: Array, sources: Array, targets: Array, kv: KvPlan) -> None:
    """Raises BadRequest unless rows of places ascend, none moves up, all have pages and K is per token."""
    if kv.per_channel:
        raise BadRequest(f"keys in {kv.k} share scales with those of their page and cannot move out of it")
    for name, array in (("pages", pages), ("sources", sources), ("targets", targets)):
        _integers(name, array, 1)
    if len(sources) != len(targets):
        raise BadRequest(f"{len(sources)} sources for {len(targets)} targets")
    for name, array in (("sources", sources), ("targets", targets)):
        _within(name, array, 0, len(pages) * kv.page_tokens)
        if (np.diff(array) <= 0).any():
            raise BadRequest(f"{name} must ascend")
        for place in array.tolist():
            check_page(int(pages[place // kv.page_tokens]), kv)
    if (sources < targets).any():
        raise BadRequest("a key can only move down: each source must be at or above its target")


def refuse_tree(batch: StepBatch, kv: KvPlan) -> None:
    """Raises BadRequest for a tree of tokens where K is per channel: which keys are quantized goes by
    position, and a tree's places are none.
    """
    if kv.per_channel and (batch.parents is not None or batch.places is not None):
        raise BadRequest(
            f"token trees do not work with K in {kv.k}, which is quantized by whole pages; verify a chain "
            "(no parents, no places), or take a K with a scale for each token"
        )


def straight_below(batch: StepBatch) -> Array:
    """For each token the position below which the keys it sees lie at their positions, (T,).

    From it up to the token's own position they lie where its ancestors were put.
    """
    if batch.parents is None or batch.places is None:
        return np.full(len(batch.tokens), np.iinfo(np.int32).max)
    below = np.where(batch.places == batch.positions, np.iinfo(np.int32).max, batch.positions)
    for t, parent in enumerate(batch.parents.tolist()):
        if parent >= 0:
            below[t] = min(below[t], below[parent])
    return below


def places_seen(batch: StepBatch, t: int, first: int) -> Array:
    """Where the keys at positions first..position of token t lie, in order of position."""
    position = int(batch.positions[t])
    seen = np.arange(first, position + 1)
    if batch.parents is not None and batch.places is not None:
        while t >= 0 and position >= first:
            seen[position - first] = batch.places[t]
            t, position = int(batch.parents[t]), position - 1
    return seen


def _check_places(batch: StepBatch, widest: int, kv: KvPlan, reach: int) -> None:
    """Every key that is stored or seen has a place, and none is taken twice. widest: keys that are seen."""
    positions = batch.positions.astype(np.int64)
    places, roots = positions, positions
    if batch.parents is not None and batch.places is not None:
        _within("places", batch.places, 0, reach)
        places = batch.places.astype(np.int64)
        roots = _roots(batch)
        if (places < roots).any():
            t = int(np.argmax(places < roots))
            raise BadRequest(
                f"token {t} has the place {int(places[t])}, below position {int(roots[t])} where its path "
                "leaves the cache"
            )
    taken = batch.sequence.astype(np.int64) * reach + places
    if len(np.unique(taken)) != len(taken):
        raise BadRequest("two tokens of the step have the same sequence and position or place")
    if _have_pages(batch, np.maximum(positions - widest + 1, 0), np.maximum(places, roots - 1), kv):
        return
    for t, s in enumerate(batch.sequence.tolist()):
        table = batch.page_tables[s]
        first = max(0, int(positions[t]) - widest + 1) // kv.page_tokens
        below = (int(roots[t]) - 1) // kv.page_tokens  # of the last key that was there before
        needed = {*range(first, below + 1), int(places[t]) // kv.page_tokens}
        for i in sorted(needed):
            if not 0 <= table[i] < kv.pages:
                raise BadRequest(
                    f"token {t} at position {int(positions[t])} needs page {int(table[i])} of its sequence's "
                    f"table, expected 0 to {kv.pages - 1}"
                )


def _have_pages(batch: StepBatch, first: Array, last: Array, kv: KvPlan) -> bool:
    """Whether each sequence has every page from the first place that a token of it needs to the last: looked
    at a sequence at a time, for long contexts; False may also come of pages between that none needs."""
    first, last = first // kv.page_tokens, last // kv.page_tokens
    for s in np.unique(batch.sequence).tolist():
        mine = batch.sequence == s
        pages = batch.page_tables[s, int(first[mine].min()) : int(last[mine].max()) + 1]
        if int(pages.min()) < 0 or int(pages.max()) >= kv.pages:
            return False
    return True


def _roots(batch: StepBatch) -> Array:
    """Position of each token's topmost ancestor in the step (T,). Raises BadRequest on a wrong parent."""
    assert batch.parents is not None
    roots = batch.positions.astype(np.int64)
    for t, parent in enumerate(batch.parents.tolist()):
        if parent == -1:
            continue
        ok = 0 <= parent < t and batch.sequence[parent] == batch.sequence[t]
        if not ok or batch.positions[parent] != batch.positions[t] - 1:
            raise BadRequest(
                f"token {t} names row {parent} as its parent; expected -1 or an earlier row of its sequence, "
                "one position before it"
            )
        roots[t] = roots[parent]
    return roots


def _counted(name: str, array: Array | None, count: int, what: str) -> None:
    if array is None:
        return
    _integers(name, array, 1)
    if len(array) != count:
        raise BadRequest(f"{name} has {len(array)} entries for {count} {what}")


def _integers(name: str, array: Array, ndim: int) -> None:
    if array.ndim != ndim or array.dtype.kind not in "iu":
        raise BadRequest(f"{name} is {array.ndim}-D {array.dtype}, expected {ndim}-D int32")


def _within(name: str, array: Array, least: int, end: int) -> None:
    if array.size and (int(array.min()) < least or int(array.max()) >= end):
        raise BadRequest(
            f"{name} holds {int(array.min())} to {int(array.max())}, expected {least} to {end - 1}"
        )
