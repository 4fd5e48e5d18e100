"""Medusa heads: trees of the likeliest paths, fed with the right hidden rows, over a model that is none."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from books import check_books
from history_model import HistoryExecutor, assert_idle, continuation, make_session, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking_engine import SPECIAL, vocabulary

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.errors import NumericError
from edge_runtime.serving.medusa import MedusaHeads
from edge_runtime.serving.request import Request
from edge_runtime.serving.sampling import GREEDY, Sampler
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.verification import Proposal

VOCAB = vocabulary().size
FIRST, WORDS = len(SPECIAL), len(SPECIAL) + 40
HEADS = 4
TOKENIZER = make_tokenizer()


class Remembering(HistoryExecutor):
    """Knows which history each hidden row stands for."""

    def __init__(self, kv: KvPlan, step: StepShape, vocab: int) -> None:
        super().__init__(kv, step, vocab)
        self.words = WORDS
        self.seen: dict[float, list[int]] = {}

    def _history(self, batch: StepBatch, t: int, parents: np.ndarray, places: np.ndarray) -> list[int]:
        history = super()._history(batch, t, parents, places)
        self.seen[float(continuation(history, 1, 1 << 20)[0])] = history
        return history


class Head:
    """Says token k + 1 after the history of a hidden row, or something else beside it."""

    memory_bytes = 0

    def __init__(self, k: int, wrong: float, seed: int) -> None:
        self.k, self.wrong, self.random = k, wrong, random.Random(seed)
        self.model: Remembering | None = None
        self.closed = False

    def forward(self, batch: StepBatch) -> np.ndarray:
        assert self.model is not None and batch.inputs is not None
        assert batch.inputs.shape == (len(batch.tokens), 1) and batch.inputs.dtype == np.float32
        logits = np.zeros((len(batch.tokens), VOCAB), np.float32)
        for i, row in enumerate(batch.inputs[:, 0].tolist()):
            # The model's own logits of that row gave the last token; head 0 says the one after it
            true = continuation(self.model.seen[row], self.k + 2, WORDS)[-1]
            logits[i, true] = 12.0
            if self.random.random() < self.wrong:
                logits[i, self.random.randrange(FIRST, WORDS)] += 12.5
        return logits

    def close(self) -> None:
        self.closed = True


@pytest.mark.parametrize("trees", [True, False])
@pytest.mark.parametrize("wrong", [0.0, 0.5])
def test_heads_guess_from_the_row_that_the_last_token_came_from(trees: bool, wrong: float) -> None:
    heads = [Head(k, wrong, k) for k in range(HEADS)]
    session, model = make_session(
        sequences=4,
        tokens=80,
        logits=80,
        pages=24,
        proposer=lambda kv, step: MedusaHeads(heads, most=16, trees=trees),  # type: ignore[arg-type]
        gated=False,
        kind=Remembering,
    )
    assert isinstance(model, Remembering)
    for head in heads:
        head.model = model
    rng = random.Random(2)
    prompts = [[rng.randrange(FIRST, WORDS) for _ in range(rng.randrange(1, 30))] for _ in range(24)]
    with session:
        asked: dict[int, list[int]] = {}
        got: dict[int, list[int]] = {}
        while session.in_flight or len(asked) < len(prompts):
            for prompt in prompts[len(asked) : len(asked) + 1]:  # one a step, the later ones before others
                number = session.submit(Request(prompt=prompt, max_tokens=26, priority=len(asked) // 8))
                asked[number], got[number] = prompt, []
            for event in session.step():
                assert event.token is not None
                got[event.request].append(event.token)
            check_books(session, model)
        for number, prompt in asked.items():
            assert got[number] == continuation(prompt, 26, WORDS)
        assert session._scheduler.preempted > 0
        assert_idle(session)
        if wrong == 0.0:
            # One token from the prompt's last row, then five a step: each head was right each time
            done = session.complete([*prompts[0], 9], max_tokens=26)
            assert (done.usage.accepted, len(done.tokens)) == (20, 26)
        else:
            assert 0 < session.metrics.accepted < session.metrics.drafted
    assert all(head.closed for head in heads)


class Fixed:
    """A head that says the same after every row."""

    memory_bytes = 0

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits

    def forward(self, batch: StepBatch) -> np.ndarray:
        return np.repeat(self.logits[None], len(batch.tokens), axis=0)

    def close(self) -> None:
        pass


def propose(heads: list[np.ndarray], nodes: int) -> Proposal:
    sequence = Sequence(1, Request(prompt=[5], max_tokens=9), [5], 9, TOKENIZER)
    sequence.sampler = Sampler(GREEDY, [5], len(heads[0]))
    sequence.hidden = np.zeros(3, np.float32)
    found = MedusaHeads([Fixed(h) for h in heads], most=24).propose([(sequence, nodes)])  # type: ignore[arg-type]
    assert found[0] is not None
    return found[0]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(1, 24))
def test_a_tree_holds_the_likeliest_paths(seed: int, depth: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    heads = [rng.normal(0, 2, 6).astype(np.float32) for _ in range(depth)]
    odds = [np.exp(h.astype(np.float64)) / np.exp(h.astype(np.float64)).sum() for h in heads]
    every = {
        path: float(np.prod([odds[d][t] for d, t in enumerate(path)]))
        for n in range(1, depth + 1)
        for path in itertools.product(range(6), repeat=n)
    }
    tree = propose(heads, nodes)
    assert tree.parents is not None
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens, tree.parents, strict=True):
        assert parent < len(paths)
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths) == min(nodes, len(every))
    assert [len(path) - 1 for path in paths] == tree.depths()
    best = sorted(every.values(), reverse=True)[: len(paths)]
    assert sorted((every[path] for path in paths), reverse=True) == pytest.approx(best, rel=1e-9)
    assert tree.hoped == pytest.approx(sum(best), rel=1e-6)  # its sums are f32


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("head", [0, 1])
def test_numbers_that_are_not_finite_make_no_tree(bad: float, head: int) -> None:
    heads = [np.zeros(6, np.float32), np.zeros(6, np.float32)]
    heads[head][3] = bad
    with pytest.raises(NumericError, match="Medusa head"):
        propose(heads, 8)
