"""Speculation changes nothing but the speed, whoever guesses, however far ahead, and whatever goes wrong."""

from __future__ import annotations

import random
from collections.abc import Callable

import numpy as np
import pytest
from books import check_books
from history_model import HistoryExecutor, assert_idle, continuation, make_session
from oracle import Oracle
from speaking_engine import SPECIAL, vocabulary

from edge_runtime.backends.chain import run_chain
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.errors import BackendUnavailable, BadRequest, EdgeError
from edge_runtime.serving.draft import DraftModel
from edge_runtime.serving.lookup import Lookup
from edge_runtime.serving.request import Request, Token
from edge_runtime.serving.sampling import Sampling
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.session import Session
from edge_runtime.serving.speculative import Proposer

VOCAB = vocabulary().size
FIRST = len(SPECIAL)
WORDS = FIRST + 4  # few different tokens: guesses come true now and then
PROMPTS, TOKENS = 200, 16
Make = Callable[[KvPlan, StepShape], Proposer]


def prompts(count: int) -> list[list[int]]:
    rng = random.Random(9)
    return [[rng.randrange(FIRST, WORDS) for _ in range(rng.randrange(1, 30))] for _ in range(count)]


def following(sequence: Sequence, count: int) -> list[int]:
    return continuation(sequence.tokens, count, WORDS)


def draft_model(kv: KvPlan, step: StepShape, length: int) -> DraftModel:
    """Right three times out of four."""
    executor = HistoryExecutor(kv, step, VOCAB)
    executor.script = lambda history: FIRST if sum(history) % 4 == 0 else continuation(history, 1, WORDS)[0]
    return DraftModel(executor, step, kv.page_tokens, length)


def make(way: str, length: int) -> Make:
    match way:
        case "draft":
            return lambda kv, step: draft_model(kv, step, length)
        case "lookup":
            return lambda kv, step: Lookup(length)
        case _:
            words = range(FIRST, WORDS)
            return lambda kv, step: Oracle(following, 0.7, words, trees=way == "trees", longest=length)


def open_fake(proposer: Make | None, *, gated: bool = False) -> tuple[Session, HistoryExecutor]:
    session, executor = make_session(
        sequences=8, tokens=80, logits=80, pages=32, max_waiting=PROMPTS, proposer=proposer, gated=gated
    )
    executor.words = WORDS
    return session, executor


def answers(session: Session, requests: list[Request]) -> list[list[Token]]:
    """The events of each, served together."""
    numbers = {session.submit(request): i for i, request in enumerate(requests)}
    events: list[list[Token]] = [[] for _ in requests]
    while session.in_flight:
        for event in session.step():
            events[numbers[event.request]].append(event)
    return events


@pytest.fixture(scope="module")
def plain() -> list[list[int]]:
    return [continuation(prompt, TOKENS, WORDS) for prompt in prompts(PROMPTS)]


@pytest.mark.parametrize("length", range(1, 9))
@pytest.mark.parametrize("way", ["draft", "lookup", "chains", "trees"])
def test_greedy_answers_are_those_of_plain_decoding(way: str, length: int, plain: list[list[int]]) -> None:
    session, executor = open_fake(make(way, length))
    with session:
        got = answers(session, [Request(prompt=p, max_tokens=TOKENS) for p in prompts(PROMPTS)])
        assert [[e.token for e in events] for events in got] == plain
        check_books(session, executor)
        assert_idle(session)
        assert 0 < session.metrics.accepted < session.metrics.drafted
        guesses = max(len(b.logit_rows) - len(b.page_tables) for b in executor.batches)
        assert guesses > (length - 1) * 4  # several sequences were guessed for at once


def test_right_guesses_save_steps_and_wrong_ones_cost_none() -> None:
    steps = {}
    for chance in (0.0, 1.0):
        session, _ = open_fake(
            lambda kv, step, c=chance: Oracle(following, c, range(FIRST, FIRST + 1), trees=False, longest=4)
        )
        with session:
            session.complete(prompts(1)[0], max_tokens=21)
            steps[chance] = session.metrics.steps
    assert steps[1.0] == 1 + 20 // 5
    assert steps[0.0] <= 21


class Failing(HostLogits):
    """An executor whose steps fail: now and then, or from some step on."""

    def __init__(self, executor: HistoryExecutor, error: EdgeError, fails: Callable[[int], bool]) -> None:
        self.executor, self.error, self.fails, self.steps = executor, error, fails, 0

    def forward(self, batch: StepBatch) -> np.ndarray:
        logits = self.executor.forward(batch)
        self.steps += 1
        if self.fails(self.steps):
            logits[:] = np.nan
            self.executor.cache[:] = -7  # what it stored is of no use either
            raise self.error
        return logits

    def chain(self, batch: StepBatch, count: int) -> np.ndarray:
        return run_chain(self, batch, count)

    def __getattr__(self, name: str) -> object:
        return getattr(self.executor, name)


