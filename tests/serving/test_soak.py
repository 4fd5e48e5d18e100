"""5,000 mixed requests on the cpu backend: what ends well is right, and nothing is ever left behind.

30% are cancelled, 5% meet NaN, 5% have no time; some have a grammar, an adapter, a priority, seeds.
"""

from __future__ import annotations

import gc
import importlib.util
import os
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from books import check_pool, check_tree
from history_model import assert_idle
from oracle import Oracle
from speaking_engine import vocabulary, write_speaking
from toy_engine import toy_adapter, toy_program

from edge_runtime import Grammar, NumericError, Request, Sampling, open_engine
from edge_runtime.backends import cpu
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.session import Session

if not cpu.BACKEND.available().ok:
    pytest.skip(cpu.BACKEND.available().why, allow_module_level=True)

REQUESTS, AT_ONCE, SLOTS, SETTLED = 5000, 8, 6, 500
VOCAB = vocabulary().size
SPOILED = VOCAB - 1  # a prompt that ends with this token gives NaN
WORDS = range(40, 50)
PROMPTS = 40
DRIFT = 2 << 20


class Spoiling(HostLogits):
    """The executor, but for what follows one token: NaN in the logits, or a step that says it found some."""

    def __init__(self, executor: Any) -> None:
        self.executor = executor
        self.spoiled = 0

    def forward(self, batch: StepBatch) -> np.ndarray:
        logits: np.ndarray = self.executor.forward(batch)
        bad = batch.tokens[batch.logit_rows] == SPOILED
        if bad.any():
            self.spoiled += 1
            if self.spoiled % 2:
                raise NumericError("NaN was injected")
            logits = logits.copy()
            logits[bad] = np.nan
        return logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


class Soak:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.rng = random.Random(1)
        begin = [self.rng.choice(WORDS) for _ in range(40)]
        self.prompts = [
            [*begin[: self.rng.randrange(40)], *self.rng.choices(WORDS, k=self.rng.randrange(1, 10))]
            for _ in range(PROMPTS)
        ]
        self.grammar = Grammar.regex("[a-z ]{3,6}") if importlib.util.find_spec("llguidance") else None
        self.asked: dict[int, tuple[Request, list[int] | None, int | None]] = {}  # answer, steps to a cancel
        self.got: dict[int, list[int]] = {}
        self.reasons: dict[str, int] = {}
        self.submitted = 0
        # What each prompt is answered when it is alone, without guesses
        self.answers = {
            (i, name): self.alone(prompt, name)
            for i, prompt in enumerate(self.prompts)
            for name in (None, "tidy")
        }

    def alone(self, prompt: list[int], adapter: str | None) -> list[int]:
        done = self.session.complete(prompt, max_tokens=64, adapter=adapter, ignore_eos=True, speculate=False)
        return list(done.tokens)

    def following(self, sequence: Sequence, count: int) -> list[int]:
        """What comes next, where that is known."""
        answer = self.asked[sequence.id][1] or []
        return answer[len(sequence.answer) :][:count]

    def submit(self) -> None:
        rng, at, dice = self.rng, self.rng.randrange(PROMPTS), self.rng.random()
        prompt, adapter = self.prompts[at], rng.choice([None, None, "tidy"])
        options: dict[str, Any] = {
            "max_tokens": rng.randrange(1, 17), "ignore_eos": True, "adapter": adapter,
            "priority": rng.choice([0, 0, 0, 1]),
        }  # fmt: skip
        answer: list[int] | None = self.answers[at, adapter]
        cancel = None
        if dice < 0.3:
            cancel, options["max_tokens"] = rng.randrange(8), 64
        elif dice < 0.35:
            prompt, answer = [*prompt, SPOILED], []
        elif dice < 0.4:
            options["deadline"] = rng.choice([1e-6, 1e-6, 0.002, 0.01])
        elif dice < 0.45:
            options["sampling"], answer = Sampling(temperature=1.0, seed=at, logprobs=2), None
        elif dice < 0.5 and self.grammar is not None:
            options["grammar"], options["ignore_eos"], answer = self.grammar, False, None
        request = Request(prompt=prompt, **options)
        number = self.session.submit(request)
        self.asked[number] = (request, answer, cancel)
        self.got[number] = []
        self.submitted += 1

    def step(self) -> None:
        for number, (request, answer, cancel) in list(self.asked.items()):
            if cancel is not None:
                self.asked[number] = (request, answer, cancel - 1)
                if cancel == 0:
                    self.session.cancel(number)
        for event in self.session.step():
            if event.token is not None:
                self.got[event.request].append(event.token)
            if event.finish_reason is not None:
                self.ended(event.request, event.finish_reason)

    def ended(self, number: int, reason: str) -> None:
        request, answer, cancel = self.asked.pop(number)
        got = self.got.pop(number)
        self.reasons[reason] = self.reasons.get(reason, 0) + 1
        if answer is not None:
            assert got == answer[: len(got)]
        if reason == "length":
            assert len(got) == min(request.max_tokens, 64 - len(request.prompt))
        elif reason == "error":
            assert [*request.prompt, *got][-1] == SPOILED  # it came with it, or drew it
        elif reason == "deadline":
            assert request.deadline is not None
        elif reason == "cancelled":
            assert cancel is not None
        else:
            assert reason == "stop" and request.grammar is not None

    def run(self, until: int) -> None:
        """Keep eight in flight until so many were submitted in all; then let them end."""
        while self.submitted < until:
            while self.session.in_flight < AT_ONCE and self.submitted < until:
                self.submit()
            self.step()
        while self.session.in_flight:
            self.step()
        self.step()
        assert not self.asked and not self.got


