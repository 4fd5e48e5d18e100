"""10,000 random operations on a live session: the books stay right, and every answer is the plain one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from books import check_books
from history_model import (
    HistoryExecutor,
    adapted_continuation,
    assert_idle,
    make_session,
)
from oracle import Oracle
from speaking_engine import SPECIAL

from edge_runtime.engine.adapter import LowRank
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.errors import BadRequest, QueueFull
from edge_runtime.serving.draft import DraftModel
from edge_runtime.serving.lookup import Lookup
from edge_runtime.serving.request import FinishReason, Request
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.speculative import Proposer

OPERATIONS = 10_000  # over all ways to guess
WAYS = ("off", "draft", "lookup", "chains", "trees")
WORDS = len(SPECIAL) + 3  # three different tokens: guesses come true now and then, and prompts begin alike
CONTEXT, PAGE = 96, 8
SPOILED = WORDS  # a prompt that begins with this token gives NaN some tokens later
TIDY, GREET = "tidy", "greet"


@dataclass
class Asked:
    request: Request
    answer: list[int]  # all that plain decoding would say
    got: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    cancelled: bool = False


class Traffic:
    """A session of few pages and few slots, and what it was asked."""

    def __init__(self, way: str, seed: int, folder: Path) -> None:
        self.rng = random.Random(seed)
        self.way = way
        self.draft: HistoryExecutor | None = None
        self.session, self.executor = make_session(
            context=CONTEXT,
            sequences=4,
            tokens=self.rng.choice([5, 24]),
            logits=20,
            pages=self.rng.choice([14, 24]),
            page_tokens=PAGE,
            max_waiting=6,
            proposer=None if way == "off" else self.proposer,
            gated=False,
        )
        self.executor.words = WORDS
        self.executor.spoil = self.is_spoiled
        self.executor.raises = seed % 2 == 0  # else NaN comes among the logits, perhaps of a guess alone
        self.asked: dict[int, Asked] = {}
        self.bases = [self.tokens(60) for _ in range(3)]
        self.saved = [folder / f"{i}.prefix" for i in range(2)]
        self.numbers: dict[str, int] = {}
        self.counts: dict[str, int] = {}

    def proposer(self, kv: KvPlan, step: StepShape) -> Proposer:
        words = range(len(SPECIAL), WORDS)
        match self.way:
            case "draft":
                self.draft = HistoryExecutor(kv, step, self.vocab)
                self.draft.words = WORDS
                # Says something else one time in four; and its step fails one time in fifty
                self.draft.script = self.drafted
                self.draft.spoil = lambda history: self.rng.random() < 0.02
                return DraftModel(self.draft, step, PAGE, 5)
            case "lookup":
                return Lookup(6)
            case _:
                oracle = Oracle(self.following, 0.6, words, trees=self.way == "trees")
                oracle.strict = False
                return oracle

    def drafted(self, history: list[int]) -> int:
        right = adapted_continuation(history, 1, WORDS, -1)[0]
        return right if sum(history) % 4 else len(SPECIAL)

    def following(self, sequence: Sequence, count: int) -> list[int]:
        asked = self.asked[sequence.id]
        done = len(sequence.answer)
        return asked.answer[done : done + count]

    @property
    def vocab(self) -> int:
        return 320

    def is_spoiled(self, history: list[int]) -> bool:
        return history[0] == SPOILED and len(history) % 16 == 11

    def tokens(self, count: int) -> list[int]:
        return [self.rng.randrange(len(SPECIAL), WORDS) for _ in range(count)]

    # --- operations ---

    def submit(self) -> None:
        rng = self.rng
        begin = [SPOILED] if rng.random() < 0.12 else []
        prompt = [*begin, *rng.choice(self.bases)[: rng.randrange(60)], *self.tokens(rng.randrange(1, 20))]
        twins = [
            asked.request for number, asked in self.asked.items() if number in self.session._traffic.live
        ]
        if twins and rng.random() < 0.3:  # the same once more, beside it: its pages become the first one's
            prompt = list(rng.choice(twins).prompt)
        request = Request(
            prompt=prompt,
            max_tokens=rng.randrange(1, 30),
            priority=rng.choice([0, 0, 0, 1, 2]),
            adapter=rng.choice([None, None, *self.session.adapters]),
            speculate=rng.random() < 0.9,
        )
        try:
            number = self.session.submit(request)
        except QueueFull:
            self.count("refused")
            return
        adapter = -1 if request.adapter is None else self.numbers[request.adapter]
        length = min(request.max_tokens, CONTEXT - len(prompt))
        self.asked[number] = Asked(request, adapted_continuation(prompt, length, WORDS, adapter))

    def step(self) -> None:
        for event in self.session.step():
            asked = self.asked[event.request]
            assert asked.reason is None
            if event.token is not None:
                asked.got.append(event.token)
            asked.reason = event.finish_reason
            if asked.reason is not None:
                self.ended(asked)

    def ended(self, asked: Asked) -> None:
        self.count(str(asked.reason))
        assert asked.got == asked.answer[: len(asked.got)]
        if asked.reason == "length":
            assert len(asked.got) == len(asked.answer)
        elif asked.reason == "error":
            history = [*asked.request.prompt, *asked.got]
            assert history[0] == SPOILED
            if len(history) > len(asked.request.prompt):  # it ended at the very token that has none
                assert len(history) % 16 == 11
        else:
            assert asked.reason == "cancelled" and asked.cancelled

    def cancel(self) -> None:
        number = self.rng.choice([*self.session._traffic.live, 10**9])
        if self.session.cancel(number):
            self.asked[number].cancelled = True
            assert not self.session.cancel(number)

    def adapters(self) -> None:
        name = self.rng.choice([TIDY, GREET])
        if name in self.numbers:
            used = any(s.request.adapter == name for s in self.session._traffic.live.values())
            try:
                self.session.drop_adapter(name)
            except BadRequest as error:
                assert used and "in flight use the adapter" in str(error)
                return
            assert not used
            del self.numbers[name]
        else:
            self.session.load_adapter(name, {"w": LowRank(np.zeros((1, 1)), np.zeros((1, 1)), 1.0)})
            self.numbers[name] = self.session._adapters.get(name).number

    def prefix(self) -> None:
        path = self.rng.choice(self.saved)
        try:
            assert self.session.load_prefix(path) == 56 - 8 * self.saved.index(path)
            self.count("loaded")
        except BadRequest as error:
            assert "pages of the KV cache" in str(error)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def run(self, operations: int) -> None:
        pool = self.session._pool
        for i, path in enumerate(self.saved):
            self.session.save_prefix(self.bases[i][: 60 - 8 * i], path)
        for _ in range(operations):
            match self.rng.random():
                case dice if dice < 0.13:
                    self.submit()
                case dice if dice < 0.16:
                    self.cancel()
                case dice if dice < 0.175:
                    self.adapters()
                case dice if dice < 0.185:
                    self.prefix()
                case _:
                    self.step()
            check_books(self.session, self.executor, self.draft)
        while self.session.in_flight:
            self.step()
            check_books(self.session, self.executor, self.draft)
        self.step()
        assert all(asked.reason is not None for asked in self.asked.values())
        assert_idle(self.session)
        assert pool.kept > 0
        for root in list(self.session._tree._roots):
            self.session._tree.drop(root)
        assert pool.kept == 0 and sorted(pool._free) == list(range(pool.pages))
        check_books(self.session, self.executor)


@pytest.mark.parametrize("way", WAYS)
def test_random_operations_keep_the_books_and_the_answers(way: str, tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    rounds = 4
    for seed in range(rounds):
        traffic = Traffic(way, seed, tmp_path)
        with traffic.session as session:
            traffic.run(OPERATIONS // len(WAYS) // rounds)
            figures = session.metrics
            more = {
                "preempted": session._scheduler.preempted,
                "cached": figures.cached_tokens,
                "drafted": figures.drafted,
                "accepted": figures.accepted,
                "tree": len(session._tree),
            }
        for name, count in (traffic.counts | more).items():
            counts[name] = counts.get(name, 0) + count
    # Nothing above proves anything if it did not come to pass
    seen = ("length", "cancelled", "error", "refused", "loaded", "preempted")
    assert min(counts.get(name, 0) for name in seen) > 1
    assert counts["cached"] > 1000
    if way != "off":
        assert 50 < counts["accepted"] < counts["drafted"]
