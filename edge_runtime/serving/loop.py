"""The step of a session: schedule -> guess -> execute -> choose -> commit. One thread at a time runs it."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np

from edge_runtime.backends.protocol import Executor
from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import EdgeError, NumericError
from edge_runtime.serving.batches import Batches
from edge_runtime.serving.metrics import Clock, Metrics
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.prefix import PrefixTree
from edge_runtime.serving.request import FinishReason, Token
from edge_runtime.serving.rows import Rows, run_step
from edge_runtime.serving.sampling import Choice
from edge_runtime.serving.scheduler import Item, Scheduler
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.speculative import Speculation
from edge_runtime.serving.verification import walk

Found = Rows | str | None  # 1 + guesses rows of an item, why they are not valid, or none wanted


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step brings a sequence: its new tokens, and the guesses that all but the last confirm.

    error: why nothing more can be chosen.
    """

    choices: Seq[Choice] = ()
    path: Seq[int] = ()
    error: str | None = None


class Loop:
    """emit(sequence, event): called for every event of a step, in order; the last of a sequence has its
    finish_reason, and all that the sequence held is free by then.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        speculation: Speculation,
        tree: PrefixTree,
        pace: Pace,
        metrics: Metrics,
        *,
        step: StepShape,
        page_tokens: int,
        width: int,
        clock: Clock,
        emit: Callable[[Sequence, Token], None],
    ) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._speculation = speculation
        self._tree = tree
        self._pace = pace
        self._metrics = metrics
        self._step = step
        self._page_tokens = page_tokens
        self._batches = Batches(step.sequences, width)
        self._clock = clock
        self._emit = emit
        self._keep_hidden = speculation.name == "medusa"
        self._began = 0.0  # when the running step began
        self._apart = False  # whether its sequences had to run alone

    def step(self) -> None:
        """Run one step for all that can run. Raises what the backend raises beyond NumericError; every
        sequence of the step has then ended.
        """
        for sequence in self._scheduler.too_late():
            self.end(sequence, "deadline")
        self._began = self._clock()
        items = self._scheduler.schedule()
        for sequence in self._scheduler.overrun(items):
            self.end(sequence, "deadline")
            items = [item for item in items if item.sequence is not sequence]
        if items:
            try:
                self._guess(items)
                rows = self._execute(items)
            except Exception as error:
                self._fail_all(items, error)
                raise
            outcomes = [self._choose(item, r) for item, r in zip(items, rows, strict=True)]
            self._commit(items, outcomes)

    def end(self, sequence: Sequence, reason: FinishReason, error: str | None = None) -> None:
        """End a sequence from outside; what it holds is free."""
        self._emit(sequence, sequence.end(reason, error))

    def _guess(self, items: list[Item]) -> None:
        tokens = self._step.tokens - sum(item.count for item in items)
        rows = self._step.logits - sum(item.choose for item in items)
        self._speculation.propose(items, tokens, rows, self._scheduler.spare())

    def _execute(self, items: list[Item]) -> list[Found]:
        samplers = [(item.sequence.sampler, 1 + item.guesses) for item in items if item.choose]
        try:
            rows = run_step(self._executor, self._batches.make(items), samplers)
        except NumericError as error:
            return self._execute_apart(items, str(error))
        hidden = self._executor.hidden if self._keep_hidden else None
        found: list[Found] = []
        at = 0
        for item in items:
            count = 1 + item.guesses if item.choose else 0
            found.append(rows[at : at + count] if count else None)
            if hidden is not None and count:
                item.sequence.hidden = hidden[at : at + count]  # `_choose` keeps the row it ends at
            at += count
        return found

    def _execute_apart(self, items: list[Item], error: str) -> list[Found]:
        """One sequence spoiled the step. Appending the same keys and values again changes nothing, so each
        runs alone, and only those that fail alone, and without guesses, are at fault.
        """
        self._apart = True
        if len(items) == 1:
            if items[0].proposal is None:
                return [error]
            items[0].proposal = None
            return self._execute(items)
        found: list[Found] = []
        for item in items:
            row = self._execute([item])[0]
            if item.sequence.hidden is not None:
                item.sequence.hidden = item.sequence.hidden.copy()
            found.append(row if row is None or isinstance(row, str) else row.copy())
        return found

    def _choose(self, item: Item, rows: Found) -> Outcome:
        """Walk the rows as far as guesses stand, the answer goes on and their numbers are finite."""
        if rows is None or isinstance(rows, str):
            return Outcome(error=rows)
        s = item.sequence
        choices: list[Choice] = []
        path: list[int] = []
        left, free = s.left, s.sampler.constraint is None
        try:
            for choice, following in walk(rows, item.proposal, s.sampler):
                choices.append(choice)
                if following is None or s.is_end(choice.token) or len(choices) == left:
                    break
                if not free and s.sampler.is_done:
                    break
                path.append(following)
        except EdgeError as error:  # numbers that are not finite, or a grammar that allows nothing
            return Outcome(choices, path[: max(0, len(choices) - 1)], str(error))
        if s.hidden is not None:
            s.hidden = s.hidden[path[-1] + 1 if path else 0].copy()
        return Outcome(choices, path)

    def _commit(self, items: list[Item], outcomes: list[Outcome]) -> None:
        """Make the step's outcome part of each sequence; ended ones leave and free what they hold."""
        self._metrics.steps += 1
        ends: list[tuple[Sequence, list[Token], str | None]] = []
        accepted: list[int] = []
        for item, outcome in zip(items, outcomes, strict=True):
            s = item.sequence
            events: list[Token] = []
            for i, choice in enumerate(outcome.choices):
                last = i == len(outcome.choices) - 1  # the grammar's state is the one after it
                events.append(s.commit(choice, done=last and s.sampler.is_done))
                if events[-1].finish_reason is not None:
                    break
            stood = max(0, len(events) - 1)
            accepted.append(stood)
            self._settle(item, outcome, stood)
            ends.append((s, events, outcome.error))
        self._learn(items, accepted)
        for (s, events, error), item, stood in zip(ends, items, accepted, strict=True):
            self._metrics.speculated(item.guesses, stood)
            if events:
                self._metrics.take(s.watch, len(events))
            for event in events:
                self._emit(s, event)
            if error is not None and s.finish_reason is None:
                self._tree.distrust(s.nodes, s.copied)
                self.end(s, "error", error)

    def _learn(self, items: list[Item], accepted: list[int]) -> None:
        """A step's time, without what guessing took, is what its number of rows costs."""
        took = self._clock() - self._began - self._speculation.spent
        if not self._apart:
            self._pace.note(sum(item.rows for item in items), took)
        self._apart = False
        self._speculation.observe(items, accepted, took)

    def _settle(self, item: Item, outcome: Outcome, stood: int) -> None:
        """The cache holds what stands and no more; full pages of it are known from now on."""
        s, table = item.sequence, item.sequence.pages
        assert table is not None  # it ran
        if outcome.error is None or outcome.choices:
            s.computed += item.count + stood
        if item.proposal is not None and item.proposal.parents is not None and stood:
            self._gather(item, list(outcome.path[:stood]))
        if table.tokens > s.computed:  # guesses, also those that were given up
            table.trim(s.computed)
        size = self._page_tokens
        while outcome.error is None and (len(s.nodes) + 1) * size <= s.computed:
            at, own = len(s.nodes) * size, int(table.row[len(s.nodes)])
            node = self._tree.add(s.request.adapter, s.nodes, tuple(s.tokens[at : at + size]), table)
            s.nodes.append(node)
            if node.page != own and not node.drafted:  # another sequence's page lacks the draft model's part
                s.draft_computed = min(s.draft_computed, at)
            elif node.page != own and s.draft_computed >= at:  # it has it: nothing is written there again
                s.draft_computed = max(s.draft_computed, at + size)

    def _gather(self, item: Item, path: list[int]) -> None:
        """Bring an accepted path of a tree to its positions in the cache."""
        first = item.start + item.count
        sources = np.array([first + i for i in path], np.int32)
        targets = np.arange(first, first + len(path), dtype=np.int32)
        apart = sources != targets
        if apart.any():
            assert item.sequence.pages is not None
            self._executor.move(item.sequence.pages.row, sources[apart], targets[apart])

    def _fail_all(self, items: list[Item], error: Exception) -> None:
        """The backend itself failed: every sequence of the step ends, so that nothing stays behind."""
        why = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
        for item in items:
            self.end(item.sequence, "error", why)
