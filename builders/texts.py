"""Texts that people give: plain files, folders of them, JSONL chat logs; their ids as the runtime has them.

A line of a JSONL file is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}. Chats go
through the model's own template in the sandbox that serves requests, so that what is learned or measured here
is, id for id, what a device will see.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.engine.folder import read_capped
from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadCheckpoint, BadConfig, BadEngineFile, BadRequest, Unsupported
from edge_runtime.serving.chat import ChatTemplate, check_messages
from edge_runtime.serving.tokenizer import Tokenizer

MAX_TEXT = 1 << 30  # bytes of one file: it is held in memory
PIECE = 1 << 17  # characters of a plain text that are tokenized in one go
SUFFIXES = (".txt", ".md", ".jsonl")  # what is read of a folder


@dataclass(frozen=True, slots=True)
class Passage:
    """One text, or the question and answer of one line; `where` names its place for errors.

    `messages` is a chat; else the text is `before` + `text`, and `before` is None for running text.
    """

    where: str
    text: str = ""
    before: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    @property
    def is_exchange(self) -> bool:
        """Whether something is asked and answered."""
        return bool(self.messages) or self.before is not None


class Speaker(Protocol):
    """What a checkpoint or an engine says of its text."""

    @property
    def tokenizer_json(self) -> bytes: ...

    @property
    def chat_template(self) -> str | None: ...


class ModelText:
    """Text to ids of one model. Use as a context manager: a chat template runs in a process of its own."""

    def __init__(self, source: Speaker, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        try:
            self._tokenizer = Tokenizer(source.tokenizer_json, vocabulary)
        except BadEngineFile as error:
            raise BadCheckpoint(str(error).replace("the engine's ", "")) from None
        self._template = None
        if source.chat_template is not None:
            self._template = ChatTemplate(source.chat_template.encode("utf-8"))

    def encode(self, text: str, where: str) -> list[int]:
        """Ids of running text; a special token that it spells stays text. Raises BadConfig naming `where`."""
        ids: list[int] = []
        for piece in _pieces(text):
            try:
                ids += self._tokenizer.encode(piece, start=False)
            except BadRequest as error:
                raise BadConfig(f"{where}: {error}") from None
        return ids

    def split(self, passage: Passage) -> tuple[list[int], list[int]]:
        """(ids that are given, ids that follow): question and answer, or nothing and the whole text.

        Raises BadConfig naming the line, Unsupported when chats need minijinja.
        """
        if passage.messages:
            return self._chat(passage)
        if passage.before is None:
            return [], self.encode(passage.text, passage.where)
        eos = self.vocabulary.eos[:1]
        return self.encode(passage.before, passage.where), [*self.encode(passage.text, passage.where), *eos]

    def question(self, content: str, where: str) -> list[int]:
        """Ids of a chat in which a user says `content`, up to where the answer begins. Raises as `split`."""
        return self._render([{"role": "user", "content": content}], where, answer=True)

    def _chat(self, passage: Passage) -> tuple[list[int], list[int]]:
        messages = list(passage.messages)
        before = self._render(messages[:-1], passage.where, answer=True)
        whole = self._render(messages, passage.where, answer=False)
        if messages[-1]["role"] != "assistant" or whole[: len(before)] != before:
            raise BadConfig(f"{passage.where}: the chat must end with the assistant's answer")
        return before, whole[len(before) :]

    def _render(self, messages: list[dict[str, str]], where: str, *, answer: bool) -> list[int]:
        if self._template is None:
            raise BadConfig(f"{where} is a chat, but the model has no chat template")
        try:
            return self._template.encode(messages, self._tokenizer, answer=answer)
        except BadRequest as error:
            raise BadConfig(f"{where}: {error}") from None
        except Unsupported as error:
            raise Unsupported(f"{where}: {error}") from None

    def __enter__(self) -> ModelText:
        return self

    def __exit__(self, *_: object) -> None:
        if self._template is not None:
            self._template.close()


def read_passages(path: Path) -> list[Passage]:
    """Passages of a file, or of a folder's .txt, .md and .jsonl files (its own, sorted by name), in order.

    Raises BadConfig naming the file and the line.
    """
    files = text_files(path) if path.is_dir() else [path]
    return [passage for file in files for passage in _file(file)]


def text_files(folder: Path) -> list[Path]:
    """What is read of a folder. Raises BadConfig when that is nothing."""
    files = sorted(p for p in folder.iterdir() if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise BadConfig(f"{folder} holds no file that ends in {', '.join(SUFFIXES)}")
    return files


def _file(path: Path) -> list[Passage]:
    try:
        text = read_capped(path, MAX_TEXT).decode("utf-8")
    except BadCheckpoint as error:
        reason = str(error).replace(", which no model needs", "; give a part of it")
        raise BadConfig(reason) from None
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path} is not UTF-8 text (byte {error.start})") from None
    if path.suffix != ".jsonl":
        return [Passage(path.name, piece) for piece in _pieces(text) if piece.strip()]
    return [
        _line(line, f"{path.name}, line {number}")
        for number, line in enumerate(text.split("\n"), 1)
        if line.strip()
    ]


def _line(line: str, where: str) -> Passage:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{where} is not JSON: {str(error)[:200]}") from None
    match row:
        case {"text": str(text), **rest} if not rest:
            return Passage(where, text)
        case {"prompt": str(prompt), "completion": str(completion), **rest} if not rest:
            return Passage(where, completion, prompt)
        case {"messages": [*messages], **rest} if not rest and len(messages) > 1:
            return Passage(where, messages=_messages(messages, where))
    raise BadConfig(
        f'{where}: expected {{"text"}}, {{"prompt", "completion"}} or {{"messages"}} of at least two'
    )


def _messages(messages: list[Any], where: str) -> tuple[dict[str, str], ...]:
    try:
        return tuple(check_messages(messages))
    except BadRequest as error:
        raise BadConfig(f"{where}: {error}") from None


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about PIECE characters that end with a line where they can: the tokenizer takes
    many times the memory of what it is given."""
    at = 0
    while at < len(text):
        stop = at + PIECE
        if stop < len(text):
            stop = (text.rfind("\n", at, stop) + 1) or stop
        yield text[at:stop]
        at = stop
