"""Hidden states of two models over the same text, op by op on the reference backend, in step with each other.

Weights are asked for one tensor at a time and states are compared where they arise, so that neither a model
nor a text's states of all layers lie in memory. Activations are f32; the KV cache has the plan's formats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from builders.weights import Weights
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Add, KvAppend
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program

Restore = Callable[[Array], Array]
Windows = tuple[Array, ...]  # token ids int32 (n,) of texts that have nothing to do with each other
STEP_TOKENS = 2048  # of one evaluation step: buffers stay small, weights are read seldom


def layer_ends(program: Program) -> list[tuple[int, str]]:
    """(op, buffer) where each layer ends: the last Add before the next layer stores its keys, or before the
    logits, and the residual stream that it writes. One pair a cache slot, in the order of the layers.
    """
    ends: list[tuple[int, str]] = []
    last: tuple[int, str] | None = None
    inside = False
    for index, op in enumerate(program.ops):
        if isinstance(op, Add):
            last = (index, op.out)
        elif isinstance(op, KvAppend):
            if inside and last is not None:
                ends.append(last)
            inside, last = True, None
    return [*ends, last] if inside and last is not None else ends


def hidden_states(weights: Weights, kv: KvPlan, windows: Windows) -> Array:
    """Inputs of the logits for every token that another follows, f32 (predicted tokens, hidden)."""
    walks = _walk(weights, kv, windows)
    return np.concatenate([deque(states, maxlen=1)[0][_followed(group)] for group, states in walks])


def compare_hidden(
    reference: Weights, engine: Weights, kv: KvPlan, windows: Windows, restore: Restore | None = None
) -> tuple[Array, Array, tuple[float, ...]]:
    """Run both over the windows, `reference` with an f32 cache and `engine` with the plan's.

    Returns their inputs of the logits as `hidden_states` gives them, and by layer the cosine of the two
    residual streams after it: the mean over all tokens, f64. `restore` gives the engine's stream in the
    reference's basis where it is another.
    """
    exact = msgspec.structs.replace(kv, k="f32", v="f32")
    found: tuple[list[Array], list[Array]] = ([], [])
    sums = np.zeros(len(layer_ends(reference.program)))
    tokens = 0
    pairs = zip(_walk(reference, exact, windows), _walk(engine, kv, windows), strict=True)
    for (group, of_reference), (_, of_engine) in pairs:
        tokens += sum(map(len, group))
        rows: tuple[Array, Array] = (np.empty(0), np.empty(0))
        for layer, rows in enumerate(zip(of_reference, of_engine, strict=True)):
            if layer < len(sums):
                of_f, of_q = rows
                sums[layer] += _cosines(of_f, of_q if restore is None else restore(of_q)).sum()
        for kept, states in zip(found, rows, strict=True):
            kept.append(states[_followed(group)])
    return np.concatenate(found[0]), np.concatenate(found[1]), tuple((sums / tokens).tolist())


def _walk(weights: Weights, kv: KvPlan, windows: Windows) -> Iterator[tuple[list[Array], Iterator[Array]]]:
    """For each group of windows that run as one step: the residual stream (tokens, hidden) after every layer,
    and last of all the inputs of the logits."""
    for group in _groups(windows):
        executor, batch = _step(weights, kv, group)
        yield group, _states(executor, weights.program, batch)
        executor.close()


def _states(executor: ReferenceExecutor, program: Program, batch: StepBatch) -> Iterator[Array]:
    ends = dict(layer_ends(program))
    final = program.heads[0].x
    last = len(program.body) - 1
    for index, buffers in executor.walk_hidden(batch):
        if index in ends:
            yield buffers[ends[index]]
        if index == last:
            yield buffers[final]


def _cosines(a: Array, b: Array) -> Array:
    """Cosine of each pair of rows, f64 (tokens,); zeros are equal to zeros and to nothing else."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    equal = (a == b).all(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(equal, 1.0, np.where(lengths > 0.0, (a * b).sum(axis=1) / lengths, 0.0))


def _followed(group: list[Array]) -> Array:
    """Rows of a step, but the last of each window, which nothing follows."""
    return np.delete(np.arange(sum(map(len, group))), np.cumsum([len(w) for w in group]) - 1)


def _groups(windows: Windows) -> list[list[Array]]:
    """Windows that are taken together, up to STEP_TOKENS tokens, for every step reads all weights."""
    groups: list[list[Array]] = [[]]
    for w in windows:
        if groups[-1] and sum(map(len, groups[-1])) + len(w) > STEP_TOKENS:
            groups.append([])
        groups[-1].append(w)
    return groups


def _step(weights: Weights, kv: KvPlan, group: list[Array]) -> tuple[ReferenceExecutor, StepBatch]:
    """An executor with the least pages that serve, and the group as one step of it."""
    lengths = [len(w) for w in group]
    pages = [-(-n // kv.page_tokens) for n in lengths]
    table = np.full((len(group), max(pages)), -1, np.int32)
    for i, n in enumerate(pages):
        table[i, :n] = sum(pages[:i]) + np.arange(n)
    step = StepShape(context=max(lengths), sequences=len(group), tokens=sum(lengths), logits=1)
    executor = ReferenceExecutor(
        weights.program, weights, msgspec.structs.replace(kv, pages=sum(pages)), step
    )
    batch = StepBatch(
        tokens=np.concatenate(group),
        positions=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        sequence=np.repeat(np.arange(len(group), dtype=np.int32), lengths),
        page_tables=table,
        logit_rows=np.zeros(0, np.int32),
    )
    return executor, batch
