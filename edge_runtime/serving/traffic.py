"""Requests in flight, and the threads that drive them: one at a time runs the steps, for all.

Several threads may put sequences in line, cancel them and wait for their events.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edge_runtime.errors import BadRequest, QueueFull
from edge_runtime.serving.loop import Loop
from edge_runtime.serving.metrics import Metrics
from edge_runtime.serving.request import Token
from edge_runtime.serving.scheduler import Scheduler
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.stream import Stream

_WAIT = 0.05  # seconds until a thread that waits for another one's steps looks whether it should drive them


class Traffic:
    """`live`: sequences that have not ended, by number."""

    def __init__(self, scheduler: Scheduler, metrics: Metrics) -> None:
        self.live: dict[int, Sequence] = {}
        self.closed = False
        self._scheduler = scheduler
        self._metrics = metrics
        self._loop: Loop | None = None
        # Reentrant, for a dropped Stream may cancel at any point; submitting and the set of live requests
        self.gate = threading.RLock()
        self._turn = threading.Lock()  # held by whoever drives a step
        self._stepped = threading.Condition()
        self._unread: deque[Token] = deque()  # events of sequences that nobody streams
        self._cancels = False

    def drive(self, loop: Loop) -> None:
        """The loop whose steps are run; it emits into `emit`."""
        self._loop = loop

    def join(self, sequence: Sequence, prepare: Callable[[], None]) -> None:
        """Put a sequence in line. prepare: run first, while no adapter goes. Raises QueueFull, BadRequest."""
        with self.gate:
            self.check_open()
            prepare()
            try:
                self._scheduler.submit(sequence)
            except QueueFull:
                self._metrics.refused += 1
                raise
            self.live[sequence.id] = sequence
            self._metrics.prompt_tokens += sequence.prompt_tokens

    def step(self) -> list[Token]:
        """Run one step; what is new of sequences that nobody streams."""
        self._turn.acquire()
        try:
            self.check_open()
            self._run()
            events = list(self._unread)
            self._unread.clear()
        finally:
            self._end_turn()
        return events

    def cancel(self, number: int) -> bool:
        """End a sequence at the end of the running step; False when it had ended already.

        Takes no lock that another thread may hold for long: a Stream that the garbage collector drops comes
        here from any line of code, also from where the scheduler's line is held.
        """
        sequence = self.live.get(number)
        if sequence is None:
            return False
        sequence.cancelled = True
        self._cancels = True  # after the mark, as `_sweep` looks at the marks after this
        if self._turn.acquire(blocking=False):  # else whoever drives does it when the running step ends
            self._end_turn()
        return True

    def stream(self, sequence: Sequence) -> Stream:
        """The iterator over a sequence's events, which drives the steps while it waits."""
        events = sequence.events
        assert events is not None  # whoever wants a stream gave it one
        return Stream(sequence.id, events, lambda: self._wait_for(events), self.cancel)

    def emit(self, sequence: Sequence, event: Token) -> None:
        """Hand an event out; with the last one all that the sequence holds is free."""
        if event.finish_reason is not None:
            with self.gate:
                self._scheduler.remove(sequence)
                self.live.pop(sequence.id, None)
            self._metrics.end(sequence.watch, event.finish_reason, sequence.cached)
            event = sequence.closed(event)
        (self._unread if sequence.events is None else sequence.events).append(event)

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Nothing runs meanwhile. Raises BadRequest when the session is closed."""
        self._turn.acquire()
        try:
            self.check_open()
            yield
        finally:
            self._end_turn()

    def close(self) -> bool:
        """End everything as cancelled; False when that was done before."""
        with self._turn:
            if self.closed:
                return False
            with self.gate:
                self.closed = True
                for sequence in self.live.values():
                    sequence.cancelled = True
                self._cancels = True
            self._sweep()
            return True

    def check_open(self) -> None:
        if self.closed:
            raise BadRequest("this session is closed; open the engine again")

    def _wait_for(self, events: deque[Token]) -> None:
        """Run a step, or wait for the one that another thread runs."""
        if self._turn.acquire(blocking=False):
            try:
                if not events:  # the driver before us may have filled it
                    self.check_open()
                    self._run()
            finally:
                self._end_turn()
        else:
            with self._stepped:
                if not events:
                    self._stepped.wait(_WAIT)

    def _end_turn(self) -> None:
        """Let another thread drive; a cancel that came in meanwhile and found the turn taken is done here."""
        self._turn.release()
        with self._stepped:
            self._stepped.notify_all()
        while self._cancels and self._turn.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._turn.release()

    def _run(self) -> None:
        assert self._loop is not None  # the session gave it
        self._sweep()
        self._loop.step()

    def _sweep(self) -> None:
        """End the requests that were cancelled since the last step."""
        if not self._cancels:
            return
        with self.gate:
            self._cancels = False
            cancelled = [s for s in self.live.values() if s.cancelled]
        assert self._loop is not None
        for sequence in cancelled:
            self._loop.end(sequence, "cancelled")
