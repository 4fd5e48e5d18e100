"""Guesses from the text itself: what followed the last few tokens when they stood there before.

Prompt look-up (Saxena 2023), over prompt and answer alike. Costs next to nothing, and pays where answers
repeat: names out of the prompt, the keys of a JSON plan.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

from edge_runtime.serving.gate import expected
from edge_runtime.serving.ngrams import NgramIndex
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.verification import Proposal


class Lookup:
    """longest: guesses at most."""

    name = "lookup"

    def __init__(self, longest: int) -> None:
        self.lengths = tuple(range(1, longest + 1))

    def ready(self, sequence: Sequence) -> int:
        if sequence.ngrams is None:
            sequence.ngrams = NgramIndex()
        at = sequence.ngrams.find(sequence.tokens)
        sequence.found = at
        return 0 if at is None else min(len(sequence.tokens) - at, self.lengths[-1])

    def tokens(self, sequence: Sequence, length: int, usual: float) -> float:
        return expected(sequence.record.chance(usual), length)

    def cost(self, sequences: Seq[Sequence], length: int) -> tuple[float, float]:
        return 0.0, 0.0

    def seconds(self, length: int) -> float:
        return 0.0

    def propose(self, asks: Seq[tuple[Sequence, int]]) -> list[Proposal | None]:
        found: list[Proposal | None] = []
        for s, n in asks:
            at = s.found
            found.append(None if at is None else Proposal(s.tokens[at : at + n]))
        return found

    def settle(self, sequence: Sequence, proposal: Proposal | None, accepted: int) -> None:
        pass

    def warm_up(self, sequences: int) -> None:
        pass

    def forget(self) -> None:
        pass

    @property
    def memory_bytes(self) -> int:
        return 0

    def copy_page(self, source: int, target: int) -> None:
        pass

    def close(self) -> None:
        pass
