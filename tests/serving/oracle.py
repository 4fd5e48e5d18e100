"""A proposer that knows the answer: chains or trees of guesses, right as often as it is told to be."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from edge_runtime.serving.gate import expected
from edge_runtime.serving.sequence import Sequence as Served
from edge_runtime.serving.verification import Proposal

Answer = Callable[[Served, int], list[int]]  # the next tokens that plain decoding will bring


class Oracle:
    """chance: that a guess after right ones is right too; words: tokens that wrong guesses are drawn from.

    A tree holds true and false branches, in any order in which parents come first.
    """

    name = "oracle"

    def __init__(self, answer: Answer, chance: float, words: range, *, trees: bool, longest: int = 8) -> None:
        self.lengths = tuple(range(1, longest + 1))
        self.closed = False
        self.strict = True  # all right guesses must stand, unless the answer ends among them
        self.best: dict[int, int] = {}  # request -> guesses of its last proposal that are right
        self._answer = answer
        self._chance = chance
        self._words = words
        self._trees = trees
        self._random = random.Random(1)

    def ready(self, sequence: Served) -> int:
        return self.lengths[-1]

    def tokens(self, sequence: Served, length: int, usual: float) -> float:
        return expected(sequence.record.chance(usual), length)

    def cost(self, sequences: Sequence[Served], length: int) -> tuple[float, float]:
        return 0.0, 0.0

    def seconds(self, length: int) -> float:
        return 0.0

    def propose(self, asks: Sequence[tuple[Served, int]]) -> list[Proposal | None]:
        return [self._propose(sequence, length) for sequence, length in asks]

    def _propose(self, sequence: Served, length: int) -> Proposal | None:
        rng = self._random
        true = self._answer(sequence, length)
        if not self._trees:
            tokens = [t if rng.random() < self._chance else rng.choice(self._words) for t in true]
            wrong = (i for i, (a, b) in enumerate(zip(tokens, true, strict=True)) if a != b)
            self.best[sequence.id] = next(wrong, len(true))
            return Proposal(tokens)
        tokens, parents = [], []
        deepest = -1  # the last node of the true path
        depth = 0
        taken: set[tuple[int, int]] = set()  # a node has no two children alike
        while len(tokens) < length:
            if rng.random() < self._chance and depth < len(true):
                parent, token = deepest, true[depth]
            else:
                parent, token = rng.randrange(-1, len(tokens)), rng.choice(self._words)
            if (parent, token) in taken:
                if rng.random() < 0.2:
                    break
                continue
            taken.add((parent, token))
            if parent == deepest and depth < len(true) and token == true[depth]:
                deepest, depth = len(tokens), depth + 1
            tokens.append(token)
            parents.append(parent)
        self.best[sequence.id] = depth
        return Proposal(tokens, parents) if tokens else None

    def settle(self, sequence: Served, proposal: Proposal | None, accepted: int) -> None:
        best = self.best.pop(sequence.id, 0)
        if proposal is not None and self.strict:
            assert accepted <= best and (accepted == best or sequence.finish_reason is not None)

    @property
    def memory_bytes(self) -> int:
        return 0

    def copy_page(self, source: int, target: int) -> None:
        pass

    def close(self) -> None:
        self.closed = True
