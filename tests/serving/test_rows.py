"""Steps that bring less than all logits: the same tokens, to the bit of every distribution.

Independent reference: the sampler over whole rows of logits, which test_sampling.py holds against
transformers.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from history_model import HistoryExecutor, make_session
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Oracle

from edge_runtime import Request, Sampling
from edge_runtime.backends.likeliest import HostLogits, likeliest_of, top_of
from edge_runtime.backends.protocol import TOP, StepBatch
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.errors import BadRequest, NumericError
from edge_runtime.serving import sampling
from edge_runtime.serving.rows import run_step
from edge_runtime.serving.sampling import Sampler, TopTokens
from edge_runtime.serving.speculative import Proposer
from edge_runtime.serving.verification import Proposal, walk

WORDS = range(5, 12)
BATCH: Any = None  # of executors that do not look at it


class Given(HostLogits):
    """An executor that gives these logits f32 (L, vocab) and counts how often they were asked for."""

    def __init__(self, logits: np.ndarray) -> None:
        self.logits = logits
        self.asked: list[str] = []

    def forward(self, batch: StepBatch) -> np.ndarray:
        self.asked.append("forward")
        return self.logits


class Apart(Given):
    """Its logits lie elsewhere: `forward` is for those who need them all."""

    def likeliest(self, batch: StepBatch) -> np.ndarray:
        self.asked.append("likeliest")
        return likeliest_of(self.logits)

    def top(self, batch: StepBatch, k: int) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append(f"top {k}")
        return top_of(self.logits, k)


@pytest.fixture
def long_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies of tests are long enough to be looked at for their likeliest tokens."""
    monkeypatch.setattr(sampling, "_SHORT", 0)


def logits_of(seed: int, rows: int, vocab: int, *, steps: float = 0.0) -> np.ndarray:
    """Logits f32 (rows, vocab); `steps`: rounded to multiples of it, so that many are equal."""
    found = np.random.default_rng(seed).normal(0, 3, (rows, vocab))
    if steps:
        found = np.round(found / steps) * steps
    return found.astype(np.float32)


def sampler(vocab: int, **options: Any) -> Sampler:
    return Sampler(Sampling(**options), [], vocab)


@pytest.mark.parametrize("steps", [0.0, 1.0])
@pytest.mark.parametrize("vocab", [1, 5, 63, 64, 65, 300])
def test_the_likeliest_tokens_are_those_of_a_stable_sort(vocab: int, steps: float) -> None:
    logits = logits_of(vocab, 4, vocab, steps=steps)
    order = np.argsort(-logits, axis=1, kind="stable")
    assert np.array_equal(likeliest_of(logits), order[:, 0])
    for k in {1, min(2, vocab), min(TOP, vocab)}:
        ids, values = top_of(logits, k)
        assert ids.dtype == np.int32 and values.dtype == np.float32
        assert np.array_equal(ids, order[:, :k])
        assert np.array_equal(values, np.take_along_axis(logits, order[:, :k], 1))
    for k in (0, -1, min(TOP, vocab) + 1):
        with pytest.raises(BadRequest, match="likeliest tokens"):
            top_of(logits, k)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_have_no_likeliest_token(bad: float) -> None:
    logits = logits_of(1, 3, 100)
    logits[1, 50] = bad
    want = logits.argmax(axis=1)
    assert likeliest_of(logits).tolist() == [want[0], -1, want[2]]
    ids, values = top_of(logits, 3)
    assert (ids[:, 0] == [want[0], -1, want[2]]).all()
    assert np.isnan(values[1]).all() and np.isfinite(values[[0, 2]]).all()


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    vocab=st.sampled_from([65, 100, 129, 1000, 2049, 33333]),
    top_k=st.integers(1, 62),
    more=st.integers(0, 8),
    temperature=st.floats(0.01, 3.0),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.02, 0.5]),
    steps=st.sampled_from([0.0, 0.0, 0.5]),
)
def test_top_k_draws_from_the_same_bits(
    seed: int, vocab: int, top_k: int, more: int, temperature: float, top_p: float, min_p: float, steps: float
) -> None:
    logits = logits_of(seed, 1, vocab, steps=steps)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}
    one, other = sampler(vocab, **options), sampler(vocab, **options)
    assert one.candidates == (top_k + 1 if vocab >= 4096 else None)
    top = TopTokens(*top_of(logits, min(TOP, vocab, top_k + 1 + more)))
    last = np.sort(logits[0])[-top_k]
    settled = int((logits[0] >= last).sum()) < top.ids.shape[1]
    assert one.settles(top) or not settled or temperature > 1  # f32 values apart may meet when scaled
    if one.settles(top):
        row, whole = top[0], logits[0]
        assert np.array_equal(one._odds(row, None), one._odds(whole, None))
        for _ in range(5):
            assert one.choose(row) == other.choose(whole)
        odds = np.full(vocab, 1 / vocab)
        for guess in (int(row.ids[0]), int(row.ids[-1]), 3):
            assert one.verify(row, guess, odds) == other.verify(whole, guess, odds)
        assert one.guess(row, None)[0] == other.guess(whole, None)[0]


