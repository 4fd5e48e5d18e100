"""A step's items as the plain arrays that an executor takes."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.serving.scheduler import Item


class Batches:
    """sequences, width: rows and entries of the page tables of the largest step."""

    def __init__(self, sequences: int, width: int) -> None:
        self._tables: Array = np.full((sequences, width), -1, np.int32)
        self._last: StepBatch | None = None  # of the last step, when it had no prompts, trees or adapters
        self._key: list[tuple[int, int, int]] = []  # sequence, slot and rows of each of its items

    def make(self, items: list[Item]) -> StepBatch:
        """The items in order; rows of logits are in the order of the items that choose.

        While the same sequences decode with as many guesses, it is the same batch with other values, which
        an executor need not look at anew.
        """
        for row, item in zip(self._tables, items, strict=False):
            assert item.sequence.pages is not None  # the scheduler made room
            row[:] = item.sequence.pages.row
        if any(item.count > 1 or not item.choose or item.has_tree for item in items):
            self._last = None
            return self._any(items)
        key = [(item.sequence.id, item.sequence.slot, item.rows) for item in items]
        if self._last is None or key != self._key:
            self._key, self._last = key, self._any(items)
            return self._last
        tokens: list[int] = []
        positions: list[int] = []
        for item in items:
            tokens.append(item.sequence.tokens[item.start])
            if item.proposal is not None:
                tokens += item.proposal.tokens
            positions += range(item.start, item.start + item.rows)
        self._last.tokens[:] = tokens
        self._last.positions[:] = positions
        return self._last

    def _any(self, items: list[Item]) -> StepBatch:
        tokens: list[int] = []
        positions: list[int] = []
        sequence: list[int] = []
        wanted: list[int] = []
        for i, item in enumerate(items):
            s, start, end = item.sequence, item.start, item.start + item.count
            tokens += s.tokens[start:end]
            positions += range(start, end)
            if item.choose:
                wanted += range(len(tokens) - 1, len(tokens) + item.guesses)
            if item.proposal is not None:
                tokens += item.proposal.tokens
                positions += [end + depth for depth in item.proposal.depths()]
            sequence += [i] * item.rows
        places, parents = _trees(items) if any(item.has_tree for item in items) else (None, None)
        return StepBatch(
            tokens=np.array(tokens, np.int32),
            positions=np.array(positions, np.int32),
            sequence=np.array(sequence, np.int32),
            page_tables=self._tables[: len(items)],
            logit_rows=np.array(wanted, np.int32),
            parents=parents,
            places=places,
            slots=np.array([item.sequence.slot for item in items], np.int32),
            adapters=_adapters(items),
        )


def _trees(items: list[Item]) -> tuple[Array, Array]:
    """Places and parents, (tokens,) each, of a step in which some guesses are trees."""
    places: list[int] = []
    parents: list[int] = []
    for item in items:
        row = len(places)  # of the item's first token
        places += range(item.start, item.start + item.rows)
        parents += [-1, *range(row, row + item.count - 1)]
        if item.proposal is not None:
            last = row + item.count - 1
            above = item.proposal.parents
            for i in range(item.guesses):
                parent = i - 1 if above is None else above[i]
                parents.append(last + 1 + parent)
    return np.array(places, np.int32), np.array(parents, np.int32)


def _adapters(items: list[Item]) -> Array | None:
    numbers = [item.sequence.adapter for item in items]
    return np.array(numbers, np.int32) if any(n >= 0 for n in numbers) else None