def test_nothing_leaks(tmp_path: Path) -> None:
    write_speaking(tmp_path / "e.edge", sequences=SLOTS)
    tidy = toy_adapter(toy_program(vocab=VOCAB))
    path, adapters = tmp_path / "e.edge", {"tidy": tidy}
    with open_engine(path, backend="cpu", threads=2, adapters=adapters, gated=False) as session:
        soak = Soak(session)
        # In look-up's place, for a model of random weights never repeats itself
        session.speculation.proposer = Oracle(soak.following, 0.6, WORDS, trees=True)
        session.speculation.proposer.strict = False
        session._loop._executor = Spoiling(session._executor)  # type: ignore[assignment]
        soak.run(SETTLED)
        memory, files, threads = resident(), descriptors(), threading.active_count()
        tasks = len(os.listdir("/proc/self/task"))
        soak.run(REQUESTS)
        drift = resident() - memory
        assert (descriptors(), threading.active_count()) == (files, threads)
        assert len(os.listdir("/proc/self/task")) == tasks
        assert drift <= DRIFT
        scheduler, pool = session._scheduler, session._pool
        assert sorted(scheduler._slots) == list(range(SLOTS))
        assert_idle(session)
        check_pool(pool, [])
        check_tree(session._tree, pool)
        for root in list(session._tree._roots):
            session._tree.drop(root)
        assert sorted(pool._free) == list(range(pool.pages))
        assert sum(soak.reasons.values()) == REQUESTS
        assert soak.reasons["cancelled"] > 0.25 * REQUESTS
        assert min(soak.reasons["error"], soak.reasons["deadline"]) > 0.03 * REQUESTS
        assert min(scheduler.preempted, session.metrics.accepted, session.metrics.cached_tokens) > 30
    assert threading.active_count() <= threads


def test_sessions_opened_and_closed_leave_nothing(tmp_path: Path) -> None:
    write_speaking(tmp_path / "e.edge")
    tidy = toy_adapter(toy_program(vocab=VOCAB))

    def once() -> None:
        with open_engine(tmp_path / "e.edge", backend="cpu", threads=2, adapters={"tidy": tidy}) as session:
            session.submit(Request(prompt=[7, 8, 9], max_tokens=30))
            session.complete([7, 8, 9], max_tokens=5, adapter="tidy")
            stream = session.generate([9, 8], max_tokens=30)
            next(stream)

    for _ in range(5):
        once()
    memory, files = resident(), descriptors()
    tasks = len(os.listdir("/proc/self/task"))
    for _ in range(40):
        once()
    gc.collect()
    assert descriptors() == files and len(os.listdir("/proc/self/task")) == tasks
    assert resident() - memory <= DRIFT
