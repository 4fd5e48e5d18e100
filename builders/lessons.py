"""Texts to train on, whole models or Medusa heads: token ids, and from which one on they are learned.

A plain text is cut into windows and learned everywhere. Of a prompt with its completion, and of a chat,
only the completion and the last answer are learned: nothing else is ever said. texts.py reads the files.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from builders.texts import ModelText, read_passages
from edge_runtime.errors import BadConfig

_SORTED = 64  # batches whose rows are sorted by length together


@dataclass(frozen=True, slots=True)
class Lesson:
    """ids of a sequence; the first one that is learned is ids[start]."""

    ids: tuple[int, ...]
    start: int


def read_lessons(path: Path, text: ModelText, length: int) -> list[Lesson]:
    """Lessons of at most `length` tokens from what texts.py reads. Raises BadConfig naming the line."""
    found: list[Lesson] = []
    for passage in read_passages(path):
        before, after = text.split(passage)
        if not passage.is_exchange:
            found += _windows(after, length)
            continue
        cut = tuple([*before, *after][:length])
        if len(before) < len(cut) - 1:
            found.append(Lesson(cut, len(before)))
    if not found:
        raise BadConfig(f"{path} gives no sequence to learn from; at least 3 tokens are needed")
    return found


def _windows(ids: Sequence[int], length: int) -> list[Lesson]:
    pieces = (tuple(ids[i : i + length]) for i in range(0, len(ids), length))
    return [Lesson(piece, 1) for piece in pieces if len(piece) > 2]


def digest(lessons: Sequence[Lesson]) -> str:
    """SHA-256 of all ids and starts, in order: whether two runs learn from the same."""
    found = hashlib.sha256()
    for lesson in lessons:
        found.update(repr((lesson.ids, lesson.start)).encode())
    return found.hexdigest()


def batches(lessons: Sequence[Lesson], tokens: int, seed: int) -> Iterator[list[Lesson]]:
    """Rows of about equal length, at most `tokens` with padding (or one row), without end.

    Every pass over the lessons is shuffled anew; the same seed gives the same batches.
    """
    pass_number = 0
    while True:
        rng = random.Random(f"{seed}-{pass_number}")
        order = list(range(len(lessons)))
        rng.shuffle(order)
        longest = max(len(lesson.ids) for lesson in lessons)
        group = max(_SORTED * tokens // longest, 1)
        for at in range(0, len(order), group):
            rows = sorted(order[at : at + group], key=lambda i: len(lessons[i].ids))
            cut = list(_cut([lessons[i] for i in rows], tokens))
            rng.shuffle(cut)
            yield from cut
        pass_number += 1


def _cut(rows: list[Lesson], tokens: int) -> Iterator[list[Lesson]]:
    """Rows ascend in length, so a batch is as wide as its last row."""
    batch: list[Lesson] = []
    for row in rows:
        if batch and len(row.ids) * (len(batch) + 1) > tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
