"""The held-out commands and what counts as a right plan: the same for transformers and for engines."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

Example = tuple[str, str]  # (prompt, expected plan)


def read_cases(path: Path, limit: int | None = None) -> list[Example]:
    """The first `limit` examples of a JSONL file, or all."""
    with path.open(encoding="utf-8") as lines:
        records = [json.loads(line) for line in islice(lines, limit)]
    return [(record["prompt"], record["expected"]) for record in records]


def is_right(answer: str, expected: str) -> bool:
    """True where the answer is JSON equal to the expected plan."""
    try:
        return bool(json.loads(answer) == json.loads(expected))
    except json.JSONDecodeError:
        return False
