"""What a node asks of an engine and what comes back: plain records, which also travel to the worker."""

from __future__ import annotations

from typing import Literal

import msgspec


class _Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class ChatTurn(_Record, frozen=True):
    role: str
    content: str


class GrammarText(_Record, frozen=True):
    """What an answer must be: kind as of edge_runtime.Grammar."""

    kind: Literal["json", "regex", "ebnf"]
    text: str


class Job(_Record, frozen=True):
    """One answer to be generated: `prompt`, or `messages` in the layout of the engine's chat template.

    continues: the prompt goes on where the last such job (continues or keeps) ended. keeps: remember this
    conversation for one that continues. deadline: seconds from submitting. The other fields are those of
    edge_runtime.Request and Sampling.
    """

    prompt: str = ""
    messages: tuple[ChatTurn, ...] = ()
    continues: bool = False
    keeps: bool = False
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    logprobs: int | None = None
    deadline: float | None = None
    priority: int = 0
    grammar: GrammarText | None = None
    adapter: str | None = None
    speculate: bool = True


class Figures(_Record, frozen=True):
    """Of one answer: edge_runtime.Usage and the parts of Timing that a robot acts on, in ms and tokens/s."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    tokens_per_s: float = 0.0
    missed: bool = False


class Chosen(_Record, frozen=True):
    """One token with its probability and the likeliest ones: (id, probability, text)."""

    token: int
    top: tuple[tuple[int, float, str], ...] = ()


class Progress(_Record, frozen=True, tag="progress"):
    """New tokens of a job; texts of all of them, joined, are its text."""

    number: int
    text: str
    tokens: tuple[int, ...]
    probs: tuple[Chosen, ...] = ()


class Ended(_Record, frozen=True, tag="ended"):
    """A job's last event. reason: as of edge_runtime; error: why, when that is "error".

    code: "" or what a client may act on: "bad_request", "queue_full", "engine_lost" (the worker died).
    """

    number: int
    reason: Literal["stop", "length", "deadline", "cancelled", "error"]
    error: str = ""
    code: Literal["", "bad_request", "queue_full", "unsupported", "numeric", "engine_lost", "internal"] = ""
    figures: Figures = Figures()


Event = Progress | Ended