@pytest.mark.usefixtures("long_vocabulary")
def test_equals_at_the_border_need_all_logits() -> None:
    """Top-k keeps all tokens that equal the last it keeps, also those that are not among the k + 1."""
    logits = np.full((1, 100), 1.0, np.float32)
    logits[0, 7] = 2.0
    asking = sampler(100, temperature=1.0, top_k=3, seed=1)
    executor = Apart(logits)
    rows = run_step(executor, BATCH, [(asking, 1)])
    assert executor.asked == ["top 4", "forward"]
    assert isinstance(rows, np.ndarray) and rows.shape == (1, 100)
    drawn = {asking.choose(rows[0]).token for _ in range(300)}
    assert len(drawn) > 4


def test_scores_that_meet_when_scaled_need_all_logits() -> None:
    """Far from the greatest, two f32 are one f64 after the shift."""
    logits = np.zeros((1, 10), np.float32)
    logits[0, 0], logits[0, 1] = 3e30, 1e-8
    assert not sampler(10, temperature=1.0, top_k=2).settles(TopTokens(*top_of(logits, 3)))
    logits[0, 0] = 1.0
    assert sampler(10, temperature=1.0, top_k=2).settles(TopTokens(*top_of(logits, 3)))


@pytest.mark.usefixtures("long_vocabulary")
@pytest.mark.parametrize(
    ("samplers", "asked"),
    [
        ([], ["likeliest"]),
        ([{}, {}], ["likeliest"]),
        ([{"seed": 5, "top_k": 3}], ["likeliest"]),
        ([{"temperature": 1.0, "top_k": 5}], ["top 6"]),
        ([{"temperature": 1.0, "top_k": 5}, {}, {"temperature": 0.5, "top_k": 63, "top_p": 0.5}], ["top 64"]),
        ([{"temperature": 1.0, "top_k": 64}], ["top 65"]),  # what models are shipped with
        ([{"temperature": 1.0, "top_k": TOP}], ["forward"]),
        ([{"temperature": 1.0}], ["forward"]),
        ([{}, {"temperature": 1.0, "top_p": 0.9}], ["forward"]),
        ([{"logprobs": 0}], ["forward"]),
        ([{"temperature": 1.0, "top_k": 5, "logprobs": 2}], ["forward"]),
        ([{"repetition_penalty": 1.1}], ["forward"]),
        ([{"temperature": 1.0, "top_k": 5, "presence_penalty": 0.1}], ["forward"]),
    ],
)
def test_a_step_brings_what_its_samplers_need(samplers: list[dict[str, Any]], asked: list[str]) -> None:
    made = [sampler(200, **{"seed": 1, **options}) for options in samplers]
    executor = Apart(logits_of(3, 2 * len(made), 200))
    rows = run_step(executor, BATCH, [(s, 2) for s in made])
    assert executor.asked == asked
    for i, s in enumerate(made):
        twin = sampler(200, **{"seed": 1, **samplers[i]})
        some, whole = rows[2 * i : 2 * i + 2], executor.logits[2 * i : 2 * i + 2]
        proposal = Proposal([int(whole[0].argmax())])
        assert list(walk(some, proposal, s)) == list(walk(whole, proposal, twin))


def test_a_short_vocabulary_is_seen_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sampler(4095, temperature=1.0, top_k=20).candidates is None
    assert sampler(4096, temperature=1.0, top_k=20).candidates == 21
    monkeypatch.setattr(sampling, "_SHORT", 0)
    assert sampler(20, temperature=1.0, top_k=20).candidates is None
    assert sampler(20, temperature=1.0, top_k=19).candidates == 20


