"""A clock that only moves when a step is run, and executors that say what their steps cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from edge_runtime.backends.chain import run_chain
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.plan import KvPlan, StepShape


class FakeClock:
    """Seconds, from an odd beginning on."""

    def __init__(self) -> None:
        self.now = 1234.5

    def __call__(self) -> float:
        return self.now


class Timed(HostLogits):
    """Any executor whose steps take `cost(tokens)` seconds of a fake clock."""

    def __init__(self, executor: Any, clock: FakeClock, cost: Callable[[int], float]) -> None:
        self.executor, self.clock, self.cost = executor, clock, cost
        self.spent = 0.0

    def forward(self, batch: StepBatch) -> np.ndarray:
        seconds = self.cost(len(batch.tokens))
        self.clock.now += seconds
        self.spent += seconds
        logits: np.ndarray = self.executor.forward(batch)
        return logits

    def chain(self, batch: StepBatch, count: int) -> np.ndarray:
        return run_chain(self, batch, count)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)


class Parrot(HostLogits):
    """An executor without a memory: after each token comes one that depends on it alone, so steps are cheap.

    wrong(): whether this row says another token; a draft model's, say.
    """

    page_nbytes = 1
    memory_bytes = 0

    def __init__(self, kv: KvPlan, step: StepShape, vocab: int) -> None:
        self.step, self.vocab = step, vocab
        self.wrong: Callable[[], bool] = lambda: False
        self.steps = 0

    def after(self, token: int) -> int:
        return 5 + (token * 7 + 3) % (self.vocab - 5)

    def forward(self, batch: StepBatch) -> np.ndarray:
        assert len(batch.tokens) <= self.step.tokens and len(batch.logit_rows) <= self.step.logits
        self.steps += 1
        logits = np.zeros((len(batch.logit_rows), self.vocab), np.float32)
        for i, t in enumerate(batch.logit_rows.tolist()):
            token = self.after(int(batch.tokens[t]))
            logits[i, 5 + (token - 4) % (self.vocab - 5) if self.wrong() else token] = 1.0
        return logits

    def chain(self, batch: StepBatch, count: int) -> np.ndarray:
        return run_chain(self, batch, count)

    def copy_page(self, source: int, target: int) -> None:
        pass

    def close(self) -> None:
        pass
