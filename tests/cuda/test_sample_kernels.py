"""The end of a step in the emulator: logits checked and capped, the likeliest tokens, a chain's next step."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import pytest
from emulation import Emulated, Guarded, compile_kernels, guarded
from running_step import RunningStep

from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array

KERNELS = ("finish_logits", "pick_tokens", "advance")


@lru_cache(maxsize=1)
def library() -> Emulated:
    lines = [f"EDGE_KERNEL({name}, 256, EdgeSample, edge::{name})" for name in KERNELS]
    return Emulated(compile_kernels('#include "sample.cuh"\n' + "\n".join(lines)))


class Sampled:
    """Logits (rows, vocab) and their best tokens as kernels left them, in a step with `count` rows."""

    def __init__(self, logits: Array, k: int, *, softcap: float = 0.0, count: int | None = None) -> None:
        rows, vocab = logits.shape
        count = rows if count is None else count
        slices = -(-vocab // rec.SLICE)
        self.step = RunningStep(rows, tuple(range(count)))
        held = {
            "logits": Guarded.of(logits),
            "tokens": guarded(rows * 4),
            "top": guarded(rows * k * 4),
            "top_ids": guarded(rows * k * 4),
            "keys": guarded(rows * max(k, 1) * slices * 8),
        }
        record = rec.Sample(step=self.step.record, vocab=vocab, k=k, slices=slices, softcap=softcap)
        for name, memory in held.items():
            setattr(record, name, memory.address if memory.data.size else 0)
        before = {name: memory.data.copy() for name, memory in held.items()}
        library().launch("finish_logits", (slices, rows), record)
        library().launch("pick_tokens", rows, record)
        for name, memory in held.items():
            memory.check()
            end = memory.data.size // rows * count
            assert memory.data[end:].tobytes() == before[name][end:].tobytes()
        self.step.check()
        self.logits = held["logits"].view(np.float32, (rows, vocab))[:count]
        self.tokens = held["tokens"].view(np.int32)[:count]
        self.top = held["top"].view(np.float32, (rows, k))[:count] if k else None
        self.top_ids = held["top_ids"].view(np.int32, (rows, k))[:count] if k else None
        self.status = self.step.status

    def check_order(self, k: int) -> None:
        """Against a stable sort of the logits as they are now: equals by their lowest id."""
        np.testing.assert_array_equal(self.tokens, self.logits.argmax(axis=1))
        if k:
            order = np.argsort(-self.logits.astype(np.float64), axis=1, kind="stable")[:, :k]
            np.testing.assert_array_equal(self.top_ids, order)
            np.testing.assert_array_equal(self.top, np.take_along_axis(self.logits, order, axis=1))


@pytest.mark.parametrize("vocab", [1, 7, 63, 65, 288, 4096, 4097, 32003])
@pytest.mark.parametrize("k", [0, 1, 2, 5, 40, 64])
def test_the_likeliest(vocab: int, k: int) -> None:
    k = min(k, vocab)
    logits = np.random.default_rng(vocab + k).standard_normal((3, vocab)).astype(np.float32) * 4
    made = Sampled(logits, k, count=2)
    np.testing.assert_array_equal(made.logits, logits[:2])
    made.check_order(k)
    assert made.status == 0


@pytest.mark.parametrize("k", [0, 1, 40, 64])
@pytest.mark.parametrize("vocab", [65, 9000])
def test_equals_go_by_their_lowest_id(k: int, vocab: int) -> None:
    rng = np.random.default_rng(k)
    coarse = np.round(rng.standard_normal((1, vocab)) * 2).astype(np.float32)  # -0 and 0 among them
    for logits in (
        coarse,
        np.zeros((1, vocab), np.float32),
        np.where(np.arange(vocab) % 3 == 1, np.float32(-0.0), np.float32(0))[None],
        np.where(np.arange(vocab) % 2 == 1, np.float32(3), np.float32(-1))[None],
        -coarse - np.float32(1e30),
    ):
        Sampled(logits, k).check_order(k)


@pytest.mark.parametrize("k", [1, 5, 64])
def test_wherever_the_likeliest_lie(k: int) -> None:
    """Ordered rows, and rows whose best are all one thread's, one warp's or one slice's."""
    vocab = 3 * rec.SLICE
    small = np.random.default_rng(k).uniform(-1, 0, vocab).astype(np.float32)
    rising = np.arange(vocab, dtype=np.float32)
    for best in (
        np.arange(17, rec.SLICE, 256),  # of thread 17 of the first slice
        np.arange(rec.SLICE, rec.SLICE + 64),
        np.arange(vocab - 64, vocab),
        np.arange(5, vocab, 256),
    ):
        logits = small.copy()
        logits[best] = np.arange(len(best)) + 1
        Sampled(logits[None], k).check_order(k)
    for logits in (rising, -rising, np.float32(-3e38) + rising * 0):
        Sampled(logits[None], k).check_order(k)


