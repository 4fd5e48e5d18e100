"""Which sequences run in a step: continuous batching with chunked prefill (Agrawal et al. 2023, Sarathi).

Every running sequence that decodes gets its token first; what is left of the step goes to prompts. Higher
priority comes first, then less slack (what a deadline leaves beyond the predicted time), then age. A step
never exceeds the plan's StepShape, for which all buffers were sized.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import QueueFull
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.pages import PagePool, PageTable
from edge_runtime.serving.prefix import Match, PrefixTree
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.verification import Proposal


@dataclass(slots=True)
class Item:
    """Tokens [start, start + count) of a sequence; `choose`: its next token is chosen after them.

    proposal: guesses at the tokens after that one, run and verified in the same step.
    """

    sequence: Sequence
    start: int
    count: int
    choose: bool
    proposal: Proposal | None = None

    @property
    def guesses(self) -> int:
        return 0 if self.proposal is None else len(self.proposal.tokens)

    @property
    def has_tree(self) -> bool:
        return self.proposal is not None and self.proposal.parents is not None

    @property
    def rows(self) -> int:
        """Tokens that it brings into the step."""
        return self.count + self.guesses


class Scheduler:
    """Waiting line and running set. Admission reserves all pages a request may need, so that a running one
    never runs out; a waiting request of higher priority may push running ones back into the line, which then
    begin again from what is still in the cache.

    copy_page(source, target): copies a page's bytes at once.
    """

    def __init__(
        self,
        step: StepShape,
        pool: PagePool,
        tree: PrefixTree,
        pace: Pace,
        *,
        width: int,
        max_waiting: int,
        copy_page: Callable[[int, int], None],
        clock: Clock,
    ) -> None:
        self._step = step
        self._pool = pool
        self._tree = tree
        self._pace = pace
        self._width = width  # entries of a page table's row
        self._max_waiting = max_waiting
        self._copy_page = copy_page
        self._clock = clock
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preempted = 0
        self._slots = list(range(step.sequences - 1, -1, -1))
        self._steps = 0
        self._line = threading.RLock()  # submitting threads and the one that drives share the two lists

    def submit(self, sequence: Sequence) -> None:
        """Join the line. Raises QueueFull."""
        with self._line:
            if len(self.waiting) >= self._max_waiting:
                raise QueueFull(
                    f"{len(self.waiting)} requests are waiting already; try again when one has ended"
                )
            self.waiting.append(sequence)

    def schedule(self) -> list[Item]:
        """The next step's work, [] when there is none. Room in the page tables is made here."""
        now = self._clock()
        with self._line:
            self._admit(now)
        self._steps += 1
        items = self._choose(now)
        for item in items:
            item.sequence.last_step = self._steps
            table = item.sequence.pages
            assert table is not None  # given at admission
            table.extend(item.start + item.count - table.tokens)
        return items

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence wherever it is; all it holds is free after this."""
        with self._line:
            if sequence in self.running:
                self.running.remove(sequence)
            elif sequence in self.waiting:
                self.waiting.remove(sequence)
            self._take_back(sequence)

    @property
    def free_slot(self) -> int | None:
        """A slot that no running sequence has, None when all are taken."""
        return self._slots[-1] if self._slots else None

    def too_late(self) -> list[Sequence]:
        """Those that must end now: their next token would come after their deadline."""
        now = self._clock()
        return [s for s in self._known() if s.due is not None and now + self._next_token(s) >= s.due]

    def overrun(self, items: list[Item]) -> list[Sequence]:
        """Those that must end now: a step of these items would end after their deadline."""
        end = self._clock() + self._pace.predict(sum(item.count for item in items)) if items else 0.0
        return [s for s in self._known() if s.due is not None and s.due < end]

    def spare(self) -> float:
        """Seconds that the next step may take before a deadline is missed."""
        return self._before_due(self._known())

    def _known(self) -> list[Sequence]:
        with self._line:
            return [*self.running, *self.waiting]

    def _before_due(self, sequences: Iterable[Sequence]) -> float:
        dues = [s.due for s in sequences if s.due is not None]
        return min(dues) - self._clock() if dues else math.inf

    def _next_token(self, s: Sequence) -> float:
        """Predicted seconds to the next token, once its turn has come."""
        whole, rest = divmod(s.pending, self._step.tokens)
        time = whole * self._pace.predict(self._step.tokens)
        return time + (self._pace.predict(rest) if rest else 0.0)

    def _urgency(self, s: Sequence, now: float) -> tuple[int, float]:
        """Lower goes first."""
        return -s.request.priority, math.inf if s.due is None else s.due - now - self._next_token(s)

    # --- admission ---

    def _admit(self, now: float) -> None:
        while self.waiting:
            sequence = min(self.waiting, key=lambda s: (*self._urgency(s, now), s.id))
            if not self._enter(sequence) and not self._make_way(sequence):
                return  # its turn comes when a running one ends; nobody overtakes it
            self.waiting.remove(sequence)
            if sequence.watch.admitted is None:
                sequence.watch.admit()
            self.running.append(sequence)

    def _enter(self, sequence: Sequence) -> bool:
        """Give it a slot and pages, those of its known beginning included."""
        if not self._slots:
            return False
        known = self._tree.match(sequence.request.adapter, sequence.tokens, len(sequence.tokens) - 1)
        table = self._pool.open(sequence.reach, self._width, known.pages)
        if table is None:
            return False
        sequence.pages = table
        sequence.slot = self._slots.pop()
        sequence.nodes, sequence.copied = list(known.nodes), known.copy
        try:
            self._adopt_part(table, known)
        except BaseException:
            self._take_back(sequence)
            raise
        sequence.computed = table.tokens
        drafted = next((i for i, n in enumerate(known.nodes) if not n.drafted), len(known.nodes))
        sequence.draft_computed = drafted * self._pool.page_tokens
        if drafted == len(known.nodes) and known.copy is not None and known.copy.drafted:
            sequence.draft_computed = table.tokens  # the copied part is the draft model's too
        if sequence.watch.admitted is None:  # what it finds again after it was pushed back is its own
            sequence.cached = sequence.computed
        return True

    def _adopt_part(self, table: PageTable, known: Match) -> None:
        """Copy on write: the page that the prompt leaves in its middle becomes a page of its own."""
        source = known.copy
        if source is None or known.part == 0:
            return
        if self._pool.references(source.page) == 0 and self._pool.available == 0:
            return  # every idle page is promised to somebody, this one too
        at = len(known.nodes)
        self._pool.share(source.page)  # taking a page must not lose the one to copy
        try:
            table.extend(known.part)
            self._copy_page(source.page, int(table.row[at]))
        finally:
            self._pool.drop(source.page)

    def _make_way(self, sequence: Sequence) -> bool:
        """Let it in by pushing running sequences of lower priority back into the line, as few as need be."""
        lower = [s for s in self.running if s.request.priority < sequence.request.priority]
        if not lower or not self._would_fit(sequence, lower):
            return False
        lower.sort(key=lambda s: (s.request.priority, -s.id))
        for victim in lower:
            self.running.remove(victim)
            self._take_back(victim)
            victim.computed = victim.draft_computed = 0
            victim.hidden = None
            self.waiting.append(victim)
            self.preempted += 1
            if self._enter(sequence):
                return True
        return False

    def _would_fit(self, sequence: Sequence, without: list[Sequence]) -> bool:
        """Whether the pool had room for it if those running ones were gone; nobody is pushed back in vain."""
        pool = self._pool
        tables = [s.pages for s in without if s.pages is not None]
        theirs = Counter(page for table in tables for page in table.pages)
        freed = sum(pool.references(page) == n for page, n in theirs.items())
        freed += sum(table.promised for table in tables)
        known = self._tree.match(sequence.request.adapter, sequence.tokens, len(sequence.tokens) - 1)
        others = sum(pool.references(page) > theirs[page] for page in known.pages)  # stay held by somebody
        return pool.pages_for(sequence.reach) - others <= pool.available + freed

    def _take_back(self, sequence: Sequence) -> None:
        if sequence.pages is not None:
            sequence.pages.close()
            sequence.pages = None
            self._slots.append(sequence.slot)
            sequence.slot = -1
            sequence.nodes, sequence.copied = [], None

    # --- a step's work ---

    def _choose(self, now: float) -> list[Item]:
        running = self.running
        decoding = [s for s in running if s.pending == 1]
        prompts = [s for s in running if s.pending > 1]
        if len(decoding) > 1:  # the step may be too small for all: equals take turns
            decoding.sort(key=lambda s: (*self._urgency(s, now), s.last_step, s.id))
        if len(prompts) > 1:
            prompts.sort(key=lambda s: (*self._urgency(s, now), s.id))
        tokens, rows = self._step.tokens, self._step.logits
        if decoding and prompts:
            if tokens > 1:  # a prompt always moves on: neither kind can starve the other
                decoding = decoding[: tokens - 1]
            elif prompts[0].last_step < decoding[0].last_step:
                decoding = []
        items = [Item(s, s.computed, 1, True) for s in decoding[: min(tokens, rows)]]
        tokens, rows = tokens - len(items), rows - len(items)
        spare = self._before_due(item.sequence for item in items)
        for i, s in enumerate(prompts):
            others = self._step.tokens - tokens + len(prompts) - i - 1  # one of each prompt to come
            count = self._in_time(min(s.pending, tokens), others, spare)
            choose = count == s.pending and rows > 0
            if count == s.pending and not choose:
                count -= 1  # its last token takes its turn among the decoding ones
            if count > 0:
                items.append(Item(s, s.computed, count, choose))
                tokens, rows = tokens - count, rows - choose
                spare = min(spare, self._before_due([s]) if choose else math.inf)
        return items

    def _in_time(self, count: int, others: int, spare: float) -> int:
        """Tokens of a prompt, at most `count` and at least one, beside which `others` come out in time."""
        while count > 1 and self._pace.predict(others + count) > spare:
            count //= 2
        return count
