"""Programs that begin with an input op and keep no cache: heads that continue another part's hidden rows."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest
from cpu_programs import Array, decoded, ids, instruction_sets, llama, packed, part_of, step, vector

from builders.sources.medusa import head_program
from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import Backend, Part, StepBatch
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.errors import BadRequest, NumericError

if not BACKEND.available().ok:
    pytest.skip(BACKEND.available().why, allow_module_level=True)

WIDTH, VOCAB = 72, 70
BOTH = pytest.mark.parametrize("backend", [BACKEND, REFERENCE], ids=["cpu", "reference"])


def head(fmt: str, seed: int = 0) -> Part:
    """A Medusa head: logits = W (h + silu(P h + b))."""
    rng = np.random.default_rng(seed)
    matrix = rng.standard_normal((WIDTH + VOCAB, WIDTH), dtype=np.float32) * np.float32(WIDTH**-0.5)
    weights = {
        "proj": packed(matrix[:WIDTH], fmt),
        "proj_bias": vector(rng.standard_normal(WIDTH)),
        "head": packed(matrix[WIDTH:], fmt),
    }
    return part_of(head_program(WIDTH, VOCAB, 64), weights)


def rows(count: int, seed: int = 3) -> Array:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def fed(inputs: Array) -> StepBatch:
    """Rows without pages, all at one position: nothing is stored, so nothing is in the way."""
    zeros = np.zeros(len(inputs), np.int32)
    return StepBatch(
        zeros, zeros, zeros, np.empty((1, 0), np.int32), np.arange(len(inputs), dtype=np.int32), inputs=inputs
    )


@BOTH
@pytest.mark.parametrize("fmt", ["f32", "f16", "nf4_g64", "int8_row", "int4_g64"])
def test_a_head_is_its_formula(backend: Backend, fmt: str) -> None:
    part, x = head(fmt), rows(9)
    proj, bias, out = (decoded(part.weights[n]).astype(np.float64) for n in ("proj", "proj_bias", "head"))
    u = x @ proj.T + bias
    want = (x + u / (1 + np.exp(-u))) @ out.T
    executor = backend.load(part)
    limit = 0.03 if fmt.startswith("int") and backend is BACKEND else 1e-5
    assert np.abs(executor.forward(fed(x)) - want).max() <= limit * np.abs(want).max()
    executor.close()


@pytest.mark.parametrize("fmt", ["int4_g64", "f16"])
def test_rows_do_not_depend_on_what_shares_the_step(fmt: str) -> None:
    part, x = head(fmt), rows(32)
    answers = []
    for simd in instruction_sets():
        for threads in (1, 2):
            executor = BACKEND.load(part, threads=threads, simd=simd)
            answers.append(executor.forward(fed(x)).copy())
            chunks = [executor.forward(fed(x[i : i + 5])).copy() for i in range(0, 32, 5)]
            answers.append(np.concatenate(chunks))
            executor.close()
    assert all(np.array_equal(a, answers[0]) for a in answers)


@BOTH
def test_memory_without_a_cache(backend: Backend) -> None:
    part = head("f16")
    part = replace(part, kv=msgspec.structs.replace(part.kv, pages=0))
    executor = backend.load(part)
    assert cache_nbytes(part.program, part.kv, part.step) == executor.page_nbytes == 0
    assert executor.forward(fed(rows(3))).shape == (3, VOCAB)
    executor.close()


@BOTH
def test_inputs_come_exactly_when_they_are_wanted(backend: Backend) -> None:
    executor, other = backend.load(head("f32")), backend.load(llama("f32"))
    x = rows(3)
    for bad, message in (
        (None, r"needs inputs f32 \(3, 72\)"),
        (x[:2], r"inputs is float32 \(2, 72\), expected float32 \(3, 72\)"),
        (x[:, 1:], r"inputs is float32 \(3, 71\)"),
        (x.astype(np.float64), "inputs is float64"),
        (x[0], r"inputs is float32 \(72,\)"),
    ):
        with pytest.raises(BadRequest, match=message):
            executor.forward(replace(fed(x), inputs=bad))
    with pytest.raises(BadRequest, match="brings inputs, but the program looks its tokens up"):
        other.forward(replace(step((0, 0, ids(3))), inputs=x))
    for value in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[1, 5] = value
        with pytest.raises(NumericError):
            executor.forward(fed(bad))
        assert len(executor.hidden) == 0
    want = executor.forward(fed(x)).copy()
    np.testing.assert_allclose(executor.forward(fed(np.asfortranarray(x))), want, rtol=1e-4, atol=1e-5)
    for name, value, message in (("positions", 64, "position"), ("sequence", 1, "sequence")):
        wrong = np.full(3, value, np.int32)
        with pytest.raises(BadRequest, match=message):
            executor.forward(replace(fed(x), **{name: wrong}))
    # Ids are not looked up, so any will do
    executor.forward(replace(fed(x), tokens=np.full(3, VOCAB + 5, np.int32)))
    executor.close()
    other.close()


@BOTH
@pytest.mark.parametrize("fmt", ["f32", "int4_g64"])
def test_hidden_rows_are_the_inputs_of_the_logits(backend: Backend, fmt: str) -> None:
    """The head's product with them gives the logits again, for the wanted rows in order."""
    part = llama(fmt)
    executor = backend.load(part)
    assert executor.hidden.shape == (0, part.program.hidden_width)
    wanted = np.array([1, 4, 6], np.int32)
    logits = executor.forward(replace(step((0, 0, ids(7))), logit_rows=wanted)).copy()
    hidden = executor.hidden.copy()
    assert hidden.shape == (3, part.program.hidden_width) and hidden.dtype == np.float32
    want = 0.9 * hidden.astype(np.float64) @ decoded(part.weights["head"]).astype(np.float64).T
    limit = 0.03 if fmt == "int4_g64" and backend is BACKEND else 1e-5
    assert np.abs(logits - want).max() <= limit * np.abs(want).max()
    whole = backend.load(part)
    whole.forward(step((0, 0, ids(7))))
    np.testing.assert_allclose(whole.hidden[wanted], hidden, rtol=1e-4, atol=1e-5)
    if backend is BACKEND:
        assert np.array_equal(whole.hidden[wanted], hidden)
    executor.forward(replace(step((0, 7, ids(1))), logit_rows=np.empty(0, np.int32)))
    assert executor.hidden.shape == (0, part.program.hidden_width)
    executor.close()
    whole.close()


def test_a_head_follows_the_model_it_was_made_for() -> None:
    """hidden of the target, fed to a head in the same order, row by row."""
    target = llama("f16", heads=4, head_dim=20)  # hidden rows of 72
    assert target.program.hidden_width == WIDTH
    model, medusa = BACKEND.load(target), BACKEND.load(head("int8_g64"))
    model.forward(step((0, 0, ids(6)), (1, 0, ids(2))))
    hidden = model.hidden
    got = medusa.forward(fed(hidden)).copy()
    assert np.array_equal(got, medusa.forward(fed(hidden.copy())))
    assert len(np.unique(got.argmax(axis=1))) > 1
    model.close()
    medusa.close()
