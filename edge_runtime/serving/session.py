"""Session: a loaded engine serving requests. `step` is the whole runtime in six lines.

Several threads may submit, cancel and read answers; one of them at a time drives the steps, for all.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np

from edge_runtime.backends.protocol import Executor, StepBatch
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Manifest
from edge_runtime.engine.plan import KvPlan, MemoryPlan, Plan, StepShape
from edge_runtime.errors import BadRequest, EdgeError, NumericError, QueueFull
from edge_runtime.serving import sequence as sequences
from edge_runtime.serving.chat import ChatTemplate, check_messages
from edge_runtime.serving.known_answer import agreement, check_agreement
from edge_runtime.serving.metrics import Metrics
from edge_runtime.serving.pages import PagePool
from edge_runtime.serving.request import (
    DEFAULT_MAX_TOKENS,
    Completion,
    FinishReason,
    Request,
    Token,
    Usage,
    check_ids,
)
from edge_runtime.serving.sampling import GREEDY, Choice, Sampling
from edge_runtime.serving.scheduler import Item, Scheduler
from edge_runtime.serving.stream import Stream
from edge_runtime.serving.tokenizer import Tokenizer

_WAIT = 0.05  # seconds until a thread that waits for another one's steps looks whether it should drive them


class Session:
    """Made by `open_engine`; use it as a context manager. Every error it raises is an EdgeError.

    notices: what a user should be told about how the engine was opened, whole sentences.
    memory: the plan that was checked against this machine, in bytes.
    """

    def __init__(
        self,
        *,
        manifest: Manifest,
        executor: Executor,
        tokenizer: Tokenizer,
        chat_template: ChatTemplate | None,
        plan: Plan,
        step: StepShape,
        kv: KvPlan,
        memory: MemoryPlan,
        mapped_bytes: int,
        backend: str,
        notices: Sequence[str] = (),
        max_waiting: int = 64,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.step_shape = step
        self.kv = kv
        self.memory = memory
        self.backend = backend
        self.notices = tuple(notices)
        self.metrics = Metrics()
        self._mapped_bytes = mapped_bytes  # of weights, as they lie in the file
        self._executor = executor
        self._template = chat_template
        self.plan = plan  # as the builder made it; step_shape and kv are what was asked for at open
        self._on_close = on_close
        self._pool = PagePool(kv.pages, kv.page_tokens)
        width = -(-step.context // kv.page_tokens)
        self._scheduler = Scheduler(step, self._pool, width, max_waiting)
        self._tables: Array = np.full((step.sequences, width), -1, np.int32)
        self._live: dict[int, sequences.Sequence] = {}
        self._numbers = itertools.count(1)
        self._gate = (
            threading.RLock()
        )  # reentrant, for a dropped Stream may cancel at any point; submitting and the set of live requests
        self._turn = threading.Lock()  # held by whoever drives a step
        self._stepped = threading.Condition()
        self._unread: deque[Token] = deque()  # events of requests that came through submit()
        self._cancels = False
        self._closed = False

    # --- one request, as most people use it ---

    def generate(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Stream:
        """Stream the continuation of a prompt, text or token ids as they are; the last event has the reason.

        Closing or dropping the iterator cancels the request. Raises BadRequest and QueueFull at once.
        """
        request = Request(
            prompt=prompt, sampling=sampling, max_tokens=max_tokens, stop=stop, stop_ids=stop_ids
        )
        return self.stream(request)

    def complete(
        self,
        prompt: str | Sequence[int],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Completion:
        """The whole continuation of a prompt. Raises as `generate` does."""
        request = Request(
            prompt=prompt, sampling=sampling, max_tokens=max_tokens, stop=stop, stop_ids=stop_ids
        )
        return self.answer(request)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling: Sampling = GREEDY,
        *,
        max_tokens: int = DEFAULT_MAX_TOKENS,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] = (),
    ) -> Completion:
        """The assistant's answer to messages ``{"role": ..., "content": ...}``.

        Raises BadRequest when the engine has no chat template or the messages do not suit it.
        """
        return self.answer(
            self.chat_request(messages, sampling, max_tokens=max_tokens, stop=stop, stop_ids=stop_ids)
        )

    def chat_request(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling = GREEDY, **options: Any
    ) -> Request:
        """The Request that `chat` makes, for `stream` and `submit`; options are Request's."""
        ids = self.chat_prompt(messages)
        return Request(prompt=ids, sampling=sampling, continues=False, **options)

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of messages as the engine's chat template lays them out, ready for the answer."""
        if self._template is None:
            raise BadRequest(
                "this engine has no chat template; give a prompt to generate() or complete() (edge-run --raw)"
            )
        return self._template.encode(check_messages(messages), self.tokenizer)

    @property
    def has_chat(self) -> bool:
        """Whether the engine carries a chat template."""
        return self._template is not None

    # --- several requests ---

    def submit(self, request: Request) -> int:
        """Put a request in line; its answer comes from `step`. Returns its number.

        Raises BadRequest, QueueFull; other requests are not touched by either.
        """
        return self._submit(request, None).id

    def step(self) -> list[Token]:
        """Run one step for all requests in flight; returns what is new of those that came through `submit`.

        A request whose numbers are not finite ends with the reason "error", others go on. `in_flight` says
        whether another step is of use.
        """
        self._turn.acquire()
        try:
            self._check_open()
            self._step()
            events = list(self._unread)
            self._unread.clear()
        finally:
            self._end_turn()
        return events

    def cancel(self, number: int) -> bool:
        """End a request: all it holds is free when the running step ends. False when it had ended already."""
        with self._gate:
            sequence = self._live.get(number)
            if sequence is None:
                return False
            sequence.cancelled = True
            self._cancels = True
        if self._turn.acquire(blocking=False):  # else whoever drives does it when the running step ends
            self._end_turn()
        return True

    def stream(self, request: Request) -> Stream:
        """Submit now and return the iterator over its events, which drives the session while it waits."""
        return self._stream(self._submit(request, deque()))

    def answer(self, request: Request, on_text: Callable[[str], None] | None = None) -> Completion:
        """Submit and wait for the whole answer; `on_text` gets each piece of text as it comes."""
        sequence = self._submit(request, deque())
        seen = []
        with self._stream(sequence) as events:
            for event in events:
                seen.append(event)
                if on_text is not None and event.text:
                    on_text(event.text)
        return _completion(sequence, seen)

    # --- the session itself ---

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.step_shape.context

    @property
    def memory_used(self) -> int:
        """Bytes of weights, mapped or repacked, and of everything the executor holds."""
        return self._mapped_bytes + self._executor.memory_bytes

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._live)

    @property
    def pages_used(self) -> int:
        """KV pages that requests hold."""
        return self._pool.used

    def verify(self) -> None:
        """Repeat the engine's known answer. Raises NumericError when this device gives another one.

        On the backend and KV formats that the answer was made with, every token must be the same; elsewhere,
        as formats round differently, half of them. BadRequest when the engine has none.
        """
        known = self.manifest.known_answer
        if known is None:
            raise BadRequest("this engine carries no known answer; build it again to get one")
        same = known.backend == self.backend and (self.plan.kv.k, self.plan.kv.v) == (self.kv.k, self.kv.v)
        with self._turn:
            self._check_open()
            agreed = agreement(self._executor, self._pool, self.step_shape, known)
        check_agreement(agreed, known, self.backend, same)

    def close(self) -> None:
        """End every request as cancelled and give the memory back. A second close does nothing."""
        with self._turn:
            if self._closed:
                return
            with self._gate:
                self._closed = True
                for sequence in self._live.values():
                    sequence.cancelled = True
                self._cancels = True
            self._sweep()
            self._executor.close()
            self._on_close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- a step ---

    def _step(self) -> None:
        self._sweep()
        items = self._scheduler.schedule()
        if items:
            rows = self._execute(items)
            choices = self._sample(items, rows)
            self._commit(items, choices)

    def _execute(self, items: list[Item]) -> list[Array | str | None]:
        """Logits (vocab,) of each item that chooses, None of the others, or why its numbers are not valid."""
        try:
            logits = self._executor.forward(self._batch(items))
        except NumericError as error:
            if len(items) == 1:
                return [str(error)]
            # One sequence spoiled the step. Appending the same keys and values again changes nothing, so each
            # runs alone, and only those that fail alone are at fault.
            alone = (self._execute([item])[0] for item in items)
            return [row.copy() if isinstance(row, np.ndarray) else row for row in alone]
        except Exception as error:
            self._fail_all(items, error)
            raise
        rows = iter(logits)
        return [next(rows) if item.choose else None for item in items]

    def _sample(self, items: list[Item], rows: list[Array | str | None]) -> list[Choice | str | None]:
        """A choice for each row of logits; whatever is no row stays as it is."""
        choices: list[Choice | str | None] = []
        for item, row in zip(items, rows, strict=True):
            if not isinstance(row, np.ndarray):
                choices.append(row)
            elif not np.isfinite(row).all():
                choices.append("the logits hold NaN or Inf; no token was emitted")
            else:
                choices.append(item.sequence.sampler.choose(row))
        return choices

    def _commit(self, items: list[Item], choices: list[Choice | str | None]) -> None:
        """Make the step's outcome part of each sequence; ended ones leave and free their pages."""
        self.metrics.steps += 1
        for item, choice in zip(items, choices, strict=True):
            sequence = item.sequence
            sequence.computed += item.count
            if isinstance(choice, str):
                self._end(sequence, "error", choice)
            elif choice is not None:
                event = sequence.commit(choice)
                gap = sequence.watch.token()
                self.metrics.token(gap)
                if gap is None:
                    self.metrics.first_token(sequence.watch.tokens[0] - sequence.watch.submitted)
                self._emit(sequence, event)

    def _batch(self, items: list[Item]) -> StepBatch:
        """The items as plain arrays; rows of logits are in the order of the items that choose."""
        counts = [item.count for item in items]
        last = np.cumsum(counts) - 1
        for row, item in zip(self._tables, items, strict=False):
            assert item.sequence.pages is not None  # the scheduler made room
            row[:] = item.sequence.pages.row
        return StepBatch(
            tokens=np.concatenate(
                [item.sequence.tokens[item.start : item.start + item.count] for item in items]
            ).astype(np.int32),
            positions=np.concatenate(
                [np.arange(item.start, item.start + item.count, dtype=np.int32) for item in items]
            ),
            sequence=np.repeat(np.arange(len(items), dtype=np.int32), counts),
            page_tables=self._tables[: len(items)],
            logit_rows=last[[item.choose for item in items]].astype(np.int32),
        )

    # --- requests on their way ---

    def _submit(self, request: Request, events: deque[Token] | None) -> sequences.Sequence:
        prompt = self._prompt_ids(request)
        for i in request.stop_ids:
            if not 0 <= i < self.tokenizer.vocabulary.size:
                raise BadRequest(
                    f"stop id {i} is no token, expected 0 to {self.tokenizer.vocabulary.size - 1}"
                )
        room = min(self.context, self.kv.pages * self.kv.page_tokens)
        if len(prompt) >= room:
            what = "context" if room == self.context else "KV cache"
            raise BadRequest(
                f"the prompt has {len(prompt)} tokens, the {what} holds {room} and the answer needs one "
                "at least; shorten the prompt, or build the engine with a longer --context"
            )
        limit = min(request.max_tokens, room - len(prompt))
        sequence = sequences.Sequence(next(self._numbers), request, prompt, limit, self.tokenizer)
        sequence.events = events
        with self._gate:
            self._check_open()
            try:
                self._scheduler.submit(sequence)
            except QueueFull:
                self.metrics.refused += 1
                raise
            self._live[sequence.id] = sequence
            self.metrics.prompt_tokens += len(prompt)
        return sequence

    def _prompt_ids(self, request: Request) -> list[int]:
        if isinstance(request.prompt, str):
            ids = self.tokenizer.encode(request.prompt)
            empty = not request.prompt
        else:
            ids = check_ids(request.prompt, self.tokenizer.vocabulary.size)
            empty = not ids
        if empty or not ids:
            raise BadRequest("the prompt is empty; give at least one character or token")
        return ids

    def _wait_for(self, events: deque[Token]) -> None:
        """Run a step, or wait for the one that another thread runs."""
        if self._turn.acquire(blocking=False):
            try:
                if not events:  # the driver before us may have filled it
                    self._check_open()
                    self._step()
            finally:
                self._end_turn()
        else:
            with self._stepped:
                if not events:
                    self._stepped.wait(_WAIT)

    def _end_turn(self) -> None:
        """Let another thread drive; a cancel that came in meanwhile and found the turn taken is done here."""
        self._turn.release()
        with self._stepped:
            self._stepped.notify_all()
        while self._cancels and self._turn.acquire(blocking=False):
            try:
                self._sweep()
            finally:
                self._turn.release()

    def _stream(self, sequence: sequences.Sequence) -> Stream:
        events = sequence.events
        assert events is not None  # stream() and answer() gave it one
        return Stream(sequence.id, events, lambda: self._wait_for(events), self.cancel)

    def _sweep(self) -> None:
        """End the requests that were cancelled since the last step."""
        if not self._cancels:
            return
        with self._gate:
            self._cancels = False
            cancelled = [s for s in self._live.values() if s.cancelled]
        for sequence in cancelled:
            self._end(sequence, "cancelled")

    def _end(self, sequence: sequences.Sequence, reason: FinishReason, error: str | None = None) -> None:
        self._emit(sequence, sequence.end(reason, error))

    def _emit(self, sequence: sequences.Sequence, event: Token) -> None:
        if event.finish_reason is not None:
            sequence.watch.end()
            with self._gate:
                self._scheduler.remove(sequence)
                self._live.pop(sequence.id, None)
            self.metrics.finished[event.finish_reason] += 1
        (self._unread if sequence.events is None else sequence.events).append(event)

    def _fail_all(self, items: list[Item], error: Exception) -> None:
        """The backend itself failed: every sequence of the step ends, so that nothing stays behind."""
        why = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
        for item in items:
            self._end(item.sequence, "error", why)

    def _check_open(self) -> None:
        if self._closed:
            raise BadRequest("this session is closed; open the engine again")


def _completion(sequence: sequences.Sequence, seen: list[Token]) -> Completion:
    last = seen[-1]
    assert last.finish_reason is not None  # a stream ends with it
    chosen = [event for event in seen if event.token is not None]
    return Completion(
        text="".join(event.text for event in seen),
        tokens=tuple(sequence.answer),
        finish_reason=last.finish_reason,
        timing=sequence.watch.timing(sequence.prompt_tokens),
        usage=Usage(sequence.prompt_tokens, len(sequence.answer)),
        logprobs=tuple(event.logprob for event in chosen if event.logprob is not None),
        top_logprobs=tuple(event.top for event in chosen if event.logprob is not None),
        error=last.error,
    )