@pytest.mark.parametrize("error", [BackendUnavailable("the device is gone"), BadRequest("position 99")])
@pytest.mark.parametrize("from_step", [1, 4, 30])
def test_a_draft_model_that_fails_harms_no_request(error: EdgeError, from_step: int) -> None:
    drafts: list[DraftModel] = []

    def broken(kv: KvPlan, step: StepShape) -> Proposer:
        draft = draft_model(kv, step, 5)
        draft._executor = Failing(draft._executor, error, lambda n: n >= from_step)  # type: ignore[arg-type,assignment]
        drafts.append(draft)
        return draft

    session, executor = open_fake(broken)
    with session:
        got = answers(session, [Request(prompt=p, max_tokens=TOKENS) for p in prompts(20)])
        for prompt, events in zip(prompts(20), got, strict=True):
            assert [e.token for e in events] == continuation(prompt, TOKENS, WORDS)
            assert events[-1].finish_reason == "length"
        assert session.speculation.failures > 0
        check_books(session, executor)
        assert_idle(session)


def test_what_a_failed_draft_step_was_to_read_is_read_again() -> None:
    kept: list[HistoryExecutor] = []

    def failing(kv: KvPlan, step: StepShape) -> Proposer:
        draft = draft_model(kv, step, 4)
        kept.append(draft._executor)  # type: ignore[arg-type]
        calls = iter(range(10**6))
        draft._executor.spoil = lambda history: next(calls) % 13 == 0  # type: ignore[attr-defined]
        return draft

    session, executor = open_fake(failing)
    with session:
        for prompt in prompts(24):
            session.submit(Request(prompt=[*prompts(1)[0], *prompt][:40], max_tokens=TOKENS))
        while session.in_flight:
            session.step()
            check_books(session, executor, kept[0])
        assert session.speculation.failures > 5


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.3, seed=1), Sampling()], ids=["drawn", "greedy"])
def test_nan_among_a_draft_models_logits_does_not_bend_the_distribution(sampling: Sampling) -> None:
    """Odds that are NaN would make every comparison false, and the last token the outcome."""

    def silent(kv: KvPlan, step: StepShape) -> Proposer:
        draft = draft_model(kv, step, 3)
        draft._executor.raises = False  # type: ignore[attr-defined]
        draft._executor.spoil = lambda history: len(history) % 3 == 0  # type: ignore[attr-defined]
        return draft

    session, _ = open_fake(silent)
    with session:
        done = session.complete([5, 6, 7, 8, 5], sampling, max_tokens=40)
        assert done.finish_reason == "length"
        assert session.speculation.failures > (3 if sampling.temperature else 0)
        assert set(done.tokens) <= set(range(FIRST, WORDS))  # logits of 5 at temperature 0.3 leave no other


def test_nan_after_a_guess_alone_spares_the_request() -> None:
    """Only a history that no plain step would meet gives NaN: the guess is given up, not the request."""
    prompt = prompts(1)[0]
    true = continuation(prompt, TOKENS, WORDS)
    session, executor = open_fake(make("chains", 6))
    executor.spoil = lambda history: history[len(prompt) :] != true[: len(history) - len(prompt)]
    with session:
        session.submit(Request(prompt=prompt, max_tokens=TOKENS))
        events = []
        while session.in_flight:
            events += session.step()
            check_books(session, executor)
        assert [e.token for e in events] == true and events[-1].finish_reason == "length"
        assert_idle(session)


def test_an_error_of_the_guessers_own_ends_the_step_and_leaves_nothing_behind() -> None:
    def mistaken(kv: KvPlan, step: StepShape) -> Proposer:
        draft = draft_model(kv, step, 4)
        draft.propose = lambda asks: 1 / 0  # type: ignore[method-assign,assignment,return-value]
        return draft

    session, executor = open_fake(mistaken)
    with session:
        numbers = [session.submit(Request(prompt=p, max_tokens=TOKENS)) for p in prompts(3)]
        with pytest.raises(ZeroDivisionError):
            while session.in_flight:
                session.step()
        assert {e.request for e in session.step() if e.finish_reason == "error"} == set(numbers)
        check_books(session, executor)
        assert_idle(session)


def test_requests_may_ask_for_plain_decoding() -> None:
    session, executor = open_fake(make("chains", 4))
    with session:
        done = session.complete(prompts(1)[0], max_tokens=TOKENS, speculate=False)
        assert done.usage.drafted == 0 and all(len(b.logit_rows) <= 1 for b in executor.batches)
        done = session.complete(prompts(1)[0], max_tokens=TOKENS)
        assert done.usage.drafted > 0
        assert done.usage.accepted == session.metrics.accepted > 0


@pytest.mark.parametrize("way", ["chains", "trees"])
def test_events_are_those_of_plain_decoding(way: str) -> None:
    """Texts, log-probabilities, stop strings and stop ids that come among accepted guesses."""
    requests = []
    for i, prompt in enumerate(prompts(40)):
        stop = [chr(0x21 + j) for j in range(4)] if i % 3 == 0 else []
        requests.append(
            Request(
                prompt=prompt,
                max_tokens=3 + i % TOKENS,
                sampling=Sampling(logprobs=i % 3) if i % 2 else Sampling(),
                stop=stop[i % 2 :: 2],
                stop_ids=[WORDS - 1] if i % 5 == 0 else [],
            )
        )
    found = []
    for proposer in (None, make(way, 8)):
        session, _ = open_fake(proposer)
        with session:
            events = answers(session, requests)
            found.append(
                [[(e.token, e.text, e.logprob, e.top, e.finish_reason) for e in es] for es in events]
            )
            assert_idle(session)
    assert found[0] == found[1]
    reasons = [events[-1][-1] for events in found[0]]
    assert min(reasons.count("stop"), reasons.count("length")) > 5
    for events in found[1]:
        assert [e[-1] for e in events[:-1]] == [None] * (len(events) - 1)
