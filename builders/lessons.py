"""Texts to train on, whole models or Medusa heads: token ids, and from which one on they are learned.

A plain text is cut into windows and learned everywhere. A line of a JSONL file is {"text": ...},
{"prompt": ..., "completion": ...} or {"messages": [...]} (a chat, through the tokenizer's template); of the
last two only the completion and the last answer are learned: nothing else is ever said or drafted.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.errors import BadConfig

MAX_TEXT = 1 << 30  # bytes of one file: it is held in memory
_SORTED = 64  # batches whose rows are sorted by length together


@dataclass(frozen=True, slots=True)
class Lesson:
    """ids of a sequence; the first one that is learned is ids[start]."""

    ids: tuple[int, ...]
    start: int


def read_lessons(path: Path, tokenizer: Any, length: int) -> list[Lesson]:
    """Lessons of at most `length` tokens from a .jsonl file, or from any other file as plain text.

    `tokenizer` is one of transformers. Raises BadConfig naming the line.
    """
    try:
        if path.stat().st_size > MAX_TEXT:
            raise BadConfig(f"{path} is larger than {MAX_TEXT >> 20} MiB; give a part of it")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise BadConfig(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix == ".jsonl":
        found = [
            lesson
            for number, line in enumerate(text.splitlines(), 1)
            if line.strip()
            for lesson in _line(line, f"{path.name}, line {number}", tokenizer, length)
        ]
    else:
        found = _windows(_encode(tokenizer, text), length)
    if not found:
        raise BadConfig(f"{path} gives no sequence to learn from; at least 3 tokens are needed")
    return found


def _line(line: str, where: str, tokenizer: Any, length: int) -> list[Lesson]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise BadConfig(f"{where} is not JSON: {error}") from None
    match row:
        case {"text": str(text), **rest} if not rest:
            return _windows(_encode(tokenizer, text), length)
        case {"prompt": str(prompt), "completion": str(completion), **rest} if not rest:
            before = _encode(tokenizer, prompt)
            ids = before + _encode(tokenizer, completion) + [tokenizer.eos_token_id]
        case {"messages": [*messages], **rest} if not rest and len(messages) > 1:
            before, ids = _chat(messages, where, tokenizer)
        case _:
            raise BadConfig(
                f'{where}: expected {{"text"}}, {{"prompt", "completion"}} or {{"messages"}} of at least two'
            )
    cut = tuple(ids[:length])
    return [Lesson(cut, len(before))] if len(before) < len(cut) - 1 else []


def _chat(messages: list[Any], where: str, tokenizer: Any) -> tuple[list[int], list[int]]:
    """ids up to the last answer, and of the whole chat."""
    if tokenizer.chat_template is None:
        raise BadConfig(f"{where} is a chat, but the model has no chat template")

    def render(part: list[Any], prompt: bool) -> list[int]:
        text = tokenizer.apply_chat_template(part, tokenize=False, add_generation_prompt=prompt)
        return _encode(tokenizer, text)

    before, ids = render(messages[:-1], True), render(messages, False)
    if messages[-1].get("role") != "assistant" or ids[: len(before)] != before:
        raise BadConfig(f"{where}: the chat must end with the assistant's answer")
    return before, ids


def _encode(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


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
