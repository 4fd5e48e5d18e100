"""Deadlines on a fake clock that only steps move: what is reported is what happened, to the last request."""

from __future__ import annotations

import ast
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from books import check_books
from history_model import HistoryExecutor, assert_idle, continuation, make_session
from oracle import Oracle
from speaking_engine import SPECIAL, vocabulary
from timed_model import FakeClock, Timed

from edge_runtime.errors import QueueFull
from edge_runtime.serving.request import Request
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.session import Session

ROOT = Path(__file__).resolve().parents[2]

VOCAB = vocabulary().size
FIRST, WORDS = len(SPECIAL), len(SPECIAL) + 4
REQUESTS = 1000


def cost(tokens: int) -> float:
    """Seconds of a step."""
    return 8e-3 + 1e-3 * tokens


def following(sequence: Sequence, count: int) -> list[int]:
    return continuation(sequence.tokens, count, WORDS)


class Served:
    """A session on a fake clock. `delay()`: seconds that a step takes beyond its cost."""

    def __init__(
        self, *, oracle: bool = False, sequences: int = 4, tokens: int = 24, pages: int = 24
    ) -> None:
        self.clock = FakeClock()
        self.delay: Callable[[], float] = lambda: 0.0
        words = range(FIRST, WORDS)
        self.session, executor = make_session(
            context=96,
            sequences=sequences,
            tokens=tokens,
            logits=tokens,
            pages=pages,
            max_waiting=64,
            proposer=(lambda kv, step: Oracle(following, 0.7, words, trees=True)) if oracle else None,
            clock=self.clock,
        )
        self.executor: HistoryExecutor = executor
        executor.words = WORDS
        timed = Timed(executor, self.clock, lambda rows: cost(rows) + self.delay())
        self.session._loop._executor = timed  # type: ignore[assignment]

    def learn(self) -> None:
        """Run a request, so that the session knows how long its steps take."""
        for _ in range(3):
            self.session.complete([FIRST] * 60, max_tokens=8)
        for p in range(self.session.step_shape.sequences):
            self.session.submit(Request(prompt=[FIRST + 1] * (10 + p), max_tokens=12))
        while self.session.in_flight:
            self.session.step()


@dataclass
class Watched:
    """What the test itself sees of a request."""

    request: Request
    sequence: Sequence
    due: float | None
    tokens: list[int] = field(default_factory=list)
    first: float | None = None
    ended: float | None = None
    reason: str = ""


