"""A request on its way through a session: what it has, what it may still have, and its text so far."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from time import perf_counter

from edge_runtime.engine.formats import Array
from edge_runtime.serving.constraint import Constraint
from edge_runtime.serving.gate import Record
from edge_runtime.serving.metrics import Clock, Stopwatch
from edge_runtime.serving.ngrams import NgramIndex
from edge_runtime.serving.pages import PageTable
from edge_runtime.serving.prefix import Node
from edge_runtime.serving.request import Completion, FinishReason, Request, Token, Usage
from edge_runtime.serving.sampling import Choice, Sampler
from edge_runtime.serving.stopping import StopText
from edge_runtime.serving.tokenizer import Detokenizer, Tokenizer


class Sequence:
    """`tokens` is prompt and answer; the first `computed` of them are in the KV cache, the first
    `draft_computed` in the draft model's.
    """

    def __init__(
        self,
        number: int,
        request: Request,
        prompt: list[int],
        limit: int,
        tokenizer: Tokenizer,
        *,
        constraint: Constraint | None = None,
        adapter: int = -1,
        clock: Clock = perf_counter,
    ) -> None:
        self.id = number
        self.request = request
        self.prompt_tokens = len(prompt)
        self.limit = limit  # tokens of the answer at most
        self.tokens = list(prompt)
        self.computed = 0
        self.draft_computed = 0
        self.cached = 0  # tokens of the prompt that were found in the cache
        self.last_step = 0
        self.pages: PageTable | None = None
        self.nodes: list[Node] = []  # of its leading full pages
        self.copied: Node | None = None  # whose page it was given a part of, if there was room
        self.slot = -1  # in [0, step.sequences) while it runs
        self.adapter = adapter
        self.cancelled = False
        self.finish_reason: FinishReason | None = None
        self.watch = Stopwatch(clock)
        if request.deadline is not None:
            self.watch.due = self.watch.submitted + request.deadline
        self.sampler = Sampler(request.sampling, prompt, tokenizer.vocabulary.size, constraint)
        self.record = Record()  # of speculation
        self.hidden: Array | None = None  # the row that the last token was chosen from, for Medusa heads
        self.ngrams: NgramIndex | None = None  # of look-up, and where it found the end of `tokens`
        self.found: int | None = None
        self.events: deque[Token] | None = None  # where a waiting generate() reads; None when step() is read
        self._ends = frozenset(request.stop_ids) | (
            frozenset() if request.ignore_eos else frozenset(tokenizer.vocabulary.eos)
        )
        # What a grammar allowed must come out as it is, a leading space too.
        whole = request.continues or request.grammar is not None
        self._text = Detokenizer(tokenizer, prompt if whole else None)
        self._stop = StopText(request.stop)

    @property
    def due(self) -> float | None:
        """When its deadline is, on its clock."""
        return self.watch.due

    @property
    def pending(self) -> int:
        """Tokens to run before the next one can be chosen: 1 when decoding, the rest of the prompt before."""
        return len(self.tokens) - self.computed

    @property
    def reach(self) -> int:
        """Tokens that the cache may have to hold: the answer's last token is never fed back."""
        return self.prompt_tokens + self.limit - 1

    @property
    def left(self) -> int:
        """Tokens that the answer may still have."""
        return self.prompt_tokens + self.limit - len(self.tokens)

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_tokens :]

    def is_end(self, token: int) -> bool:
        """Whether the answer ends with this token."""
        return token in self._ends

    def commit(self, choice: Choice, done: bool = False) -> Token:
        """Take a chosen token; the event says whether the request ends with it. done: nothing may follow."""
        self.tokens.append(choice.token)
        text = ""
        reason: FinishReason | None = None
        if choice.token in self._ends:
            reason = "stop"
        else:
            text = self._stop.add(self._text.add(choice.token))
            if not self._stop.found and done:
                reason = "stop"
            elif not self._stop.found and self.left == 0:
                reason = "length"
        if reason is not None:
            text += self._stop.add(self._text.finish())
        if self._stop.found:
            reason = "stop"
        elif reason is not None:
            text += self._stop.finish()
        self.finish_reason = reason
        return Token(self.id, text, choice.token, choice.logprob, choice.top, reason)

    def end(self, reason: FinishReason, error: str | None = None) -> Token:
        """End it from outside; what was held back of its text is certain now."""
        self.finish_reason = reason
        text = self._stop.add(self._text.finish())
        if not self._stop.found:
            text += self._stop.finish()
        return Token(self.id, text, None, finish_reason=reason, error=error)

    def closed(self, event: Token) -> Token:
        """The last event with the figures of the whole answer, once its watch has stopped."""
        usage = Usage(
            self.prompt_tokens, len(self.answer), self.cached, self.record.drafted, self.record.accepted
        )
        return replace(event, usage=usage, timing=self.watch.timing(self.prompt_tokens - self.cached))

    def completion(self, seen: list[Token]) -> Completion:
        """The whole answer, from all its events."""
        last = seen[-1]
        assert last.finish_reason is not None  # a stream ends with it
        assert last.usage is not None and last.timing is not None  # which `closed` gave it
        chosen = [event for event in seen if event.token is not None]
        return Completion(
            text="".join(event.text for event in seen),
            tokens=tuple(self.answer),
            finish_reason=last.finish_reason,
            timing=last.timing,
            usage=last.usage,
            logprobs=tuple(event.logprob for event in chosen if event.logprob is not None),
            top_logprobs=tuple(event.top for event in chosen if event.logprob is not None),
            error=last.error,
        )
