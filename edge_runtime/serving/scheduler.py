"""Which sequences run in a step: continuous batching with chunked prefill (Agrawal et al. 2023, Sarathi).

Every running sequence that decodes gets its token first; what is left of the step goes to prompts, oldest
first. A step never exceeds the plan's StepShape, for which all buffers were sized.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import QueueFull
from edge_runtime.serving.pages import PagePool
from edge_runtime.serving.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Item:
    """Tokens [start, start + count) of a sequence; `choose`: its next token is chosen after them."""

    sequence: Sequence
    start: int
    count: int
    choose: bool


class Scheduler:
    """Waiting line and running set. Admission, in order of arrival, reserves all pages a request may need."""

    def __init__(self, step: StepShape, pool: PagePool, width: int, max_waiting: int) -> None:
        self._step = step
        self._pool = pool
        self._width = width  # entries of a page table's row
        self._max_waiting = max_waiting
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._steps = 0

    def submit(self, sequence: Sequence) -> None:
        """Join the line. Raises QueueFull."""
        if len(self.waiting) >= self._max_waiting:
            raise QueueFull(f"{len(self.waiting)} requests are waiting already; try again when one has ended")
        self.waiting.append(sequence)

    def schedule(self) -> list[Item]:
        """The next step's work, [] when there is none. Room in the page tables is made here."""
        self._admit()
        self._steps += 1
        items = self._choose()
        for item in items:
            item.sequence.last_step = self._steps
            assert item.sequence.pages is not None  # given at admission
            item.sequence.pages.extend(item.start + item.count - item.sequence.pages.tokens)
        return items

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; all its pages are free after this."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.pages is not None:
            sequence.pages.close()
            sequence.pages = None

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self._step.sequences:
            pages = self._pool.open(self.waiting[0].reach, self._width)
            if pages is None:
                return  # its turn comes when a running one ends; nobody overtakes it
            sequence = self.waiting.popleft()
            sequence.pages = pages
            sequence.watch.admit()
            self.running.append(sequence)

    def _choose(self) -> list[Item]:
        decoding = [s for s in self.running if s.pending == 1]
        prompts = [s for s in self.running if s.pending > 1]
        decoding.sort(key=lambda s: (s.last_step, s.id))  # the step may be too small for all: take turns
        tokens, rows = self._step.tokens, self._step.logits
        if decoding and prompts:
            if tokens > 1:  # a prompt always moves on: neither kind can starve the other
                decoding = decoding[: tokens - 1]
            elif prompts[0].last_step < decoding[0].last_step:
                decoding = []
        items = [Item(s, s.computed, 1, True) for s in decoding[: min(tokens, rows)]]
        tokens, rows = tokens - len(items), rows - len(items)
        for s in prompts:
            count = min(s.pending, tokens)
            choose = count == s.pending and rows > 0
            if count == s.pending and not choose:
                count -= 1  # its last token takes its turn among the decoding ones
            if count > 0:
                items.append(Item(s, s.computed, count, choose))
                tokens, rows = tokens - count, rows - choose
        return items
