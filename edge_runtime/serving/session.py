"""Session: a loaded engine serving requests. `step` is the whole runtime in six lines.

Several threads may submit, cancel and read answers; one of them at a time drives the steps, for all.
"""

from __future__ import annotations

import itertools
import os
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any

from edge_runtime.backends.protocol import Executor
from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.manifest import LANGUAGE, Manifest
from edge_runtime.engine.plan import KvPlan, MemoryPlan, Plan, StepShape
from edge_runtime.errors import BadRequest, NumericError
from edge_runtime.serving import sequence as sequences
from edge_runtime.serving.adapters import Adapters, ReadAdapter
from edge_runtime.serving.chat import ChatTemplate, check_messages
from edge_runtime.serving.constraint import Constraint
from edge_runtime.serving.grammar import GrammarCompiler
from edge_runtime.serving.known_answer import agreement, check_agreement
from edge_runtime.serving.loop import Loop
from edge_runtime.serving.metrics import Clock, Metrics
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.pages import PagePool
from edge_runtime.serving.prefix import PrefixTree
from edge_runtime.serving.prefix_file import Origin, engine_id
from edge_runtime.serving.prefix_pages import PrefixPages
from edge_runtime.serving.request import Completion, Request, Token, check_ids
from edge_runtime.serving.sampling import GREEDY, Sampling
from edge_runtime.serving.scheduler import Scheduler
from edge_runtime.serving.speculative import Proposer, Speculation
from edge_runtime.serving.stream import Stream
from edge_runtime.serving.tokenizer import Tokenizer
from edge_runtime.serving.traffic import Traffic
from edge_runtime.serving.warm_up import warm_up


