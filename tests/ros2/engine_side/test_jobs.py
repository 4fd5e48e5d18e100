"""Jobs: bounded, refusing at once, one end each whatever the engine does."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from edge_nodes.engine import Listener as EngineListener
from edge_nodes.job import Ended, Figures, Job, Progress
from edge_nodes.jobs import GRACE, Jobs, Refusal
from listener import Listener

from edge_runtime import BadRequest

JOB = Job(prompt="x")


class ScriptedEngine:
    """An engine whose events the test makes. answers_cancel: whether it ends what is cancelled."""

    def __init__(self, *, answers_cancel: bool = True) -> None:
        self.state: Any = "open"
        self.why = ""
        self.listeners: dict[int, EngineListener] = {}
        self.cancelled: list[int] = []
        self._answers = answers_cancel

    def submit(self, number: int, job: Job, listener: EngineListener) -> None:
        self.listeners[number] = listener

    def cancel(self, number: int) -> None:
        self.cancelled.append(number)
        if self._answers:
            self.end(number, "cancelled")

    def end(self, number: int, reason: Any = "stop", **fields: Any) -> None:
        self.listeners[number](Ended(number=number, reason=reason, **fields))


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture
def jobs(engine: ScriptedEngine) -> Iterator[Jobs]:
    jobs = Jobs(engine, limit=3)  # type: ignore[arg-type]
    jobs.accept()
    yield jobs
    jobs.close()


def start(jobs: Jobs, job: Job = JOB) -> tuple[int, Listener]:
    listener = Listener()
    return jobs.start(job, listener, listener), listener


def test_events_reach_the_one_who_started(jobs: Jobs, engine: ScriptedEngine) -> None:
    ticket, listener = start(jobs)
    engine.listeners[ticket](Progress(number=ticket, text="a", tokens=(1,)))
    engine.end(ticket)
    assert listener.text == "a" and listener.wait().reason == "stop"
    assert jobs.counts().ended == {"stop": 1} and jobs.counts().outstanding == 0


def test_beyond_the_limit_none_is_taken(jobs: Jobs, engine: ScriptedEngine) -> None:
    tickets = [start(jobs)[0] for _ in range(3)]
    begun = time.monotonic()
    for _ in range(100):
        with pytest.raises(Refusal, match="3 goals are under way") as refused:
            jobs.admit()
    assert (time.monotonic() - begun) / 100 < 0.010  # the bound, by far
    assert refused.value.code == "queue_full"
    engine.end(tickets[1])
    jobs.admit()
    assert jobs.counts().refused == {"queue_full": 100}


def test_none_is_taken_before_accept_and_while_the_engine_is_lost(engine: ScriptedEngine) -> None:
    jobs = Jobs(engine, limit=3)  # type: ignore[arg-type]
    with pytest.raises(Refusal) as refused:
        jobs.admit()
    assert refused.value.code == "inactive"
    jobs.accept()
    engine.state, engine.why = "lost", "its process ended"
    with pytest.raises(Refusal, match="its process ended") as refused:
        jobs.admit()
    assert refused.value.code == "restarting"
    jobs.close()


def test_a_wrong_job_is_found_without_the_engine(jobs: Jobs) -> None:
    with pytest.raises(BadRequest, match="empty"):
        jobs.check(Job())
    with pytest.raises(BadRequest, match="top_p"):
        jobs.check(Job(prompt="x", top_p=2.0))
    jobs.check(JOB)


def test_a_job_ends_once_whatever_comes_after(jobs: Jobs, engine: ScriptedEngine) -> None:
    ticket, listener = start(jobs)
    engine.end(ticket)
    engine.end(ticket, "cancelled")
    engine.listeners[ticket](Progress(number=ticket, text="late", tokens=(1,)))
    assert len(listener.ends) == 1 and listener.text == ""
    assert jobs.counts().ended == {"stop": 1}


def test_an_engine_that_says_nothing_does_not_make_a_deadline_silent() -> None:
    engine = ScriptedEngine(answers_cancel=False)
    jobs = Jobs(engine, limit=3)  # type: ignore[arg-type]
    jobs.accept()
    begun = time.monotonic()
    ticket, listener = start(jobs, Job(prompt="x", deadline=0.1))
    _, other = start(jobs)
    end = listener.wait()
    assert end.reason == "deadline" and 0.1 + GRACE <= time.monotonic() - begun < 0.1 + GRACE + 1.0
    assert engine.cancelled == [ticket] and not other.ends
    assert jobs.counts().missed == 1
    jobs.end_all("over", 0.1)
    jobs.close()


def test_misses_are_counted_as_the_engine_tells_them(jobs: Jobs, engine: ScriptedEngine) -> None:
    for missed in (True, False, True):
        ticket, _ = start(jobs)
        engine.end(ticket, figures=Figures(missed=missed))
    assert jobs.counts().missed == 2


@pytest.mark.parametrize("answers", [True, False])
def test_end_all_ends_all_and_takes_no_more(answers: bool) -> None:
    engine = ScriptedEngine(answers_cancel=answers)
    jobs = Jobs(engine, limit=3)  # type: ignore[arg-type]
    jobs.accept()
    listeners = [start(jobs)[1] for _ in range(3)]
    jobs.end_all("the node was deactivated", 0.2)
    wanted = ("cancelled", "") if answers else ("error", "engine_lost")
    assert {(x.wait().reason, x.wait().code) for x in listeners} == {wanted}
    with pytest.raises(Refusal, match="deactivated"):
        jobs.admit()
    jobs.accept()
    jobs.admit()
    jobs.close()


def test_ends_that_race_are_one(engine: ScriptedEngine) -> None:
    jobs = Jobs(engine, limit=2000)  # type: ignore[arg-type]
    jobs.accept()
    started = [start(jobs) for _ in range(500)]

    def finish(reason: str) -> None:
        for ticket, _ in started:
            engine.end(ticket, reason)

    threads = [threading.Thread(target=finish, args=(r,)) for r in ("stop", "cancelled", "length")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(listener.ends) == 1 for _, listener in started)
    assert sum(jobs.counts().ended.values()) == 500
    jobs.close()


def test_closed_books_leave_no_thread(engine: ScriptedEngine) -> None:
    threads = threading.active_count()
    for _ in range(50):
        Jobs(engine, limit=1).close()  # type: ignore[arg-type]
    assert threading.active_count() == threads