class Watch:
    """Submits, steps, and keeps its own account of when everything ended."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.seen: dict[int, Watched] = {}

    def submit(self, request: Request) -> int:
        session, clock = self.served.session, self.served.clock
        number = session.submit(request)
        due = None if request.deadline is None else clock() + request.deadline
        self.seen[number] = Watched(request, session._traffic.live[number], due)
        return number

    def submit_some(self, rng: random.Random) -> None:
        """Up to two requests, as many as the line takes."""
        for _ in range(rng.randrange(3)):
            try:
                self.submit(requests(rng))
            except QueueFull:
                break

    def step(self) -> None:
        clock = self.served.clock
        began, before = clock(), self.served.session._loop._executor.spent  # type: ignore[attr-defined]
        events = self.served.session.step()
        assert clock() - began == pytest.approx(self.served.session._loop._executor.spent - before)  # type: ignore[attr-defined]
        for event in events:
            watched = self.seen[event.request]
            assert watched.ended is None
            if event.token is not None:
                watched.tokens.append(event.token)
                watched.first = clock() if watched.first is None else watched.first
            if event.finish_reason is not None:
                watched.reason = event.finish_reason
                # A deadline ends a request before a step, for the step would be too long for it
                watched.ended = began if event.finish_reason == "deadline" else clock()

    def finish(self) -> None:
        while self.served.session.in_flight:
            self.step()
        self.step()
        assert all(watched.ended is not None for watched in self.seen.values())

    def missed(self) -> set[int]:
        return {
            n for n, w in self.seen.items() if w.due is not None and w.ended is not None and w.ended > w.due
        }


def requests(rng: random.Random) -> Request:
    deadline = rng.choice([None, None, rng.uniform(0.02, 0.2), rng.uniform(0.2, 1.0), rng.uniform(1, 4)])
    return Request(
        prompt=[rng.randrange(FIRST, WORDS) for _ in range(rng.randrange(1, 60))],
        max_tokens=rng.randrange(1, 24),
        deadline=deadline,
        priority=rng.choice([0, 0, 0, 1, 5]),
    )


@pytest.mark.parametrize("oracle", [False, True])
def test_reported_misses_are_those_that_happened(oracle: bool) -> None:
    """1,000 requests, steps that are held up at random: each miss is reported, and none that was none."""
    served, rng = Served(oracle=oracle), random.Random(5)
    session, watch = served.session, Watch(served)
    served.delay = lambda: rng.choice([0.0] * 30 + [0.05, 0.3, 1.5])
    with session:
        while len(watch.seen) < REQUESTS:
            watch.submit_some(rng)
            watch.step()
            check_books(session, served.executor)
        watch.finish()
        missed = watch.missed()
        assert session.metrics.missed == len(missed)
        timings = {n: w.sequence.watch.timing(1) for n, w in watch.seen.items()}
        assert {n for n, timing in timings.items() if timing.missed} == missed
        for n, w in watch.seen.items():
            assert w.ended is not None
            assert timings[n].total_ms == pytest.approx(1e3 * (w.ended - w.sequence.watch.submitted))
            whole = continuation(w.request.prompt, w.request.max_tokens, WORDS)  # type: ignore[arg-type]
            if w.reason == "deadline":
                assert w.tokens == whole[: len(w.tokens)] and len(w.tokens) < len(whole)
            else:
                assert w.reason == "length" and w.tokens == whole[: 96 - len(w.request.prompt)]
        reasons = [w.reason for w in watch.seen.values()]
        assert min(reasons.count("deadline"), reasons.count("length")) > 100
        assert 20 < len(missed) < REQUESTS / 3
        assert session._scheduler.preempted > 0
        assert_idle(session)


@pytest.mark.parametrize("oracle", [False, True])
def test_without_delays_no_deadline_is_missed(oracle: bool) -> None:
    """Every step takes what steps of its size took before; then too little time is seen beforehand."""
    served, rng = Served(oracle=oracle), random.Random(6)
    with served.session as session:
        served.learn()
        for size in range(1, 25):
            session._scheduler._pace.note(size, cost(size))
        watch = Watch(served)
        while len(watch.seen) < REQUESTS:
            watch.submit_some(rng)
            watch.step()
        watch.finish()
        late = sorted(w.ended - w.due for n, w in watch.seen.items() if n in watch.missed())  # type: ignore[operator]
        assert late == []
        assert not oracle or session.metrics.accepted > 1000
        assert sum(w.reason == "deadline" for w in watch.seen.values()) > 100


def test_only_those_that_a_delay_hits_miss() -> None:
    served = Served()
    with served.session as session:
        served.learn()
        watch = Watch(served)
        safe = watch.submit(Request(prompt=[FIRST] * 5, max_tokens=20, deadline=60.0))
        close = watch.submit(Request(prompt=[FIRST] * 7, max_tokens=20, deadline=2.0))
        for _ in range(5):
            watch.step()
        served.delay = lambda: 2.5
        watch.step()
        served.delay = lambda: 0.0
        watch.finish()
        assert watch.missed() == {close} and session.metrics.missed == 1
        assert (watch.seen[close].reason, watch.seen[safe].reason) == ("deadline", "length")
        assert len(watch.seen[close].tokens) > 3


def test_the_urgent_goes_first_and_priority_before_it() -> None:
    served = Served(sequences=1)
    with served.session:
        served.learn()
        watch = Watch(served)
        order = [
            Request(prompt=[FIRST] * 5, max_tokens=3, priority=3),
            Request(prompt=[FIRST] * 5, max_tokens=3, priority=1, deadline=5.0),
            Request(prompt=[FIRST] * 60, max_tokens=3, deadline=2.02),  # its long prompt leaves it less time
            Request(prompt=[FIRST] * 5, max_tokens=3, deadline=2.0),
            Request(prompt=[FIRST] * 5, max_tokens=3, deadline=4.0),
            Request(prompt=[FIRST] * 5, max_tokens=3),
            Request(prompt=[FIRST] * 5, max_tokens=3),
            Request(prompt=[FIRST] * 5, max_tokens=3, priority=-1, deadline=2.5),
        ]
        # In any order of arrival but for the two that are equal
        numbers = {i: watch.submit(order[i]) for i in (7, 5, 3, 1, 6, 4, 2, 0)}
        watch.finish()
        firsts = [watch.seen[numbers[i]].first for i in range(8)]
        assert None not in firsts and firsts == sorted(firsts)  # type: ignore[type-var]
        assert not watch.missed()


def test_what_cannot_make_it_ends_at_once_and_delays_nobody() -> None:
    firsts, batches = [], []
    for hopeless in (False, True):
        served = Served(sequences=2)
        with served.session:
            served.learn()
            watch = Watch(served)
            ran = len(served.executor.batches)
            number = (
                watch.submit(Request(prompt=[FIRST] * 60, max_tokens=9, deadline=0.03)) if hopeless else 0
            )
            others = [watch.submit(Request(prompt=[FIRST + 1] * n, max_tokens=9)) for n in (5, 40, 9)]
            watch.step()
            if hopeless:
                ended = watch.seen[number]
                assert (ended.reason, ended.tokens, ended.ended) == (
                    "deadline",
                    [],
                    ended.sequence.watch.submitted,
                )
            watch.finish()
            firsts.append([watch.seen[n].first for n in others])
            batches.append([b.tokens.tolist() for b in served.executor.batches[ran:]])
            assert not watch.missed()
    assert firsts[0] == firsts[1] and batches[0] == batches[1]


def test_those_pushed_back_by_an_urgent_one_finish_with_the_right_text() -> None:
    served = Served(sequences=2, pages=8)
    with served.session as session:
        served.learn()
        watch = Watch(served)
        low = [watch.submit(Request(prompt=[FIRST + i] * 20, max_tokens=30)) for i in range(2)]
        for _ in range(8):
            watch.step()
        urgent = watch.submit(Request(prompt=[FIRST + 3] * 9, max_tokens=9, priority=9, deadline=0.3))
        watch.step()
        assert session._scheduler.preempted == 1
        assert watch.seen[urgent].first is not None  # at the very next step
        watch.finish()
        for number in (*low, urgent):
            w = watch.seen[number]
            assert w.tokens == continuation(w.request.prompt, w.request.max_tokens, WORDS)  # type: ignore[arg-type]
        assert not watch.missed()
        assert_idle(session)


@pytest.mark.parametrize("during", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 2, 4, 9])
def test_a_cancel_takes_effect_within_one_step(steps: int, during: bool) -> None:
    """Also one that comes in while a step runs, as from another thread: then at that step's end."""
    served = Served(tokens=8)
    session = served.session
    with session:
        watch = Watch(served)
        number = watch.submit(Request(prompt=[FIRST] * 20, max_tokens=30))
        watch.submit(Request(prompt=[FIRST + 1] * 9, max_tokens=30))
        for _ in range(steps):
            watch.step()
        if during:
            served.delay = lambda: 0.0 * session.cancel(number)
            watch.step()
            served.delay = lambda: 0.0
        else:
            assert session.cancel(number)
        assert [s.id for s in (*session._scheduler.running, *session._scheduler.waiting)] == [number + 1]
        assert number not in session._traffic.live
        check_books(session, served.executor)
        watch.step()
        assert watch.seen[number].reason == "cancelled"
        count = len(watch.seen[number].tokens)
        watch.finish()
        assert len(watch.seen[number].tokens) == count
        assert watch.seen[number + 1].reason == "length"
        assert_idle(session)


