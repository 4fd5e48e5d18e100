"""How long things take that are done again and again: the clock of `edge-bench --calibrate`."""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

from edge_runtime.cli.measure import run
from edge_runtime.cli.workload import RandomTokens
from edge_runtime.serving.session import Session

DECODE = 16  # tokens written to time a step: few, so that a busy machine lets some runs be
_ALIKE, _NEAR = 3, 1.03  # so many times within this factor, and a time is believed
Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Timer:
    """Seconds of what is done again and again: the fastest, once it was met three times within 3% or after
    `limit_s`. A model of speed knows no other load, and the fastest has met the least of it."""

    threads: int
    limit_s: float = 1.0
    clock: Callable[[], float] = perf_counter

    def fastest(self, work: Work, times: int = 1, *, patient: bool = False) -> float:
        """The least seconds of something, the mean of `times` in a row. `patient`: until the limit in any
        case, for what other programs slow down evenly."""

        def row() -> None:
            for _ in range(times):
                work()

        return self.each([row], patient=patient)[0][0] / times

    def each(self, works: Sequence[Work], *, patient: bool = False) -> list[list[float]]:
        """Seconds of several things in turn, each ascending, so that a difference of two is not what came
        between them."""
        taken: list[list[float]] = [[] for _ in works]
        start = perf_counter()
        while len(taken[0]) < _ALIKE or perf_counter() - start < len(works) * self.limit_s:
            for work, times in zip(works, taken, strict=True):
                began = self.clock()
                work()
                insort(times, self.clock() - began)
            alike = all(times[_ALIKE - 1] <= _NEAR * times[0] for times in taken if len(times) >= _ALIKE)
            if not patient and len(taken[0]) >= 2 * _ALIKE and alike:
                break
        return taken


def session_seconds(session: Session, clock: Timer, prompt: int, depth: int) -> tuple[float, float]:
    """A request for one token after `prompt` tokens that no cache knows; a decoding step behind `depth`."""
    first, shortest, longest = session_times(session, clock, prompt, depth)
    return first, (longest - shortest) / DECODE


def session_times(session: Session, clock: Timer, prompt: int, depth: int) -> tuple[float, float, float]:
    """That request; then requests for one token and for DECODE more behind `depth`, whose difference decoding
    is."""
    draw = RandomTokens(session)
    run(session, draw(min(8, depth)), 2)  # warm
    known = draw(depth)  # after its first run it is cached, and what is left to time is decoding
    run(session, known, 1)
    behind = [lambda: run(session, known, 1), lambda: run(session, known, 1 + DECODE)]
    shortest, longest = (times[0] for times in clock.each(behind, patient=True))
    return clock.fastest(lambda: run(session, draw(prompt), 1)), shortest, longest
