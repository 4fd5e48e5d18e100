"""What edge-bench asks an engine: prompts of a file, or else the known answer's prompt and random tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import msgspec
import numpy as np

from edge_runtime.errors import BadConfig, BadRequest
from edge_runtime.serving.request import Request
from edge_runtime.serving.session import Session

MAX_TEXT_BYTES = 64 << 20
_SEED = 7
_RANDOM_TOKENS = 24  # of a prompt


class _Line(msgspec.Struct):
    """A line of a JSONL file; other keys beside `prompt` are of no interest."""

    prompt: str


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests for any section, and a phrase that says what they are."""

    source: str
    requests: tuple[Request, ...]


class RandomTokens:
    """Prompts that no cache can know: each call draws new ones, the same in every run."""

    def __init__(self, session: Session) -> None:
        self._rng = np.random.default_rng(_SEED)
        self._size = session.tokenizer.vocabulary.size

    def __call__(self, count: int) -> list[int]:
        return [int(i) for i in self._rng.integers(0, self._size, count)]


def workload(session: Session, text: Path | None, count: int, max_tokens: int) -> Workload:
    """`count` requests of at most `max_tokens` new tokens. Raises BadConfig for a file that does not suit."""
    if text is not None:
        return _from_file(session, text, count, max_tokens)
    draw = RandomTokens(session)
    longest = session.context - max_tokens
    prompts = [draw(min(_RANDOM_TOKENS, longest)) for _ in range(count)]
    source = f"{len(prompts[0])} random tokens each"
    known = session.manifest.known_answer
    if known is not None and len(known.prompt) <= longest:
        prompts[0] = list(known.prompt)
        source = f"the known answer's prompt and {count - 1} of {source}"
    asked = tuple(Request(prompt=p, max_tokens=max_tokens, ignore_eos=True) for p in prompts)
    return Workload(source, asked)


def read_prompts(path: Path) -> list[tuple[int, str]]:
    """(line number, prompt) of each line that is not blank: plain text, or (.jsonl) objects with "prompt".

    Raises BadConfig naming the line.
    """
    try:
        if path.stat().st_size > MAX_TEXT_BYTES:
            raise BadConfig(f"--text {path}: larger than {MAX_TEXT_BYTES} bytes")
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadConfig(f"--text {path}: {why}") from None
    read = _json_prompt if path.suffix == ".jsonl" else str.strip
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append((number, read(line)))
            except msgspec.MsgspecError as error:
                raise BadConfig(
                    f'--text {path}, line {number}: expected an object such as {{"prompt": "..."}}: '
                    f"{error!s:.100}"
                ) from None
    if not found:
        raise BadConfig(f"--text {path}: holds no prompt, expected one a line")
    return found


def _json_prompt(line: str) -> str:
    return msgspec.json.decode(line, type=_Line).prompt


def _from_file(session: Session, path: Path, count: int, max_tokens: int) -> Workload:
    lines = read_prompts(path)
    make: Callable[[str], Request]
    if session.has_chat:
        kind = "chat turns"

        def make(text: str) -> Request:
            return session.chat_request([{"role": "user", "content": text}], max_tokens=max_tokens)
    else:
        kind = "prompts"

        def make(text: str) -> Request:
            return Request(prompt=session.tokenizer.encode(text), max_tokens=max_tokens)

    asked = []
    for number, text in islice(cycle(lines), count):
        try:
            request = make(text)
        except BadRequest as error:
            raise BadConfig(f"--text {path}, line {number}: {error}") from None
        if len(request.prompt) + max_tokens > session.context:
            raise BadConfig(
                f"--text {path}, line {number}: {len(request.prompt)} tokens, the context holds "
                f"{session.context - max_tokens} and {max_tokens} of the answer; shorten it or --max-tokens"
            )
        asked.append(request)
    used = min(len(lines), count)
    return Workload(f"{used} {kind} of {path.name}", tuple(asked))
