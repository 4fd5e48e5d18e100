"""Guesses of extra heads on the target's last hidden row, verified as a tree (Cai et al. 2024, Medusa).

Head k guesses the k-th token after the last one. The tree holds the likeliest paths through the heads' top
tokens, by the product of their probabilities, as many nodes as are asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as Seq
from time import perf_counter

import numpy as np

from edge_runtime.backends.likeliest import top_indices
from edge_runtime.backends.protocol import Executor, StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.errors import NumericError
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.sampling import masked
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.verification import Proposal

NODES = (2, 4, 8, 12, 16, 24)  # of a tree
_WIDEST = 8  # tokens of a head that may become nodes
_FADE = 0.9


class MedusaHeads:
    """One executor for each head, in order, each a Program from a hidden row to logits.

    most: nodes of a tree at most. trees: False asks for the likeliest path alone, for KV caches that hold no
    trees.
    """

    name = "medusa"

    def __init__(
        self, executors: Seq[Executor], *, most: int, trees: bool = True, clock: Clock = perf_counter
    ) -> None:
        chain = tuple(range(1, min(len(executors), most) + 1))
        self.lengths = (*(n for n in NODES if n < most), most) if trees else chain
        self.pace = Pace()
        self._executors = list(executors)
        self._trees = trees
        self._clock = clock
        self._hoped = 1.0  # tokens that trees of late were to bring, and brought: fading sums
        self._brought = 1.0
        self._mass: dict[int, float] = {}  # nodes -> sum of their probabilities, of late

    def ready(self, sequence: Sequence) -> int:
        return 0 if sequence.hidden is None else self.lengths[-1]

    def tokens(self, sequence: Sequence, length: int, usual: float) -> float:
        mass = self._mass.get(length, 0.5 * len(self._executors) * length / (length + 2.0))
        return 1.0 + mass * self._brought / self._hoped

    def cost(self, sequences: Seq[Sequence], length: int) -> tuple[float, float]:
        return self.pace.predict(len(sequences)), 0.0

    def seconds(self, length: int) -> float:
        return self.pace.predict(1)

    def propose(self, asks: Seq[tuple[Sequence, int]]) -> list[Proposal | None]:
        begin = self._clock()
        rows = np.stack([s.hidden for s, _ in asks if s.hidden is not None])  # (S, width); all have one
        count = len(asks)
        batch = StepBatch(
            tokens=np.zeros(count, np.int32),
            positions=np.zeros(count, np.int32),
            sequence=np.arange(count, dtype=np.int32),
            page_tables=np.zeros((count, 1), np.int32),
            logit_rows=np.arange(count, dtype=np.int32),
            inputs=rows,
        )
        logits = [executor.forward(batch) for executor in self._executors]  # of each head (S, vocab)
        trees: list[Proposal | None] = [
            self._tree(s, n, [head[i] for head in logits]) for i, (s, n) in enumerate(asks)
        ]
        self.pace.note(count, self._clock() - begin)
        return trees

    def settle(self, sequence: Sequence, proposal: Proposal | None, accepted: int) -> None:
        if proposal is not None:
            self._hoped = _FADE * self._hoped + proposal.hoped
            self._brought = _FADE * self._brought + accepted

    def warm_up(self, sequences: int) -> None:
        for executor in self._executors:
            executor.warm_up(range(1, sequences + 1))

    def forget(self) -> None:
        self.pace = Pace()
        self._hoped = self._brought = 1.0
        self._mass = {}

    @property
    def memory_bytes(self) -> int:
        return sum(executor.memory_bytes for executor in self._executors)

    def copy_page(self, source: int, target: int) -> None:
        pass  # heads have no cache

    def close(self) -> None:
        for executor in self._executors:
            executor.close()

    def _tree(self, sequence: Sequence, nodes: int, heads: list[Array]) -> Proposal:
        """The likeliest `nodes` nodes: best first, over each head's own distribution."""
        tops: list[list[tuple[float, int]]] = []
        for depth, logits in enumerate(heads):
            if depth == 0 and sequence.sampler.constraint is not None:
                logits = masked(logits, sequence.sampler.constraint.mask())
            tops.append(_likeliest(logits, _WIDEST if self._trees else 1))
        if not all(tops):
            raise NumericError("the logits of a Medusa head hold NaN or Inf")
        heap = [(-tops[0][0][0], -1, 0, 0)]  # (-log of the path's probability, parent, depth, rank)
        tokens: list[int] = []
        parents: list[int] = []
        mass = 0.0
        while heap and len(tokens) < nodes:
            cost, parent, depth, rank = heapq.heappop(heap)
            log, token = tops[depth][rank]
            tokens.append(token)
            parents.append(parent)
            mass += float(np.exp(-cost))
            if rank + 1 < len(tops[depth]):
                heapq.heappush(heap, (cost + log - tops[depth][rank + 1][0], parent, depth, rank + 1))
            if depth + 1 < len(tops):
                heapq.heappush(heap, (cost - tops[depth + 1][0][0], len(tokens) - 1, depth + 1, 0))
        old = self._mass.get(nodes)
        self._mass[nodes] = mass if old is None else _FADE * old + (1 - _FADE) * mass
        return Proposal(tokens, parents if self._trees else None, hoped=mass)


def _likeliest(logits: Array, count: int) -> list[tuple[float, int]]:
    """(log probability, token) of the likeliest tokens after logits f32 (vocab,), likeliest first.

    In f32: guesses need no more, and vocabularies are long. Raises NumericError on NaN or +Inf.
    """
    top = logits.max()
    if not np.isfinite(top):
        raise NumericError("the logits of a Medusa head hold NaN or Inf")
    total = float(top) + float(np.log(np.exp(logits - top).sum()))
    best = top_indices(logits, count)
    return [(float(logits[i]) - total, int(i)) for i in best if np.isfinite(logits[i])]