class Session:
    """Made by `open_engine`; use it as a context manager. Every error it raises is an EdgeError.

    notices: what a user should be told about how the engine was opened, whole sentences. digest: sha256 of
    the engine's manifest. memory: the plan that was checked against this machine, in bytes. metrics,
    speculation: figures of what it served, and the policy of guessing ahead; `snapshot` has all figures in
    one place.
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
        proposer: Proposer | None = None,
        gated: bool = True,
        grammars: GrammarCompiler | None = None,
        part: str = LANGUAGE,
        read_adapter: ReadAdapter | None = None,
        notices: Sequence[str] = (),
        max_waiting: int = 64,
        clock: Clock = perf_counter,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.manifest = manifest
        self.digest = engine_id(manifest)
        self.tokenizer = tokenizer
        self.step_shape = step
        self.kv = kv
        self.memory = memory
        self.backend = backend
        self.notices = tuple(notices)
        self.metrics = Metrics()
        self.plan = plan  # as the builder made it; step_shape and kv are what was asked for at open
        self._mapped_bytes = mapped_bytes  # of weights, as they lie in the file
        self._executor = executor
        self._template = chat_template
        self._grammars = grammars
        self._clock = clock
        self._on_close = on_close
        self._pool = PagePool(kv.pages, kv.page_tokens)
        self._tree = PrefixTree(self._pool, parts=not kv.per_channel)
        width = -(-step.context // kv.page_tokens)
        pace = Pace(1.0 / plan.predicted.decode_tokens_per_s if plan.predicted.decode_tokens_per_s else 0.0)
        self.speculation = Speculation(proposer, pace, gated=gated, clock=clock)
        self._scheduler = Scheduler(
            step,
            self._pool,
            self._tree,
            pace,
            width=width,
            max_waiting=max_waiting,
            copy_page=self._copy_page,
            clock=clock,
        )
        self._traffic = Traffic(self._scheduler, self.metrics)
        self._loop = Loop(
            executor,
            self._scheduler,
            self.speculation,
            self._tree,
            pace,
            self.metrics,
            step=step,
            page_tokens=kv.page_tokens,
            width=width,
            clock=clock,
            emit=self._traffic.emit,
        )
        self._traffic.drive(self._loop)
        self._adapters = Adapters(executor, read_adapter)
        self._prefixes = PrefixPages(
            self._tree,
            self._pool,
            executor,
            Origin(
                engine=self.digest,
                part=part,
                backend=backend,
                k=kv.k,
                v=kv.v,
                page_tokens=kv.page_tokens,
                page_nbytes=executor.page_nbytes,
                adapter=None,
            ),
        )
        self._numbers = itertools.count(1)

    # --- one request, as most people use it ---

    def generate(self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, **options: Any) -> Stream:
        """Stream the continuation of a prompt, text or token ids as they are; the last event has the reason.

        options: fields of Request, such as max_tokens, stop, deadline, grammar. Closing or dropping the
        iterator cancels the request. Raises BadRequest and QueueFull at once.
        """
        return self.stream(Request.of(prompt, sampling, options))

    def complete(
        self, prompt: str | Sequence[int], sampling: Sampling = GREEDY, **options: Any
    ) -> Completion:
        """The whole continuation of a prompt; options and errors as of `generate`."""
        return self.answer(Request.of(prompt, sampling, options))

    def chat(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling = GREEDY, **options: Any
    ) -> Completion:
        """The assistant's answer to messages ``{"role": ..., "content": ...}``; options are Request's.

        Raises BadRequest when the engine has no chat template or the messages do not suit it.
        """
        return self.answer(self.chat_request(messages, sampling, **options))

    def chat_request(
        self, messages: Sequence[Mapping[str, Any]], sampling: Sampling = GREEDY, **options: Any
    ) -> Request:
        """The Request that `chat` makes, for `stream` and `submit`; options are Request's."""
        ids = self.chat_prompt(messages)
        return Request.of(ids, sampling, {"continues": False, **options})

    def chat_prompt(self, messages: Sequence[Mapping[str, Any]], *, answer: bool = True) -> list[int]:
        """Token ids of messages as the engine's chat template lays them out, ready for the answer, or
        (answer False) for further messages.
        """
        if self._template is None:
            raise BadRequest(
                "this engine has no chat template; give a prompt to generate() or complete() (edge-run --raw)"
            )
        return self._template.encode(check_messages(messages), self.tokenizer, answer=answer)

    def add_notice(self, notice: str) -> None:
        """One more sentence about how the engine was opened."""
        self.notices = (*self.notices, notice)

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
        return self._traffic.step()

    def cancel(self, number: int) -> bool:
        """End a request: all it holds is free when the running step ends. False when it had ended already."""
        return self._traffic.cancel(number)

    def stream(self, request: Request) -> Stream:
        """Submit now and return the iterator over its events, which drives the session while it waits."""
        return self._traffic.stream(self._submit(request, deque()))

    def answer(self, request: Request, on_text: Callable[[str], None] | None = None) -> Completion:
        """Submit and wait for the whole answer; `on_text` gets each piece of text as it comes."""
        sequence = self._submit(request, deque())
        seen = []
        with self._traffic.stream(sequence) as events:
            for event in events:
                seen.append(event)
                if on_text is not None and event.text:
                    on_text(event.text)
        return sequence.completion(seen)

    # --- prefixes and adapters ---

    def save_prefix(
        self,
        prefix: str | Sequence[int] | Sequence[Mapping[str, Any]],
        path: str | os.PathLike[str],
        *,
        adapter: str | None = None,
    ) -> int:
        """Run a prefix (text, token ids, or chat messages such as the system's) and write its whole KV pages
        to a file; returns how many tokens those hold. Raises BadRequest, BadPrefixFile.
        """
        ids = self._prefix_ids(prefix)
        done = self.answer(Request(prompt=ids, max_tokens=1, ignore_eos=True, adapter=adapter))
        if done.finish_reason == "error":
            raise NumericError(f"the prefix cannot be run: {done.error}")
        with self._traffic.between_steps():
            loaded = None if adapter is None else self._adapters.get(adapter)
            return self._prefixes.save(path, ids, adapter, loaded)

    def load_prefix(self, path: str | os.PathLike[str], *, adapter: str | None = None) -> int:
        """Put a saved prefix's pages into the cache; prompts that begin so go on from there.

        Returns how many tokens it holds. Raises BadPrefixFile when the file is damaged or belongs to another
        engine, backend or KV format, BadRequest when the cache has no room.
        """
        loaded = None if adapter is None else self._adapters.get(adapter)
        saved = self._prefixes.read(path, self.tokenizer.vocabulary.size, loaded)
        with self._traffic.between_steps():
            if adapter is not None and self._adapters.get(adapter) != loaded:
                raise BadRequest(f"the adapter {adapter!r:.60} was replaced meanwhile; load the prefix again")
            return self._prefixes.restore(saved, adapter)

    def load_adapter(self, name: str, adapter: str | os.PathLike[str] | Adapter) -> None:
        """Load a low-rank adapter, a PEFT folder or an Adapter, for requests that name it.

        Raises BadRequest for a name that is taken or an adapter that does not suit the model, BadCheckpoint
        for a folder that cannot be read.
        """
        adapter = self._adapters.read(adapter)
        with self._traffic.between_steps():
            self._adapters.load(name, adapter)

    def drop_adapter(self, name: str) -> None:
        """Free an adapter. Raises BadRequest while a request that uses it is in flight."""
        with self._traffic.between_steps(), self._traffic.gate:
            users = sum(s.request.adapter == name for s in self._traffic.live.values())
            if users:
                raise BadRequest(f"{users} requests in flight use the adapter {name!r}; wait for their end")
            self._adapters.drop(name)
            self._tree.drop(name)

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that requests may ask for."""
        return self._adapters.names

    # --- the session itself ---

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.step_shape.context

    @property
    def memory_used(self) -> int:
        """Bytes of weights, mapped or repacked, and of everything the executors hold."""
        return self._mapped_bytes + self._executor.memory_bytes + self.speculation.memory_bytes

    @property
    def in_flight(self) -> int:
        """Requests that have not ended."""
        return len(self._traffic.live)

    @property
    def pages_used(self) -> int:
        """KV pages that requests hold."""
        return self._pool.used

    @property
    def pages_kept(self) -> int:
        """KV pages that nobody holds, kept for prompts that begin alike; free to whoever needs them."""
        return self._pool.kept

    def snapshot(self) -> dict[str, Any]:
        """The figures of `metrics`, and the state of line, KV pages, speculation and memory (bytes)."""
        return {
            **self.metrics.snapshot(),
            "running": len(self._scheduler.running),
            "waiting": len(self._scheduler.waiting),
            "preempted": self._scheduler.preempted,
            "pages": self.kv.pages,
            "pages_used": self.pages_used,
            "pages_kept": self.pages_kept,
            "speculate": self.speculate,
            "memory_planned": self.memory.need,
            "memory_used": self.memory_used,
        }

    def forget_prefixes(self) -> None:
        """Empty the cache of prompts' beginnings. Raises BadRequest while requests are in flight."""
        with self._traffic.between_steps(), self._traffic.gate:
            if self.in_flight:
                raise BadRequest(f"{self.in_flight} requests are in flight; wait for their end")
            for root in (None, *self.adapters):
                self._tree.drop(root)

    @property
    def speculate(self) -> str:
        """How tokens are guessed ahead: off, draft, lookup or medusa."""
        return self.speculation.name

    def verify(self) -> None:
        """Repeat the engine's known answer. Raises NumericError when this device gives another one.

        On the backend and KV formats that the answer was made with, every token must be the same; elsewhere,
        as formats round differently, half of them. BadRequest when the engine has none.
        """
        known = self.manifest.known_answer
        if known is None:
            raise BadRequest("this engine carries no known answer; build it again to get one")
        same = known.backend == self.backend and (self.plan.kv.k, self.plan.kv.v) == (self.kv.k, self.kv.v)
        with self._traffic.between_steps():
            slot = self._scheduler.free_slot
            if slot is None:
                raise BadRequest("every sequence is in use; verify while fewer requests are in flight")
            agreed = agreement(self._executor, self._pool, self.step_shape, slot, known)
        check_agreement(agreed, known, self.backend, same)

    def warm_up(self) -> None:
        """Run every shape of step once, so that the first request is as fast as the next. No page, figure or
        cached prefix stays behind; where saved prefixes fill the cache, shapes that need more are left out.

        Raises NumericError when a step's numbers are not finite, BadRequest while requests are in flight.
        """
        with self._traffic.between_steps(), self._traffic.gate:
            if self.in_flight:
                raise BadRequest(f"{self.in_flight} requests are in flight; warm up before the first")
            warm_up(self._executor, self.speculation.proposer, self._pool, self.step_shape, self.tokenizer)

    def close(self) -> None:
        """End every request as cancelled and give the memory back. A second close does nothing."""
        if self._traffic.close():
            self.speculation.close()
            self._executor.close()
            self._on_close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- requests on their way ---

    def _submit(self, request: Request, events: deque[Token] | None) -> sequences.Sequence:
        prompt = self._prompt_ids(request.prompt)
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
        sequence = sequences.Sequence(
            next(self._numbers),
            request,
            prompt,
            limit,
            self.tokenizer,
            constraint=self._constraint(request),
            clock=self._clock,
        )
        sequence.events = events

        def take_adapter() -> None:  # then, for its number is another one's once it was dropped
            if request.adapter is not None:
                sequence.adapter = self._adapters.get(request.adapter).number

        self._traffic.join(sequence, take_adapter)
        return sequence

    def _constraint(self, request: Request) -> Constraint | None:
        if request.grammar is None:
            return None
        if self._grammars is None:
            raise BadRequest("this session has no tokenizer for grammars; open the engine with open_engine")
        return self._grammars.compile(request.grammar)

    def _prompt_ids(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer.encode(prompt)
            empty = not prompt
        else:
            ids = check_ids(prompt, self.tokenizer.vocabulary.size)
            empty = not ids
        if empty or not ids:
            raise BadRequest("the prompt is empty; give at least one character or token")
        return ids

    def _prefix_ids(self, prefix: str | Sequence[int] | Sequence[Mapping[str, Any]]) -> list[int]:
        if isinstance(prefix, str):
            return self._prompt_ids(prefix)
        messages = [m for m in prefix if isinstance(m, Mapping)]
        if messages:
            return self.chat_prompt(messages, answer=False)
        return self._prompt_ids([i for i in prefix if not isinstance(i, Mapping)])

    def _copy_page(self, source: int, target: int) -> None:
        self._executor.copy_page(source, target)
        self.speculation.copy_page(source, target)
