"""Jobs: a node's book of goals, for every kind of node: bounded, refusing at once, each ending once."""

from __future__ import annotations

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from edge_nodes.engine import Engine
from edge_nodes.job import Ended, Event, Job, Progress
from edge_nodes.requests import check_job

GRACE = 0.5  # seconds after its deadline that a job is given up, should the engine say nothing
Ticket = int


class Refusal(Exception):
    """A goal is not taken. code: inactive, queue_full or restarting, for a client to act on."""

    def __init__(self, code: str, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True, slots=True)
class Counts:
    """ended: by reason. refused: by code. missed: jobs whose end came after their deadline."""

    outstanding: int
    limit: int
    missed: int
    ended: dict[str, int] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)


class _Entry:
    __slots__ = ("due", "on_end", "on_progress")

    def __init__(
        self, due: float | None, on_progress: Callable[[Progress], None], on_end: Callable[[Ended], None]
    ) -> None:
        self.due = due
        self.on_progress = on_progress
        self.on_end = on_end


class Jobs:
    """Listeners are called on threads of the engine, or of the watchdog, and never under a lock."""

    def __init__(self, engine: Engine, *, limit: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._engine = engine
        self._limit = limit
        self._clock = clock
        self._entries: dict[Ticket, _Entry] = {}
        self._change = threading.Condition()
        self._numbers = itertools.count(1)
        self._closed_why = "the node is not active"
        self._accepting = False
        self._over = False
        self._missed = 0
        self._ended: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()
        self._watchdog = threading.Thread(target=self._watch, name="deadlines", daemon=True)
        self._watchdog.start()

    def accept(self) -> None:
        with self._change:
            self._accepting = True

    def admit(self) -> None:
        """Raises Refusal when no job is taken now. Waits for nothing."""
        try:
            self._check()
        except Refusal as refusal:
            self._refused[refusal.code] += 1
            raise

    def check(self, job: Job) -> None:
        """Raises BadRequest for what is wrong with the job itself."""
        check_job(job)

    def start(
        self, job: Job, on_progress: Callable[[Progress], None], on_end: Callable[[Ended], None]
    ) -> Ticket:
        """Hand a job to the engine; on_end is called exactly once, perhaps before this returns."""
        due = None if job.deadline is None else self._clock() + job.deadline + GRACE
        with self._change:
            ticket = next(self._numbers)
            self._entries[ticket] = _Entry(due, on_progress, on_end)
            self._change.notify_all()
        self._engine.submit(ticket, job, self._hear)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        self._engine.cancel(ticket)

    def end_all(self, why: str, timeout: float) -> None:
        """Take no more, cancel all, and wait; what the engine does not end in time is ended here."""
        with self._change:
            self._accepting, self._closed_why = False, why
            tickets = list(self._entries)
        for ticket in tickets:
            self._engine.cancel(ticket)
        due = time.monotonic() + timeout
        with self._change:
            while self._entries and time.monotonic() < due:
                self._change.wait(max(0.0, due - time.monotonic()))
            left = list(self._entries)
        for ticket in left:
            self._end(Ended(number=ticket, reason="error", error=why, code="engine_lost"))

    def counts(self) -> Counts:
        with self._change:
            return Counts(
                len(self._entries), self._limit, self._missed, dict(self._ended), dict(self._refused)
            )

    def close(self) -> None:
        with self._change:
            self._over = True
            self._accepting = False
            self._change.notify_all()
        if self._watchdog is not threading.current_thread():
            self._watchdog.join()

    def _check(self) -> None:
        with self._change:
            if not self._accepting:
                raise Refusal("inactive", self._closed_why)
            if len(self._entries) >= self._limit:
                raise Refusal(
                    "queue_full", f"{len(self._entries)} goals are under way; try again when one ended"
                )
        if self._engine.state != "open":
            raise Refusal("restarting", f"the engine is {self._engine.state}: {self._engine.why}")

    def _hear(self, event: Event) -> None:
        if isinstance(event, Progress):
            with self._change:
                entry = self._entries.get(event.number)
            if entry is not None:
                entry.on_progress(event)
        else:
            self._end(event)

    def _end(self, ended: Ended) -> None:
        with self._change:
            entry = self._entries.pop(ended.number, None)
            if entry is None:
                return  # given up before
            self._ended[ended.reason] += 1
            self._missed += ended.figures.missed or ended.reason == "deadline"
            self._change.notify_all()
        entry.on_end(ended)

    def _watch(self) -> None:
        while True:
            with self._change:
                if self._over:
                    return
                now = self._clock()
                late = [t for t, e in self._entries.items() if e.due is not None and e.due <= now]
                if not late:
                    dues = [e.due for e in self._entries.values() if e.due is not None]
                    self._change.wait(max(0.0, min(dues) - now) if dues else None)
            for ticket in late:
                self._engine.cancel(ticket)
                why = "the engine did not answer in time"
                self._end(Ended(number=ticket, reason="deadline", error=why))
