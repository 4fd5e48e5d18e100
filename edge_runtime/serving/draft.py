"""Guesses of a draft model: a smaller model with the same vocabulary, over the same page tables.

Its KV pages have the same numbers as the target's, so that sharing, trimming and copying a page mean the same
for both. What it has not seen of a sequence is run when the sequence is to be guessed for, not before.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from time import perf_counter

import numpy as np

from edge_runtime.backends.protocol import Executor, StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import NumericError
from edge_runtime.serving.constraint import Constraint
from edge_runtime.serving.gate import expected
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.rows import Rows, run_step
from edge_runtime.serving.sampling import TopTokens
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.verification import Proposal


@dataclass(slots=True)
class _State:
    """A sequence that is guessed for: what the draft model must read next, and its guesses so far."""

    sequence: Sequence
    length: int
    feed: list[int]
    constraint: Constraint | None
    tokens: list[int] = field(default_factory=list)
    odds: list[Array] = field(default_factory=list)


class DraftModel:
    """step: the sizes that `executor` was loaded with."""

    name = "draft"

    def __init__(
        self,
        executor: Executor,
        step: StepShape,
        page_tokens: int,
        longest: int,
        clock: Clock = perf_counter,
    ) -> None:
        self.lengths = tuple(range(1, longest + 1))
        self.pace = Pace()
        self._executor = executor
        self._step = step
        self._page_tokens = page_tokens
        self._clock = clock
        self._batch: StepBatch | None = None  # the last one of one token for each sequence, and whose it was
        self._key: list[tuple[int, int]] = []

    def ready(self, sequence: Sequence) -> int:
        room = self._step.context - len(sequence.tokens)  # its context may be shorter than the target's
        return max(0, min(self.lengths[-1], room))

    def tokens(self, sequence: Sequence, length: int, usual: float) -> float:
        return expected(sequence.record.chance(usual), length)

    def cost(self, sequences: Seq[Sequence], length: int) -> tuple[float, float]:
        count = len(sequences)
        behind = sum(len(s.tokens) - s.draft_computed for s in sequences)
        each = (length + 1) * self.pace.predict(count)  # the last guess is read too
        return each, self._reading(behind - count) if behind > count else 0.0

    def seconds(self, length: int) -> float:
        return (length + 1) * self.pace.predict(1)

    def propose(self, asks: Seq[tuple[Sequence, int]]) -> list[Proposal | None]:
        states = [
            _State(s, n, s.tokens[s.draft_computed :], s.sampler.constraint and s.sampler.constraint.fork())
            for s, n in asks
        ]
        while feeding := [state for state in states if state.feed]:
            if all(len(state.feed) == 1 for state in feeding) and len(feeding) <= self._step.sequences:
                self._ahead(feeding)
            else:
                self._read(feeding)
        return [Proposal(state.tokens, None, state.odds or None) for state in states]

    def settle(self, sequence: Sequence, proposal: Proposal | None, accepted: int) -> None:
        if sequence.draft_computed > sequence.computed:
            sequence.draft_computed = sequence.computed
        if sequence.nodes and not sequence.nodes[-1].drafted:
            for node in sequence.nodes[: sequence.draft_computed // self._page_tokens]:
                node.drafted = True

    def warm_up(self, sequences: int) -> None:
        self._executor.warm_up(range(1, self._step.tokens + 1), range(1, sequences + 1))

    def forget(self) -> None:
        self.pace = Pace()

    @property
    def memory_bytes(self) -> int:
        return self._executor.memory_bytes

    def copy_page(self, source: int, target: int) -> None:
        self._executor.copy_page(source, target)

    def close(self) -> None:
        self._executor.close()

    def _reading(self, tokens: int) -> float:
        """Predicted seconds to read so many tokens."""
        whole, rest = divmod(tokens, self._step.tokens)
        return whole * self.pace.predict(self._step.tokens) + (self.pace.predict(rest) if rest else 0.0)

    def _ahead(self, states: list[_State]) -> None:
        """Token by token, over one set of arrays as long as all of these sequences go on."""
        count = len(states)
        batch = self._batch_of(states)
        if all(state.constraint is None and state.sequence.sampler.is_plain for state in states):
            self._chain(states, batch)
            return
        going = True
        while going:
            begin = self._clock()
            rows = self._rows(batch, states)
            for i, state in enumerate(states):
                state.sequence.draft_computed += 1
                state.feed = []
                _guess(state, rows[i])
                going = going and bool(state.feed)
            if going:
                batch.tokens[:] = [state.feed[0] for state in states]
                batch.positions[:] += 1
            self.pace.note(count, self._clock() - begin)

    def _batch_of(self, states: list[_State]) -> StepBatch:
        """One token of each; the same batch with other values while it is the same sequences' turn."""
        key = [(state.sequence.id, state.sequence.slot) for state in states]
        batch = self._batch
        if batch is None or key != self._key:
            count = len(states)
            batch = self._batch = StepBatch(
                tokens=np.zeros(count, np.int32),
                positions=np.zeros(count, np.int32),
                sequence=np.arange(count, dtype=np.int32),
                page_tables=_tables(states),
                logit_rows=np.arange(count, dtype=np.int32),
                slots=np.array([slot for _, slot in key], np.int32),
            )
            self._key = key
        batch.tokens[:] = [state.feed[0] for state in states]
        batch.positions[:] = [state.sequence.draft_computed for state in states]
        for row, state in zip(batch.page_tables, states, strict=True):
            if state.sequence.pages is not None:  # all run
                row[:] = state.sequence.pages.row
        return batch

    def _chain(self, states: list[_State], batch: StepBatch) -> None:
        """The likeliest tokens, as many as the shortest of them wants, in one call.

        Its last guess is read too: when all stand, the next call has one token to read and no more. What
        follows it is the next guess of those that want more.
        """
        begin = self._clock()
        count = 1 + min(state.length - len(state.tokens) for state in states)
        found = self._executor.chain(batch, count).T.tolist()
        for state, tokens in zip(states, found, strict=True):
            state.sequence.draft_computed += count
            wanted = tokens[: state.length - len(state.tokens)]
            ends = (i for i, token in enumerate(wanted) if state.sequence.is_end(token))
            last = next(ends, len(wanted) - 1)
            state.tokens += wanted[: last + 1]
            goes_on = last == count - 1 and len(state.tokens) < state.length
            state.feed = wanted[-1:] if goes_on and not state.sequence.is_end(wanted[-1]) else []
        self.pace.note(len(states), (self._clock() - begin) / count)

    def _rows(self, batch: StepBatch, states: list[_State]) -> Rows:
        """Run a step with one row for each of these."""
        return run_step(self._executor, batch, [(state.sequence.sampler, 1) for state in states])

    def _read(self, states: list[_State]) -> None:
        """One step of the draft model over as much of what is to be read as it takes."""
        begin = self._clock()
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        done: list[_State] = []
        last: list[int] = []
        running: list[tuple[_State, int]] = []
        for state in states[: self._step.sequences]:
            s = state.sequence
            count = min(len(state.feed), self._step.tokens - len(tokens))
            if count <= 0:
                break
            tokens += state.feed[:count]
            positions += range(s.draft_computed, s.draft_computed + count)
            rows += [len(running)] * count
            running.append((state, count))
            if count == len(state.feed) and len(done) < self._step.logits:
                done.append(state)
                last.append(len(tokens) - 1)
        found = self._rows(
            StepBatch(
                tokens=np.array(tokens, np.int32),
                positions=np.array(positions, np.int32),
                sequence=np.array(rows, np.int32),
                page_tables=_tables([state for state, _ in running]),
                logit_rows=np.array(last, np.int32),
                slots=np.array([state.sequence.slot for state, _ in running], np.int32),
            ),
            done,
        )
        for state, count in running:  # only now: a step that failed has stored nothing
            state.sequence.draft_computed += count
            del state.feed[:count]
        for i, state in enumerate(done):
            _guess(state, found[i])
        self.pace.note(len(tokens), self._clock() - begin)


def _tables(states: list[_State]) -> Array:
    rows = [state.sequence.pages.row for state in states if state.sequence.pages is not None]  # all run
    return np.stack(rows)


def _guess(state: _State, row: Rows) -> None:
    """Take the next guess from a row of a step, and go on from it unless the answer would end there."""
    if isinstance(row, TopTokens) or row.ndim:
        token, odds = state.sequence.sampler.guess(row, state.constraint)
    else:
        token, odds = int(row), None  # the likeliest token itself
    if token < 0:
        raise NumericError("the draft model's logits hold NaN or Inf")
    state.tokens.append(token)
    if odds is not None:
        state.odds.append(odds)
    if len(state.tokens) == state.length or state.sequence.is_end(token):
        return
    if state.constraint is not None:
        state.constraint.advance(token)
        if state.constraint.is_done:
            return
    state.feed = [token]