def test_a_sampler_with_a_grammar_sees_all() -> None:
    with_grammar = Sampler(Sampling(), [], 200, constraint=object())  # type: ignore[arg-type]
    assert with_grammar.candidates is None


@pytest.mark.parametrize("tree", [False, True])
def test_a_walk_over_tokens_is_the_walk_over_their_logits(tree: bool) -> None:
    logits = logits_of(9, 6, 50)
    best = logits.argmax(axis=1).astype(np.int32)
    parents = [-1, 0, 0, 2, 3] if tree else None
    tokens = [int(best[0]), 1, int(best[1]), int(best[3]), 2]
    for proposal in (None, Proposal(tokens, parents), Proposal([int(t) for t in best[:5]], parents)):
        want = list(walk(logits, proposal, sampler(50)))
        assert list(walk(best, proposal, sampler(50))) == want
        assert list(walk(TopTokens(*top_of(logits, 4)), proposal, sampler(50))) == want


@pytest.mark.usefixtures("long_vocabulary")
@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "top_k": 4}])
def test_a_row_that_is_not_finite_ends_the_walk_that_comes_to_it(options: dict[str, Any]) -> None:
    logits = logits_of(2, 3, 50)
    logits[0, 5], logits[1, 8] = 60.0, np.nan
    one = sampler(50, seed=1, **options)
    rows = run_step(Given(logits), BATCH, [(one, 3)])
    with pytest.raises(NumericError, match="no token was emitted"):
        list(walk(rows, Proposal([5, 5]), one))
    assert [choice.token for choice, _ in walk(rows, Proposal([6, 6]), one)] == [5]
    with pytest.raises(NumericError, match="no token was emitted"):
        list(walk(logits, Proposal([5, 5]), one))


# --- sessions ---


class Noisy(HistoryExecutor):
    """The history model with other logits beside the likeliest, many of them equal: they decide a draw."""

    def forward(self, batch: StepBatch) -> np.ndarray:
        logits = super().forward(batch)
        for row, hidden in zip(logits, self.hidden[:, 0].astype(int), strict=True):
            row += np.random.default_rng(hidden).normal(0, 1.5, len(row)).astype(np.float32)
        return np.round(logits * 16) / 16


def answers(options: list[dict[str, Any]], guesses: bool) -> tuple[list[list[int | None]], int]:
    """What a session says to three prompts, and how many guesses stood."""

    def proposer(kv: KvPlan, step: StepShape) -> Proposer:
        oracle = Oracle(lambda s, n: [7] * n, 0.2, WORDS, trees=False, longest=3)
        oracle.strict = False
        return oracle

    session, executor = make_session(
        kind=Noisy, tokens=32, logits=32, proposer=proposer if guesses else None, gated=False
    )
    executor.words = WORDS.stop
    with session:
        numbers = [
            session.submit(
                Request(prompt=[9, 8, 7 + i], max_tokens=30, ignore_eos=True, sampling=Sampling(seed=i, **o))
            )
            for i, o in enumerate(options)
        ]
        found: dict[int, list[int | None]] = {n: [] for n in numbers}
        while session.in_flight:
            for event in session.step():
                found[event.request].append(event.token)
        return list(found.values()), session.metrics.accepted


FEW: dict[str, Any] = {"temperature": 0.9, "top_k": 12, "top_p": 0.95}


@pytest.mark.usefixtures("long_vocabulary")
@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        [{}, {}, {}],
        [FEW, {**FEW, "top_k": 40}, {**FEW, "min_p": 0.1}],
        [FEW, {}, FEW],
        [FEW, {}, {"temperature": 1.0}],
    ],
    ids=["greedy", "top-k", "both", "one sees all"],
)
def test_answers_are_the_same_whatever_steps_bring(
    monkeypatch: pytest.MonkeyPatch, options: list[dict[str, Any]], guesses: bool
) -> None:
    got, stood = answers(options, guesses)
    monkeypatch.setattr(Sampler, "candidates", None)  # all logits, always
    assert answers(options, guesses) == (got, stood)
    assert all(len(tokens) == 30 for tokens in got) and (stood > 0) == guesses
