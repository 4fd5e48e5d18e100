"""Speculation as a policy over a trimmable cache: who guesses, how far ahead, and whether it pays.

Nothing else of a session knows how guesses are made. A step without guesses is plain decoding; a step with
them runs the same executor over a few more rows (see `verification` for what stands of them).
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Seq
from time import perf_counter
from typing import Protocol

from edge_runtime.errors import EdgeError
from edge_runtime.serving.gate import PROBE, Gate, Offer
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.scheduler import Item
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.verification import Proposal

_ROWS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # of a verification
_HEAR = 8  # steps
_HOLD = 3  # steps that a decision stands: weighing all lengths takes a small model's draft step
_REWARD = 48  # tokens over which the cost of bringing a draft model up to date is spread, at most


class Proposer(Protocol):
    """A way to guess. `lengths`: the numbers of guesses that it may be asked for, ascending."""

    name: str
    lengths: tuple[int, ...]

    def ready(self, sequence: Sequence) -> int:
        """How many guesses it can make for a sequence now; 0 = none."""
        ...

    def tokens(self, sequence: Sequence, length: int, usual: float) -> float:
        """Tokens that a step with so many guesses brings on average; `usual` chance of a guess to stand."""
        ...

    def cost(self, sequences: Seq[Sequence], length: int) -> tuple[float, float]:
        """Seconds to guess: each time, and once more to get ready."""
        ...

    def seconds(self, length: int) -> float:
        """What so many guesses for one sequence take it, in its stride."""
        ...

    def propose(self, asks: Seq[tuple[Sequence, int]]) -> list[Proposal | None]:
        """Guesses for each sequence, at most as many as asked for. Raises EdgeError."""
        ...

    def settle(self, sequence: Sequence, proposal: Proposal | None, accepted: int) -> None:
        """The sequence's tokens are settled after a step: so many of the proposal's stand."""
        ...

    def warm_up(self, sequences: int) -> None:
        """Prepare its executors to guess for up to so many sequences at once."""
        ...

    def forget(self) -> None:
        """Drop what it learned of its own speed and luck."""
        ...

    @property
    def memory_bytes(self) -> int: ...

    def copy_page(self, source: int, target: int) -> None: ...

    def close(self) -> None: ...


class Speculation:
    """Puts guesses into a step's items. Off when there is no proposer."""

    def __init__(
        self, proposer: Proposer | None, pace: Pace, *, gated: bool = True, clock: Clock = perf_counter
    ) -> None:
        """gated: False guesses as far ahead as it can at every step, for measurements and tests.

        fixed: guesses of every step, whether they pay or not; None: the gate decides. It may be set while no
        requests are in flight; the gate's account then stays as it is.
        """
        self.proposer = proposer
        self.fixed: int | None = None if gated or proposer is None else proposer.lengths[-1]
        self.gate = Gate()
        self.failures = 0
        self._pace = pace
        self._clock = clock
        self.spent = 0.0  # seconds of guessing in the running step
        self._weighed = () if proposer is None else _weighed(proposer.lengths)
        self._asked = False  # whether the proposer was asked in the running step
        self._plain = 0  # steps without guesses that the gate has not heard of
        self._held = 0  # the length that was last decided on
        self._hold = 0  # steps for which it stands, as long as the gate is open

    @property
    def name(self) -> str:
        return "off" if self.proposer is None else self.proposer.name

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of guesses that a step may have, ascending; () when it is off."""
        return () if self.proposer is None else self.proposer.lengths

    def step_seconds(self, guesses: int) -> float:
        """What a step of one decoding sequence with so many guesses takes, by the steps measured so far:
        making the guesses and verifying them; 0 = a plain step.
        """
        verify = self._pace.predict(1 + guesses)
        return verify if self.proposer is None or guesses == 0 else verify + self.proposer.seconds(guesses)

    def propose(self, items: list[Item], tokens_left: int, rows_left: int, seconds_left: float) -> None:
        """Give items proposals, within what is left of the step; their tables make room for them."""
        self.spent = 0.0
        self._asked = False
        proposer = self.proposer
        if proposer is None or (self.fixed is None and self.gate.resting()):
            return
        asking = [item for item in items if _asks(item)]
        if not asking:
            return
        wanted = []
        for item in asking:
            most = min(_room(item.sequence), proposer.ready(item.sequence))
            if most > 0:
                wanted.append((item, most))
        if not wanted:
            return
        budget = min(tokens_left, rows_left) // len(wanted)
        held = self.fixed is None and self._hold > 0 and self.gate.is_open
        if held and seconds_left == math.inf and self._held <= budget:
            self._hold -= 1
            length = self._held
        else:
            length = self._length(proposer, wanted, items, budget, seconds_left)
            self._hold, self._held = _HOLD, length
        if length > 0:
            self._ask(proposer, [(item, min(length, most)) for item, most in wanted])

    def observe(self, items: list[Item], accepted: list[int], seconds: float) -> None:
        """What became of the step's guesses, and what the step took beside making them (seconds)."""
        if self.proposer is None:
            return
        if not self._asked:
            self._observe_plain(items)
            return
        decoding = [(item, n) for item, n in zip(items, accepted, strict=True) if item.choose]
        if any(item.guesses for item, _ in decoding):
            plain = self._pace.predict(sum(item.count for item in items))
            results = [(item.sequence.record, item.guesses, n) for item, n in decoding]
            if self.fixed is None:
                self.gate.note(results, seconds + self.spent, plain)
            else:
                for record, guesses, n in results:
                    if guesses:
                        record.note(guesses, n)
        for item, n in zip(items, accepted, strict=True):
            self.proposer.settle(item.sequence, item.proposal, n)

    def _observe_plain(self, items: list[Item]) -> None:
        """A step without guesses. The gate hears of every eighth, as of eight: most steps are such where
        guesses do not pay, and there they must cost nothing.
        """
        self._plain += 1
        if self._plain < _HEAR and self.gate.resting_for > 0:
            return
        if any(map(_asks, items)) and all(item.choose and item.count == 1 for item in items):
            self.gate.note_plain(self._pace.predict(len(items)), self._plain)
        self._plain = 0

    @property
    def memory_bytes(self) -> int:
        return 0 if self.proposer is None else self.proposer.memory_bytes

    def copy_page(self, source: int, target: int) -> None:
        if self.proposer is not None:
            self.proposer.copy_page(source, target)

    def close(self) -> None:
        if self.proposer is not None:
            self.proposer.close()

    def _length(
        self,
        proposer: Proposer,
        wanted: list[tuple[Item, int]],
        items: list[Item],
        budget: int,
        seconds_left: float,
    ) -> int:
        """Guesses for each sequence that wants some, of a budget for each."""
        count = len(wanted)
        most = min(max(most for _, most in wanted), budget)
        if self.fixed is not None:
            most = min(most, self.fixed)
        lengths = [n for n in (self._weighed if self.fixed is None else proposer.lengths) if n <= most]
        if self.fixed is not None:
            lengths = lengths[-1:]  # there is nothing to weigh
        if not lengths:
            return 0
        sequences = [item.sequence for item, _ in wanted]
        base = sum(item.count for item in items)
        usual = self.gate.usual.chance(0.5)
        if self.fixed is None and base == len(items) and not self._pace.knows(base):
            return 0  # a plain step is measured first: the time of larger ones says little of it
        others = sum(item.choose for item in items) - count
        plain = Offer(0, count + others, self._pace.predict(base))
        offers, trial = [], None
        for n in lengths:
            tokens = others + sum(proposer.tokens(s, n, usual) for s in sequences)
            each, once = proposer.cost(sequences, n)
            time = self._pace.predict(base + count * n) + each
            if time > seconds_left:
                break
            brought = tokens / max(1, count + others)
            rounds = max(1.0, min(_REWARD, max(s.left for s in sequences)) / brought)
            offers.append(Offer(n, tokens, time + once / rounds))
            if trial is None or n <= PROBE:
                trial = Offer(n, tokens, time + once)
        if self.fixed is not None:
            return offers[-1].length if offers else 0
        return self.gate.choose(plain, offers, trial)

    def _ask(self, proposer: Proposer, asks: list[tuple[Item, int]]) -> None:
        begin = self._clock()
        self._asked = True
        for item, n in asks:
            table = item.sequence.pages
            assert table is not None  # it runs
            table.extend(n)
        try:
            proposals = proposer.propose([(item.sequence, n) for item, n in asks])
        except EdgeError:  # the guesser's trouble is not the request's
            self.failures += 1
            self.gate.note_failure()
            proposals = [None] * len(asks)
        for (item, _), proposal in zip(asks, proposals, strict=True):
            if proposal is not None and proposal.tokens:
                item.proposal = proposal
            table = item.sequence.pages
            assert table is not None
            table.trim(item.start + item.rows)
        self.spent = self._clock() - begin


def _weighed(lengths: Seq[int]) -> tuple[int, ...]:
    """Of all lengths from 1 on, those whose verification fills the blocks of tokens that kernels have, and
    the last one: with few sizes each is measured often.
    """
    if tuple(lengths) != tuple(range(1, len(lengths) + 1)):
        return tuple(lengths)
    return tuple(n for n in lengths if n + 1 in _ROWS or n == lengths[-1])


def _asks(item: Item) -> bool:
    """Whether the item decodes a request that may be guessed for."""
    s = item.sequence
    return item.choose and item.count == 1 and s.request.speculate and bool(s.answer)


def _room(sequence: Sequence) -> int:
    """Guesses whose tokens the answer and the pages have room for."""
    table = sequence.pages
    assert table is not None
    return min(sequence.left - 1, table.room - len(sequence.tokens))
