"""Times on the GPU: CUDA events around graph launches, warm, medians of interleaved rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from edge_runtime.backends.cuda.driver import Driver, Event, Graph, Launch

SAMPLE_MS = 8.0  # of one timed stretch
MOST = 200  # repeats of a job in it


@dataclass(frozen=True, slots=True)
class Timed:
    """Milliseconds of a job: median, least and greatest of the rounds."""

    ms: float
    least: float
    most: float


def graph_of(driver: Driver, launches: Sequence[Launch]) -> Graph:
    """One graph of launches in their order."""
    with driver.capture() as graph:
        for launch in launches:
            driver.run(launch)
    return graph


def gpu_ms(driver: Driver, job: Callable[[], object], repeats: int = 1) -> float:
    """Milliseconds that the GPU takes from before to after `repeats` of a job, each."""
    first, last = _events(driver)
    driver.record(first)
    for _ in range(repeats):
        job()
    driver.record(last)
    return driver.elapsed_ms(first, last) / repeats


@dataclass(frozen=True, slots=True)
class Job:
    """Work for the stream, and what must be queued before a stretch of it, outside the time."""

    run: Callable[[], object]
    before: Callable[[], object] | None = None


def interleaved(driver: Driver, jobs: Mapping[str, Job], rounds: int, deadline: float) -> dict[str, Timed]:
    """Each job in each round, after one that warms up; fewer rounds where time (time.monotonic) runs out."""
    seen: dict[str, list[float]] = {name: [] for name in jobs}
    repeats = dict.fromkeys(jobs, 1)
    for turn in range(-2, rounds):
        if turn > 0 and time.monotonic() > deadline:
            break
        for name, job in jobs.items():
            if job.before is not None:
                job.before()
            ms = gpu_ms(driver, job.run, repeats[name])
            if turn < 0:
                repeats[name] = max(1, min(MOST, round(SAMPLE_MS / max(ms, 1e-3))))
            else:
                seen[name].append(ms)
    return {name: Timed(statistics.median(ms), min(ms), max(ms)) for name, ms in seen.items()}


_MADE: dict[str, Any] = {}


def _events(driver: Driver) -> tuple[Event, Event]:
    """Two events of a driver, made once."""
    if _MADE.get("driver") is not driver:
        _MADE.update(driver=driver, events=(driver.event(), driver.event()))
    events: tuple[Event, Event] = _MADE["events"]
    return events