def test_a_vocabulary_of_the_greatest_size() -> None:
    vocab = rec.SLICE * rec.SLICES_MAX
    logits = np.random.default_rng(1).standard_normal((1, vocab)).astype(np.float32)
    logits[0, vocab - 1] = 9
    Sampled(logits, 64).check_order(64)
    Sampled(logits, 0).check_order(0)
    Sampled(logits[:, : 262208 - 1], 50).check_order(50)


@pytest.mark.parametrize("k", [0, 40])
def test_soft_cap(k: int) -> None:
    logits = (np.random.default_rng(2).standard_normal((2, 5000)) * 40).astype(np.float32)
    logits[1, [7, 4990]] = 1000, 2000  # both reach the cap: equals
    made = Sampled(logits, k, softcap=30.0)
    want = 30 * np.tanh(logits.astype(np.float64) / 30)
    assert (np.abs(made.logits - want) <= np.abs(want) * 2.0**-21).all()
    made.check_order(k)
    assert made.tokens[1] == 7
    assert made.status == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_what_is_not_finite_is_told(softcap: float, bad: float) -> None:
    for k in (0, 40):
        for at in (0, 4096, 5000):
            logits = np.zeros((2, 5001), np.float32)
            logits[1, at] = bad
            made = Sampled(logits, k, softcap=softcap)
            assert made.status == rec.NOT_FINITE
            assert 0 <= made.tokens[1] < 5001  # an id, whatever it is: the next step may read its embedding
            assert Sampled(logits, k, softcap=softcap, count=1).status == 0


@pytest.mark.parametrize("shared", [False, True])
def test_advance(shared: bool) -> None:
    rows = 300  # more than a block has threads
    order = np.random.default_rng(3).permutation(rows)
    step = RunningStep(rows, tuple(order.tolist()))
    tokens = Guarded.of(np.zeros(rows, np.int32))
    history = guarded(3 * rows * 4)
    record = rec.Sample(step=step.record, tokens=tokens.address, history=history.address, vocab=9)
    if shared:
        record.step.places = record.step.positions
    for n in range(3):
        tokens.view(np.int32)[:] = np.arange(rows) + 1000 * n
        library().launch("advance", 1, record)
        np.testing.assert_array_equal(step.tokens[order], np.arange(rows) + 1000 * n)
        np.testing.assert_array_equal(step.positions, np.arange(rows) * 10 + n + 1)
        np.testing.assert_array_equal(step.places, np.arange(rows) * 10 + (0 if shared else n + 1))
        assert step.counts[rec.CHAIN_STEP] == n + 1
    want = np.arange(rows) + 1000 * np.arange(3)[:, None]
    np.testing.assert_array_equal(history.view(np.int32, (3, rows)), want)
    record.history = 0
    library().launch("advance", 1, record)
    assert step.counts[rec.CHAIN_STEP] == 4
    for memory in (tokens, history):
        memory.check()
    step.check()


def test_scores_of_equal_bits_rank_alike() -> None:
    """Denormals, the least and the greatest values keep their order."""
    values = [0.0, 1e-45, -1e-45, 1.1754944e-38, -1.1754944e-38, 3.4028235e38, -3.4028235e38, 1.0, math.pi]
    logits = np.array([values], np.float32)
    Sampled(logits, len(values)).check_order(len(values))
