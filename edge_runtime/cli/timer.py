"""How long things take that are done again and again: the clock of `edge-bench --calibrate`."""

from __future__ import annotations

import statistics
from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from edge_runtime.backends.protocol import Executor, Part, StepBatch
from edge_runtime.cli import synthetic
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program
from edge_runtime.serving.device import get_backend

CHUNK = 128  # tokens of a step of a prompt, as plans have it
_ALIKE, _NEAR = 3, 1.03  # so many times within this factor, and a time is believed
_NO_PAGES = np.full((1, 1), -1, np.int32)


@dataclass(frozen=True, slots=True)
class Timer:
    """Seconds of what is done again and again: the fastest, once it was met three times within 3% or after
    `limit_s`; or the median."""

    threads: int
    limit_s: float = 1.0
    clock: Callable[[], float] = perf_counter

    def load(self, program: Program, fmt: str, k: str = "int8", v: str = "int8") -> tuple[Executor, KvPlan]:
        step = StepShape(context=program.max_context, sequences=1, tokens=CHUNK, logits=1)
        kv = synthetic.cache_of(program, k, v, step)
        weights = synthetic.weights_of(program, synthetic.plans_of(program, fmt))
        backend = get_backend("cpu")
        return backend.load(Part(program, weights, kv, step), threads=self.threads), kv

    def seconds(
        self, executor: Executor, kv: KvPlan, tokens: int, before: int = 0, *, patient: bool = False
    ) -> float:
        """One step of `tokens` tokens after `before`."""
        return self.fastest(step_of(executor, kv, tokens, before), patient=patient)

    def program(self, program: Program, fmt: str, tokens: int, *, patient: bool = False) -> float:
        """A step through a program. Never two at once: threads of one wait on cores that the other needs."""
        executor, kv = self.load(program, fmt)
        seconds = self.seconds(executor, kv, tokens, patient=patient)
        executor.close()
        return seconds

    def fastest(self, work: Callable[[], object], *, patient: bool = False) -> float:
        """The least seconds of something done again and again; `patient`: until the limit in any case,
        for what other programs slow down evenly."""
        return self.each([work], patient=patient)[0][0]

    def usual(self, work: Callable[[], object]) -> float:
        """The median, for what is so short that threads only get in each other's way: it is fastest when one
        of them is kept from its work, and that is not how it goes."""
        return statistics.median(self.each([work], patient=True)[0])

    def each(self, works: Sequence[Callable[[], object]], *, patient: bool = False) -> list[list[float]]:
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


def step_of(executor: Executor, kv: KvPlan, tokens: int, before: int = 0) -> Callable[[], object]:
    """A step of `tokens` tokens after `before`, to be done again and again."""
    batch = StepBatch(
        tokens=np.arange(tokens, dtype=np.int32) % synthetic.VOCAB,
        positions=np.arange(before, before + tokens, dtype=np.int32),
        sequence=np.zeros(tokens, np.int32),
        page_tables=np.arange(max(1, kv.pages), dtype=np.int32)[None, :] if kv.pages else _NO_PAGES,
        logit_rows=np.array([tokens - 1], np.int32),
    )
    executor.forward(batch)  # warms up, and checks the batch
    return lambda: executor.forward(batch)