def run_all(session: Session) -> dict[int, list[tuple[object, ...]]]:
    """What each request's events say."""
    rng = random.Random(8)
    events: dict[int, list[tuple[object, ...]]] = {number: [] for number in range(1, 41)}
    for i in range(40):
        session.submit(
            Request(
                prompt=[rng.randrange(FIRST, WORDS) for _ in range(rng.randrange(1, 40))],
                max_tokens=10,
                deadline=3600.0 if i % 2 else None,
            )
        )
    while session.in_flight:
        for e in session.step():
            events[e.request].append((e.text, e.token, e.finish_reason))
    return events


def test_an_hour_forth_and_back_on_the_wall_clock_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the session's own clock: a deadline of an hour is neither met nor moved by it."""
    session, executor = make_session(sequences=4, pages=24)
    executor.words = WORDS
    with session:
        before = run_all(session)
        assert session.metrics.finished == {"length": 40}
    shifts = iter(range(10**6))
    real, real_ns = time.time, time.time_ns

    def shift() -> int:
        return 3600 if next(shifts) % 2 else -3600

    monkeypatch.setattr(time, "time", lambda: real() + shift())
    monkeypatch.setattr(time, "time_ns", lambda: real_ns() + shift() * 10**9)
    session, executor = make_session(sequences=4, pages=24)
    executor.words = WORDS
    with session:
        assert run_all(session) == before
        figures = session.metrics
        assert figures.missed == 0 and figures.finished == {"length": 40}
        assert 0 <= figures.snapshot()["itl_p99_ms"] < 60_000  # type: ignore[operator]


def wall_clocks(source: str) -> list[str]:
    """Uses of a clock that people set."""
    found = []
    names = {
        "time",
        "time_ns",
        "ctime",
        "localtime",
        "gmtime",
        "strftime",
        "clock_gettime",
        "clock_gettime_ns",
    }
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "time" and node.attr in names:
                found.append(f"time.{node.attr}")
            elif node.attr in ("now", "utcnow", "today"):
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.ImportFrom) and node.module == "time":
            found += [f"time.{alias.name}" for alias in node.names if alias.name in names]
    return found


def test_no_module_of_the_runtime_or_the_nodes_reads_the_wall_clock() -> None:
    """But for the date that a chat template may ask for, which is what it is for."""
    found = {
        str(path.relative_to(ROOT)): uses
        for folder in ("edge_runtime", "ros2_nodes")
        for path in (ROOT / folder).rglob("*.py")
        if (uses := wall_clocks(path.read_text(encoding="utf-8")))
    }
    assert found == {"edge_runtime/serving/template_worker.py": ["datetime.now"]}
    sample = "import time\nfrom time import time_ns\nfrom datetime import datetime as d\ntime.time(); d.now()"
    assert sorted(wall_clocks(sample)) == ["d.now", "time.time", "time.time_ns"]
