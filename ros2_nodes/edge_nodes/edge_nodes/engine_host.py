"""EngineHost: a Session of edge_runtime, one thread that drives its steps, and listeners of its events."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from math import exp
from pathlib import Path
from typing import Any

from edge_nodes.engine import EngineOptions, Facts, Listener, State
from edge_nodes.facts import facts_of
from edge_nodes.job import ChatTurn, Chosen, Ended, Figures, Job, Progress
from edge_nodes.requests import request_of
from edge_runtime import (
    BadRequest,
    EdgeError,
    QueueFull,
    Session,
    Token,
    Unsupported,
    open_engine,
)


class _Live:
    """A job whose request is in flight."""

    __slots__ = ("ids", "job", "listener", "number")

    def __init__(self, number: int, job: Job, listener: Listener, ids: list[int]) -> None:
        self.number = number
        self.job = job
        self.listener = listener
        self.ids = ids  # prompt, then what was generated


class EngineHost:
    """An Engine in this process; see engine.Engine for what each method does."""

    def __init__(self) -> None:
        self._session: Session | None = None
        self._facts: Facts | None = None
        self._live: dict[int, _Live] = {}  # by the session's number
        self._numbers: dict[int, int] = {}  # ours to the session's
        self._remembered: list[int] = []
        self._book = threading.RLock()
        self._work = threading.Condition(self._book)
        self._thread: threading.Thread | None = None
        self._closing = False
        self._stepping: float | None = None  # since when a step is under way
        self._figures: dict[str, Any] = {}
        self.restarts = 0
        self.why = ""

    @property
    def state(self) -> State:
        return "closed" if self._session is None else "open"

    @property
    def step_seconds(self) -> float:
        """How long the running step has been under way; 0 between steps."""
        since = self._stepping
        return 0.0 if since is None else time.monotonic() - since

    def open(self, options: EngineOptions) -> Facts:
        if self._session is not None:
            raise BadRequest("an engine is open already; close it first")
        kv = f"{options.cache_k or 'f16'},{options.cache_v or 'f16'}"
        if bool(options.cache_k) != bool(options.cache_v):
            raise BadRequest("cache.type_k and cache.type_v are set together, or both left as planned")
        session = open_engine(
            options.path,
            backend=options.backend,
            threads=options.threads,
            kv=kv if options.cache_k else None,
            context=options.context or None,
            parallel=options.parallel or None,
            speculate=options.speculate,
            draft_length=options.draft_length or None,
            adapters=dict(options.adapters),
            prefix=options.prefix or None,
            memory_limit=options.memory_limit or None,
            max_waiting=options.max_waiting,
        )
        self._closing = False
        self._session = session
        self._facts = facts_of(session, Path(options.path))
        self._thread = threading.Thread(target=self._drive, name="engine", daemon=True)
        self._thread.start()
        return self._facts

    def prove(self) -> None:
        session = self._open()
        if session.manifest.known_answer is not None:
            session.verify()
        session.warm_up()

    def submit(self, number: int, job: Job, listener: Listener) -> None:
        try:
            with self._work:
                session = self._open()
                ids = self._prompt(session, job)
                sent = session.submit(request_of(job, ids))
                self._live[sent] = _Live(number, job, listener, list(ids))
                self._numbers[number] = sent
                self._work.notify()
        except Exception as error:
            listener(_refused(number, error))

    def cancel(self, number: int) -> None:
        with self._work:
            sent = self._numbers.get(number)
            if sent is not None and self._session is not None:
                self._session.cancel(sent)
                self._work.notify()

    def facts(self) -> Facts:
        self._open()
        assert self._facts is not None  # set with the session
        return self._facts

    def tokenize(self, text: str) -> list[int]:
        return list(self._open().tokenizer.encode(text))

    def detokenize(self, tokens: Sequence[int]) -> str:
        session = self._open()
        size = session.tokenizer.vocabulary.size
        for token in tokens:
            if not 0 <= token < size:
                raise BadRequest(f"{token} is no token, expected 0 to {size - 1}")
        return session.tokenizer.decode(list(tokens))

    def save_prefix(self, text: str, messages: Sequence[ChatTurn], path: str, adapter: str) -> int:
        session = self._open()
        what: Any = text or [{"role": m.role, "content": m.content} for m in messages]
        return session.save_prefix(what, path, adapter=adapter or None)

    def forget(self) -> None:
        self._remembered = []
        self._open().forget_prefixes()

    def figures(self) -> dict[str, Any]:
        session = self._session
        if session is not None and self.step_seconds < 0.5:
            try:
                self._figures = session.snapshot()
            except Exception:  # closed meanwhile: the newest figures are these
                return self._figures
        return self._figures

    def close(self) -> None:
        with self._work:
            session, thread = self._session, self._thread
            self._closing = True
            self._work.notify()
        if session is None:
            return
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._work:
            left, self._live = list(self._live.values()), {}
            self._numbers.clear()
            self._session = self._facts = self._thread = None
            self._remembered = []
        session.close()
        del session
        gc.collect()  # a session is a ring of objects: its mapped weights go now, not some day
        for live in left:
            live.listener(Ended(number=live.number, reason="cancelled"))

    # --- inside ---

    def _open(self) -> Session:
        if self._session is None:
            raise BadRequest("no engine is open")
        return self._session

    def _prompt(self, session: Session, job: Job) -> list[int]:
        if job.messages:
            return session.chat_prompt([{"role": m.role, "content": m.content} for m in job.messages])
        if not job.prompt:
            raise BadRequest("the prompt is empty; give at least one character")
        kept = self._remembered if job.continues else []
        return [*kept, *session.tokenizer.encode(job.prompt, start=not kept)]

    def _drive(self) -> None:
        while True:
            with self._work:
                while not self._live and not self._closing:
                    self._work.wait()
                if self._closing:
                    return
                session = self._session
            assert session is not None  # closed by `close` after this thread's end only
            self._stepping = time.monotonic()
            try:
                events = session.step()
            except Exception as error:  # of the backend: every request of the step has ended, with events
                events = []
                self.why = f"{type(error).__name__}: {error}"
            finally:
                self._stepping = None
            self._hand_out(session, events)

    def _hand_out(self, session: Session, events: Sequence[Token]) -> None:
        by_request: dict[int, list[Token]] = {}
        for event in events:
            by_request.setdefault(event.request, []).append(event)
        for number, some in by_request.items():
            with self._work:
                live = self._live.get(number)
            if live is None:  # of a warm-up
                continue
            text = "".join(e.text for e in some)
            tokens = tuple(e.token for e in some if e.token is not None)
            live.ids += tokens
            if text or tokens:
                probs = tuple(_chosen(e, session) for e in some) if live.job.logprobs else ()
                live.listener(Progress(number=live.number, text=text, tokens=tokens, probs=probs))
            if some[-1].finish_reason is not None:
                self._finish(number, live, some[-1])

    def _finish(self, number: int, live: _Live, last: Token) -> None:
        with self._work:
            self._live.pop(number, None)
            self._numbers.pop(live.number, None)
            if live.job.keeps and last.finish_reason in ("stop", "length"):
                self._remembered = live.ids
        assert last.finish_reason is not None  # the last event's mark
        failed = last.finish_reason == "error"
        live.listener(
            Ended(
                number=live.number,
                reason=last.finish_reason,
                error=last.error or "",
                code="numeric" if failed else "",
                figures=_figures(last),
            )
        )


def _chosen(event: Token, session: Session) -> Chosen:
    top = tuple((i, exp(p), session.tokenizer.piece(i)) for i, p in event.top)
    return Chosen(token=-1 if event.token is None else event.token, top=top)


def _figures(last: Token) -> Figures:
    usage, timing = last.usage, last.timing
    if usage is None or timing is None:
        return Figures()
    return Figures(
        **asdict(usage),
        queue_ms=timing.queue_ms,
        ttft_ms=timing.ttft_ms,
        total_ms=timing.total_ms,
        tokens_per_s=timing.tokens_per_s,
        missed=timing.missed,
    )


def _refused(number: int, error: Exception) -> Ended:
    code = "internal"
    if isinstance(error, QueueFull):
        code = "queue_full"
    elif isinstance(error, Unsupported):
        code = "unsupported"
    elif isinstance(error, EdgeError):
        code = "bad_request"
    why = str(error) if isinstance(error, EdgeError) else f"{type(error).__name__}: {error}"
    return Ended(number=number, reason="error", error=why, code=code)  # type: ignore[arg-type]
