"""What a session is asked and what it answers: plain records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from edge_runtime.errors import BadRequest, nearest
from edge_runtime.serving.grammar import Grammar
from edge_runtime.serving.sampling import GREEDY, Sampling

FinishReason = Literal["stop", "length", "deadline", "cancelled", "error"]
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
DEFAULT_MAX_TOKENS = 256
MAX_DEADLINE = 86_400.0  # seconds
MAX_PRIORITY = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """prompt: text (its special-token names stay plain text) or token ids as they are.

    stop: the answer ends before any of these strings; stop_ids: and at any of these tokens, beside the
    model's own end tokens unless ignore_eos. continues: decode the answer as the prompt's continuation, which
    keeps the space before its first word.

    deadline: seconds from submitting; the answer ends in time with what it has. priority: a higher one goes
    first, and may push a lower one back into the line. grammar: what the answer must look like. adapter: name
    of a low-rank adapter that the session has loaded. speculate: False decodes this request plainly.

    Raises BadRequest naming the field.
    """

    prompt: str | Sequence[int]
    sampling: Sampling = GREEDY
    max_tokens: int = DEFAULT_MAX_TOKENS
    stop: Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_eos: bool = False
    continues: bool = True
    deadline: float | None = None
    priority: int = 0
    grammar: Grammar | None = None
    adapter: str | None = None
    speculate: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.sampling, Sampling):
            raise BadRequest(f"sampling is {type(self.sampling).__name__}, expected edge_runtime.Sampling")
        if not _is_int(self.max_tokens) or self.max_tokens < 1:
            raise BadRequest(f"max_tokens is {self.max_tokens!r:.60}, expected an integer of at least 1")
        if isinstance(self.stop, str) or not isinstance(self.stop, Sequence):
            raise BadRequest(f"stop is {type(self.stop).__name__}, expected a list of strings")
        if not isinstance(self.stop_ids, Sequence) or not all(_is_int(i) for i in self.stop_ids):
            raise BadRequest("stop_ids must be a list of token ids")
        if len(self.stop) > MAX_STOPS or len(self.stop_ids) > MAX_STOPS:
            raise BadRequest(f"at most {MAX_STOPS} stop strings and as many stop ids are taken")
        for text in self.stop:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise BadRequest(f"a stop string is {text!r:.60}, expected 1 to {MAX_STOP_CHARS} characters")
        self._check_service()
        # The request is looked at again at each step: what the caller's lists become does not matter.
        object.__setattr__(self, "stop", tuple(self.stop))
        object.__setattr__(self, "stop_ids", tuple(self.stop_ids))

    def _check_service(self) -> None:
        """How the request is to be served: deadline, priority, grammar, adapter."""
        if self.deadline is not None:
            number = isinstance(self.deadline, int | float) and not isinstance(self.deadline, bool)
            if not number or not 0 < self.deadline <= MAX_DEADLINE:
                raise BadRequest(
                    f"deadline is {self.deadline!r:.60}, expected seconds above 0 and up to {MAX_DEADLINE}"
                )
        if not _is_int(self.priority) or abs(self.priority) > MAX_PRIORITY:
            raise BadRequest(
                f"priority is {self.priority!r:.60}, expected an integer of at most {MAX_PRIORITY} either way"
            )
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise BadRequest(
                f"grammar is {type(self.grammar).__name__}, expected edge_runtime.Grammar, such as "
                "Grammar.json_schema({...})"
            )
        if self.grammar is not None and self.ignore_eos:
            raise BadRequest("ignore_eos and a grammar exclude each other: the grammar says where it may end")
        if self.adapter is not None and not isinstance(self.adapter, str):
            raise BadRequest(f"adapter is {type(self.adapter).__name__}, expected the name of an adapter")

    @classmethod
    def of(cls, prompt: str | Sequence[int], sampling: Sampling, options: Mapping[str, Any]) -> Request:
        """A Request from a prompt, a sampling and other fields by name. Raises BadRequest on unknown ones."""
        known = {f.name for f in fields(cls)} - {"prompt", "sampling"}
        for name in options:
            if name not in known:
                raise BadRequest(f"unknown option {name!r:.60} of a request; {nearest(name, known)}")
        return cls(prompt=prompt, sampling=sampling, **options)


@dataclass(frozen=True, slots=True)
class Token:
    """One event of a request's answer. Texts of all events, joined, are the answer's text.

    token: None where the event only ends the request. logprob, top: as Sampling.logprobs asked.
    finish_reason: set on the last event, with the answer's usage and timing; error: why, when the reason is
    "error".
    """

    request: int
    text: str
    token: int | None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    error: str | None = None
    usage: Usage | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds, on the monotonic clock. ttft: from submit to the first token; queue: the wait in it.

    itl: between one token and the next, percentiles (0 with fewer than two tokens). tokens_per_s: of the
    tokens after the first. prefill_tokens_per_s: prompt tokens that were run over the time from admission to
    the first. missed: the end came after the deadline.
    """

    queue_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0
    itl_p50_ms: float = 0.0
    itl_p95_ms: float = 0.0
    itl_p99_ms: float = 0.0
    tokens_per_s: float = 0.0
    prefill_tokens_per_s: float = 0.0
    missed: bool = False


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that the prompt became, start token included, and that were generated.

    cached_tokens: of the prompt, found in the KV cache. drafted, accepted: by speculation.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer. tokens: every generated id, also the one that ended it; logprobs: one entry a token."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timing: Timing
    usage: Usage
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    error: str | None = None


def check_ids(ids: Sequence[int], vocab_size: int) -> list[int]:
    """The ids as ints. Raises BadRequest naming the first that is not a token of the model."""
    if isinstance(ids, bytes | bytearray | memoryview) or not isinstance(ids, Sequence):
        raise BadRequest(f"the prompt is {type(ids).__name__}, expected text or a list of token ids")
    for at, i in enumerate(ids):
        if not _is_int(i) or not 0 <= i < vocab_size:
            raise BadRequest(
                f"token {at} of the prompt is {i!r:.60}, expected an id from 0 to {vocab_size - 1}"
            )
    return [int(i) for i in ids]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
