"""Messages to token ids by the engine's chat template, in Hugging Face's dialect of Jinja."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.errors import BadEngineFile, BadRequest, Unsupported, nearest
from edge_runtime.serving.tokenizer import Tokenizer, check_text
from edge_runtime.serving.worker import Worker

MAX_MESSAGES = 1024
RENDER_SECONDS = 2.0
_EDGE = "\ufdd0"  # a noncharacter: no text that is interchanged holds it
_ROLE = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_SCRIPT = Path(__file__).with_name("template_worker.py")


class ChatTemplate:
    """The template of one engine. Its process starts with the first chat and ends with `close`."""

    def __init__(self, source: bytes) -> None:
        try:
            self._source = source.decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadEngineFile(f"the chat template is not UTF-8 text (byte {error.start})") from None
        self._worker = Worker(_SCRIPT)
        self._lock = threading.Lock()

    def encode(
        self, messages: list[dict[str, str]], tokenizer: Tokenizer, *, answer: bool = True
    ) -> list[int]:
        """Ids of checked messages, up to where the assistant's answer begins (or, answer False, ends there).

        Special tokens come from the template alone: a message that spells one is kept as plain text. Raises
        BadRequest when the template refuses the messages, Unsupported when minijinja is not installed.
        """
        mark = f"{_EDGE}{secrets.token_hex(8)}{_EDGE}"  # of this call alone, so that no message can hold it
        guarded = [
            {**m, "content": mark + m["content"] + mark}
            if _EDGE in m["content"] or tokenizer.has_control(m["content"])
            else m
            for m in messages
        ]
        names = tokenizer.vocabulary
        eos = names.eos[0] if names.eos else None
        text = self.render(
            {
                "messages": guarded,
                "add_generation_prompt": answer,
                "tools": None,
                "documents": None,
                "bos_token": "" if names.bos is None else tokenizer.piece(names.bos),
                "eos_token": "" if eos is None else tokenizer.piece(eos),
                "pad_token": "" if names.pad is None else tokenizer.piece(names.pad),
            }
        )
        pieces = text.split(mark)
        if len(pieces) % 2 == 0 or any(_EDGE in piece for piece in pieces[::2]):
            raise BadRequest(
                "the chat template cuts a message that spells a special token; take that text out of it"
            )
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if piece:
                ids += tokenizer.encode(piece, start=False, control=i % 2 == 0)
        return ids

    def render(self, variables: dict[str, Any]) -> str:
        """The template's text, at most 1 MiB. Raises BadRequest on any error, and on a render without end."""
        with self._lock:
            answer = self._ask(variables)
        if "error" in answer:
            raise BadRequest(f"the chat template refuses the messages: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process. A later `render` starts another."""
        with self._lock:
            self._worker.close()

    def _ask(self, variables: dict[str, Any]) -> dict[str, Any]:
        if not self._worker.alive:
            self._start()
        answer = self._worker.ask(variables, RENDER_SECONDS)
        if answer is None:
            return {"error": f"it needs more than {RENDER_SECONDS:g} seconds or too much memory"}
        return answer

    def _start(self) -> None:
        answer = self._worker.start({"template": self._source})
        if answer is not None and "ready" in answer:
            return
        self._worker.close()
        if answer is not None and "missing" in answer:
            raise Unsupported("chat needs minijinja; install it with: pip install 'edge-runtime[chat]'")
        why = "its process does not start" if answer is None else answer["error"]
        raise BadRequest(f"the engine's chat template cannot be used: {why}; give a prompt instead")


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The messages as plain dicts of role and content. Raises BadRequest naming the message and the key."""
    if isinstance(messages, str | bytes) or not isinstance(messages, Sequence):
        raise BadRequest(f'messages is {type(messages).__name__}, expected a list of {{"role", "content"}}')
    if not 0 < len(messages) <= MAX_MESSAGES:
        raise BadRequest(f"{len(messages)} messages, expected 1 to {MAX_MESSAGES}")
    checked = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise BadRequest(f'message {i} is {type(message).__name__}, expected {{"role", "content"}}')
        for key in message:
            if key not in ("role", "content"):
                raise BadRequest(
                    f"message {i}: unknown key {key!r:.60}; {nearest(str(key), ('role', 'content'))}"
                )
        for key in ("role", "content"):
            if key not in message:
                raise BadRequest(f"message {i}: missing key {key!r}")
        role, content = message["role"], message["content"]
        if not isinstance(role, str) or not _ROLE.fullmatch(role):
            raise BadRequest(f"message {i}: role is {role!r:.60}, expected a word such as user")
        check_text(content, f"message {i}: content")
        checked.append({"role": role, "content": content})
    return checked
