"""Measures the forms of a part's products on the device: short, each on all matrices of its shape in turn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

import numpy as np

from edge_runtime.backends.cuda import records as rec
from edge_runtime.backends.cuda.driver import Driver, Launch
from edge_runtime.backends.cuda.launcher import Launcher
from edge_runtime.backends.cuda.tuning import Form, candidates
from edge_runtime.engine.launches import LinearLaunch, Lowered

ROUNDS = 5
LAUNCHES = 24  # of a form in a round, at least

Watch = Callable[[str, Form, float], None]  # product, form, microseconds a launch


class Tuner:
    """Of a loaded part; its buffers hold no step's values afterwards."""

    def __init__(self, driver: Driver, launcher: Launcher, lowered: Lowered, counts: int) -> None:
        """counts: address of the running step's counts."""
        self._driver = driver
        self._launcher = launcher
        self._lowered = lowered
        self._counts = counts

    def run(self, sizes: list[int], watch: Watch | None = None) -> dict[str, Form]:
        """The fastest form of each product, for steps of these sizes."""
        best: dict[str, Form] = {}
        for size in sizes:
            counts = np.zeros(rec.COUNTS, np.int32)
            counts[rec.TOKENS] = counts[rec.LOGITS] = size
            self._driver.upload(self._counts, counts)
            for key, rows, launches in self._products(size):
                if key in best:
                    continue
                times: dict[Form, list[float]] = {form: [] for form in candidates(rows)}
                made = {form: self._made(launches, rows, form) for form in times}
                for _ in range(ROUNDS + 1):
                    for form, found in made.items():  # one after the other, so that a slow spell hits all
                        times[form].append(self._time(found))
                middle = {form: median(found[1:]) for form, found in times.items()}
                best[key] = min(middle, key=lambda form: middle[form])
                if watch is not None:
                    for form, took in middle.items():
                        watch(key, form, took)
        return best

    def _products(self, size: int) -> Iterator[tuple[str, int, list[LinearLaunch]]]:
        """(name, rows of inputs, launches) of the products of one shape."""
        found: dict[str, tuple[int, list[LinearLaunch]]] = {}
        for launch in self._lowered.launches:
            if isinstance(launch, LinearLaunch):
                rows = self._launcher.rows_of(launch, size)
                found.setdefault(self._launcher.key_of(launch, rows), (rows, []))[1].append(launch)
        for key, (rows, launches) in found.items():
            yield key, rows, launches

    def _made(self, launches: list[LinearLaunch], rows: int, form: Form) -> list[Launch]:
        turns = -(-LAUNCHES // len(launches))
        return [self._launcher.product(launch, rows, form) for launch in launches] * turns

    def _time(self, launches: list[Launch]) -> float:
        """Microseconds a launch."""
        first, last = self._driver.event(), self._driver.event()
        self._driver.record(first)
        for launch in launches:
            self._driver.run(launch)
        self._driver.record(last)
        return 1000.0 * self._driver.elapsed_ms(first, last) / len(launches)
