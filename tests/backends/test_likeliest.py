"""The likeliest tokens of steps, and what `forward` says of the same steps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from cpu_programs import ids, llama, step

from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import TOP, Backend
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.errors import BadRequest

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

BOTH = pytest.mark.parametrize("backend", [BACKEND, REFERENCE], ids=["cpu", "reference"])
PROMPTS = ((0, 0, ids(9)), (1, 0, ids(11, 2)))
DECODE = ((0, 9, ids(1, 5)), (1, 11, ids(1, 6)))


@BOTH
def test_they_are_those_of_the_logits(backend: Backend) -> None:
    """Of steps with several rows a sequence, of one token each (one native call), of no rows, of guesses."""
    executor = backend.load(llama("int8_row", kv="int8"))
    every = step(*PROMPTS)
    for batch in (
        replace(every, logit_rows=np.array([], np.int32)),
        replace(every, logit_rows=np.array([8, 11, 12], np.int32)),
        replace(every, logit_rows=np.arange(20, dtype=np.int32)),
        step(*DECODE),
        step(DECODE[1]),
        replace(step(*DECODE), logit_rows=np.array([1], np.int32)),
        step((0, 9, ids(4, 5)), (1, 11, ids(3, 9))),
    ):
        logits = executor.forward(batch).copy()
        hidden = executor.hidden.copy()
        assert logits.shape[0] == len(batch.logit_rows)
        found = executor.likeliest(batch)
        assert found.dtype == np.int32 and np.array_equal(found, logits.argmax(axis=1))
        assert np.allclose(executor.hidden, hidden, atol=0 if backend.exact else 1e-5)
        order = np.argsort(-logits, axis=1, kind="stable")
        for k in (1, 5, min(TOP, logits.shape[1])):
            tokens, values = executor.top(batch, k)
            if backend.exact:
                assert np.array_equal(tokens, order[:, :k])
            assert np.allclose(values, np.take_along_axis(logits, order[:, :k], 1), atol=1e-5)
        executor.warm_up([1, 2, 3], [1])
    executor.close()


@BOTH
def test_a_batch_may_come_again_with_other_tokens(backend: Backend) -> None:
    executor = backend.load(llama("int8_row", kv="int8"))
    executor.likeliest(step(*PROMPTS))
    batch = step(*DECODE)
    for seed in range(4):
        batch.tokens[:] = ids(2, seed)
        first = executor.likeliest(batch).copy()
        assert np.array_equal(first, executor.forward(batch).argmax(axis=1))
        assert np.array_equal(first, executor.likeliest(batch))
    executor.close()


@BOTH
def test_equals_go_to_the_lowest_id(backend: Backend) -> None:
    """A head whose rows are the same gives equal logits."""
    part = llama("f32", kv="f32")
    head = part.program.heads[0].weight
    planes = {name: np.zeros_like(plane) for name, plane in part.weights[head].planes.items()}
    weights = {**part.weights, head: replace(part.weights[head], planes=planes)}
    executor = backend.load(replace(part, weights=weights))
    for batch in (step(*PROMPTS), step(*DECODE)):
        assert not executor.forward(batch).any()
        assert not executor.likeliest(batch).any()
        tokens, _ = executor.top(batch, 7)
        assert (tokens == np.arange(7)).all()
    executor.close()


@BOTH
def test_bad_steps_are_refused(backend: Backend) -> None:
    executor = backend.load(llama("int8_row", kv="int8"))
    batch = step(*DECODE)
    for k in (0, TOP + 1):
        with pytest.raises(BadRequest, match="likeliest"):
            executor.top(batch, k)
    for bad in (-1, 1 << 20):
        batch.tokens[1] = bad
        with pytest.raises(BadRequest):
            executor.likeliest(batch)
        assert len(executor.hidden) == 0
    executor.close()
