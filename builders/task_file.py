"""Task files: JSONL of prompts and what a right answer is, one case a line, read strictly.

    {"prompt": "2 + 2 =", "expected": "4", "scoring": "exact", "max_tokens": 8}
    {"messages": [{"role": "user", "content": "stop"}], "expected": {"skill": "stop"}, "scoring": "json"}
    {"prompt": "Water is", "choices": [" dry", " wet"], "expected": " wet", "scoring": "choice"}

exact (the default): the greedy answer is the expected text, white space at both ends aside. json: both are
the same JSON value; an expected text is itself read as JSON. choice: the choice that follows the prompt with
the greatest sum of token log-probabilities is the expected one; as `acc` of lm-evaluation-harness, so not
normalised by length, and the first of equals wins. A prompt is taken as it is; messages go through the
model's chat template.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.engine.folder import read_capped
from edge_runtime.errors import BadCheckpoint, BadConfig, nearest

MAX_FILE = 64 << 20
MAX_CASES = 100_000
MAX_CHOICES = 64
MAX_NEW = 8192
DEFAULT_NEW = 256  # tokens of an answer where a case does not say
SCORINGS = ("exact", "json", "choice")
_KEYS = ("prompt", "messages", "expected", "scoring", "choices", "max_tokens")


@dataclass(frozen=True, slots=True)
class Case:
    """One line of a task file. `expected`: text, a JSON value, or the number of the right choice."""

    line: int
    prompt: str | tuple[Mapping[str, str], ...]
    expected: Any
    scoring: str
    choices: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True, slots=True)
class TaskFile:
    """`name` goes into the quality report, the content never."""

    name: str
    cases: tuple[Case, ...]


def read_task(path: Path) -> TaskFile:
    """Raises BadConfig naming the line, what is wrong with it and, for a key, the nearest valid one."""
    try:
        text = read_capped(path, MAX_FILE).decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path} is not UTF-8 text (byte {error.start}); a task file is JSONL") from None
    except BadCheckpoint as error:
        raise BadConfig(f"task file: {error}") from None
    cases = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            cases.append(_case(number, line))
        except BadConfig as error:
            raise BadConfig(f"{path.name} line {number}: {error}") from None
        if len(cases) > MAX_CASES:
            raise BadConfig(f"{path.name} has more than {MAX_CASES} cases; use fewer of them")
    if not cases:
        raise BadConfig(f"{path.name} holds no cases; give one JSON object a line")
    return TaskFile(path.name, tuple(cases))


def read_json(text: str) -> Any:
    """The JSON value of a text. Raises ValueError, also for NaN and for endless nesting."""
    try:
        return json.loads(text, parse_constant=_not_json)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def same_json(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal: 1 is 1.0 but not true, keys have no order."""
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _case(number: int, line: str) -> Case:
    try:
        record = read_json(line)
    except ValueError as error:
        raise BadConfig(f"not valid JSON: {str(error)[:120]}") from None
    if not isinstance(record, dict):
        raise BadConfig(f"{type(record).__name__}, expected an object with prompt or messages, and expected")
    for key in record:
        if key not in _KEYS:
            raise BadConfig(f"unknown key {key[:60]!r}: {nearest(key[:60], _KEYS)}")
    if ("prompt" in record) == ("messages" in record):
        raise BadConfig("expected either 'prompt' or 'messages'")
    if "expected" not in record:
        raise BadConfig("'expected' is missing")
    scoring = record.get("scoring", "exact")
    if scoring not in SCORINGS:
        raise BadConfig(f"unknown scoring {str(scoring)[:60]!r}: {nearest(str(scoring)[:60], SCORINGS)}")
    if scoring != "choice" and "choices" in record:
        raise BadConfig(f"'choices' has no meaning with scoring {scoring!r}")
    if scoring == "choice" and "max_tokens" in record:
        raise BadConfig("'max_tokens' has no meaning with scoring 'choice', which generates nothing")
    most = record.get("max_tokens", DEFAULT_NEW)
    if isinstance(most, bool) or not isinstance(most, int) or not 1 <= most <= MAX_NEW:
        raise BadConfig(f"'max_tokens' is {str(most)[:60]}, expected a whole number from 1 to {MAX_NEW}")
    choices = _choices(record) if scoring == "choice" else ()
    return Case(number, _prompt(record), _expected(record, scoring, choices), scoring, choices, most)


def _prompt(record: dict[str, Any]) -> str | tuple[Mapping[str, str], ...]:
    if "messages" in record:
        messages = record["messages"]
        if not isinstance(messages, list) or not messages or not all(map(_is_message, messages)):
            raise BadConfig('\'messages\': expected [{"role": "user", "content": "..."}]')
        return tuple(messages)
    prompt = record["prompt"]
    if not isinstance(prompt, str) or not prompt:
        raise BadConfig("'prompt': expected text, at least one character")
    return prompt


def _expected(record: dict[str, Any], scoring: str, choices: tuple[str, ...]) -> Any:
    expected = record["expected"]
    if scoring == "json" and isinstance(expected, str):
        try:
            return read_json(expected)
        except ValueError:
            raise BadConfig("'expected' is text that is no JSON, but scoring is 'json'") from None
    if scoring == "json":
        return expected
    if not isinstance(expected, str):
        raise BadConfig(f"'expected' is {type(expected).__name__}, expected text with scoring {scoring!r}")
    if scoring == "choice":
        if expected not in choices:
            raise BadConfig(f"'expected' is none of the choices: {nearest(expected[:60], choices)}")
        return choices.index(expected)
    return expected


def _choices(record: dict[str, Any]) -> tuple[str, ...]:
    choices = record.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
        raise BadConfig(f"'choices': expected 2 to {MAX_CHOICES} texts with scoring 'choice'")
    if not all(isinstance(c, str) and c for c in choices) or len(set(choices)) < len(choices):
        raise BadConfig("'choices': expected texts that differ, none of them empty")
    return tuple(choices)


def _is_message(value: Any) -> bool:
    if not isinstance(value, dict) or value.keys() != {"role", "content"}:
        return False
    return all(isinstance(text, str) for text in value.values())


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
