"""SupervisedEngine: an engine in a process of its own, replaced when it dies, hangs or talks nonsense.

Every job of a lost worker ends at once with the reason; the node goes on answering meanwhile.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec

import edge_runtime
from edge_nodes.engine import EngineOptions, Facts, Listener, State
from edge_nodes.job import ChatTurn, Ended, Job, Progress
from edge_nodes.protocol import Answer, Beat, Call, Cancel, Channel, ProtocolError, Submit, from_worker
from edge_runtime import BackendUnavailable, BadRequest, EdgeError

CALL_SECONDS = 30.0
OPEN_SECONDS = 600.0  # a large engine from a slow disk; beats are watched all the while
FIRST_BACK_OFF, LONGEST_BACK_OFF = 0.1, 10.0
HEALTHY_SECONDS = 60.0  # after which a worker's death counts as the first one again


class _Worker:
    """One child process and what it owes us."""

    def __init__(self, command: Sequence[str]) -> None:
        ours, theirs = socket.socketpair()
        folder = str(Path(__file__).resolve().parent.parent)
        path = os.pathsep.join(filter(None, (folder, os.environ.get("PYTHONPATH"))))
        with theirs:
            self.process = subprocess.Popen(
                [*command, "--fd", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
            )
        self.channel = Channel(ours, from_worker)
        self.began = self.heard = time.monotonic()
        self.step_s = 0.0
        self.calls: dict[int, Future[Answer]] = {}
        self.listeners: dict[int, Listener] = {}
        self.reader: threading.Thread | None = None
        self.lost = False


class SupervisedEngine:
    """An Engine; see engine.Engine for its methods. on_change(state, why): called on a thread of its own."""

    def __init__(
        self,
        *,
        nice: int = 0,
        heartbeat_timeout: float = 1.5,
        start_timeout: float = 15.0,
        step_limit: float = 2.0,
        max_restarts: int = 5,
        on_change: Callable[[str, str], None] = lambda state, why: None,
        command: Sequence[str] = (sys.executable, "-m", "edge_nodes.engine_worker"),
    ) -> None:
        self._command = [*command, "--nice", str(nice)]
        self._heartbeat_timeout = heartbeat_timeout
        self._start_timeout = start_timeout  # of silence, until it is open
        self._step_limit = step_limit
        self._max_restarts = max_restarts
        self._on_change = on_change
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._worker: _Worker | None = None
        self._watcher: threading.Thread | None = None
        self._ids = itertools.count(1)
        self._options: EngineOptions | None = None
        self._facts: Facts | None = None
        self._proved = False
        self._closing = False
        self._figures: dict[str, Any] = {}
        self._in_a_row = 0
        self.state: State = "closed"
        self.why = ""
        self.restarts = 0

    # --- Engine ---

    def open(self, options: EngineOptions) -> Facts:
        with self._lock:
            if self.state != "closed":
                raise BadRequest("an engine is open already; close it first")
            self.state, self.why, self._closing = "opening", "", False
            self._proved, self._in_a_row, self._options = False, 0, options
            worker = self._start()
        try:
            self._facts = self._open_in(worker, options)
        except BaseException:
            self.close()
            raise
        with self._lock:
            if worker.lost:
                why = self.why
                self.close()
                raise BackendUnavailable(f"the engine's process was lost while it opened: {why}")
            self.state = "open"
            return self._facts

    def prove(self) -> None:
        self._ask("prove", seconds=OPEN_SECONDS)
        self._proved = True

    def submit(self, number: int, job: Job, listener: Listener) -> None:
        with self._lock:
            worker = self._worker
            ready = self.state == "open" and worker is not None and not worker.lost
            if ready and worker is not None:
                worker.listeners[number] = listener
        if not ready or worker is None:
            why = f"the engine is {self.state}: {self.why}" if self.why else f"the engine is {self.state}"
            listener(Ended(number=number, reason="error", error=why, code="engine_lost"))
            return
        try:
            worker.channel.send(Submit(number=number, job=job))
        except ProtocolError as error:
            with self._lock:
                mine = worker.listeners.pop(number, None)
            if mine is not None:
                mine(Ended(number=number, reason="error", error=str(error), code="bad_request"))
        except OSError as error:
            self._lose(worker, f"its process takes no messages: {error}")

    def cancel(self, number: int) -> None:
        worker = self._worker
        if worker is not None and number in worker.listeners:
            try:
                worker.channel.send(Cancel(number=number))
            except OSError as error:
                self._lose(worker, f"its process takes no messages: {error}")

    def facts(self) -> Facts:
        return msgspec.convert(self._ask("facts"), Facts, strict=False)

    def tokenize(self, text: str) -> list[int]:
        return msgspec.convert(self._ask("tokenize", text), list[int])

    def detokenize(self, tokens: Sequence[int]) -> str:
        return msgspec.convert(self._ask("detokenize", list(tokens)), str)

    def save_prefix(self, text: str, messages: Sequence[ChatTurn], path: str, adapter: str) -> int:
        turns = [msgspec.to_builtins(m) for m in messages]
        return msgspec.convert(
            self._ask("save_prefix", text, turns, path, adapter, seconds=OPEN_SECONDS), int
        )

    def forget(self) -> None:
        self._ask("forget")

    def figures(self) -> dict[str, Any]:
        return self._figures

    @property
    def worker_pid(self) -> int:
        """Of the process at hand; 0 where there is none."""
        worker = self._worker
        return 0 if worker is None else worker.process.pid

    def close(self) -> None:
        with self._lock:
            if self.state == "closed":
                return
            self._closing = True
            worker, self._worker = self._worker, None
            watcher, self._watcher = self._watcher, None
            self.state, self.why = "closed", ""
            self._wake.notify_all()
        if worker is not None:
            self._bury(worker, "cancelled", "")
        for thread in (watcher, None if worker is None else worker.reader):
            if thread is not None and thread is not threading.current_thread():
                thread.join()
        self._figures = {}

    # --- inside ---

    def _ask(self, method: str, *arguments: Any, seconds: float = CALL_SECONDS) -> Any:
        with self._lock:
            worker = self._worker
            if worker is None or self.state != "open":
                raise BackendUnavailable(f"the engine is {self.state}: {self.why or 'open it first'}")
        return self._ask_of(worker, method, arguments, seconds)

    def _ask_of(self, worker: _Worker, method: str, arguments: Sequence[Any], seconds: float) -> Any:
        call = Call(id=next(self._ids), method=method, arguments=list(arguments))
        future: Future[Answer] = Future()
        with self._lock:
            if worker.lost:
                raise BackendUnavailable(f"the engine's process was lost: {self.why}")
            worker.calls[call.id] = future
        try:
            worker.channel.send(call)
            answer = future.result(seconds)
        except OSError as error:
            self._lose(worker, f"its process takes no messages: {error}")
            raise BackendUnavailable(f"the engine's process was lost: {self.why}") from None
        except TimeoutError:
            raise BackendUnavailable(f"the engine did not answer {method} within {seconds:g} s") from None
        finally:
            with self._lock:
                worker.calls.pop(call.id, None)
        if answer.error:
            raise _error_of(answer)
        return msgspec.json.decode(answer.value)

    def _open_in(self, worker: _Worker, options: EngineOptions) -> Facts:
        found = self._ask_of(worker, "open", [msgspec.to_builtins(options)], OPEN_SECONDS)
        return msgspec.convert(found, Facts, strict=False)

    def _start(self) -> _Worker:
        """Under the lock."""
        worker = _Worker(self._command)
        self._worker = worker
        worker.reader = threading.Thread(target=self._read, args=(worker,), name="worker", daemon=True)
        worker.reader.start()
        if self._watcher is None:
            self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)
            self._watcher.start()
        return worker

    def _read(self, worker: _Worker) -> None:
        try:
            while (message := worker.channel.receive()) is not None:
                worker.heard = time.monotonic()
                self._take(worker, message)
            why = "its process ended"
        except ProtocolError as error:
            why = f"its process talks nonsense: {error}"
        except OSError as error:
            why = f"its process is gone: {error}"
        self._lose(worker, why)

    def _take(self, worker: _Worker, message: Any) -> None:
        if isinstance(message, Beat):
            worker.step_s, self._figures = message.step_s, message.figures
        elif isinstance(message, Answer):
            with self._lock:
                future = worker.calls.pop(message.id, None)
            if future is not None:
                future.set_result(message)
        else:
            with self._lock:
                if isinstance(message, Progress):
                    listener = worker.listeners.get(message.number)
                else:
                    listener = worker.listeners.pop(message.number, None)
            if listener is not None:
                listener(message)

    def _watch(self) -> None:
        """Watches beats, and replaces a lost worker after its back-off."""
        while True:
            with self._wake:
                if self._closing:
                    return
                self._wake.wait(0.05)
                if self._closing:
                    return
                worker, state = self._worker, self.state
            if worker is not None and not worker.lost and state != "failed":
                silence = time.monotonic() - worker.heard
                # A busy robot starts and opens slowly, and nobody's goal waits there
                limit = self._heartbeat_timeout if state == "open" else self._start_timeout
                if worker.process.poll() is not None:
                    self._lose(worker, f"its process ended with code {worker.process.returncode}")
                elif silence > limit:
                    self._lose(worker, f"its process has been silent for {silence:.1f} s")
                elif worker.step_s > self._step_limit and self.state == "open":
                    self._lose(worker, f"a step has been running for {worker.step_s:.1f} s")
            elif state == "lost":
                self._replace()

    def _lose(self, worker: _Worker, why: str) -> None:
        with self._lock:
            if worker.lost or self._closing:
                return
            worker.lost = True
            healthy = time.monotonic() - worker.began > HEALTHY_SECONDS
            self._in_a_row = 1 if healthy else self._in_a_row + 1
            opening = self.state == "opening"
            self.why = why
            if not opening:
                self.state = "lost"
                if self._in_a_row > self._max_restarts:
                    self.state = "failed"
                    self.why = (
                        f"{why}; it was replaced {self._max_restarts} times in a row: see the node's log, "
                        "then clean up and configure the node again"
                    )
            state, why = self.state, self.why
            self._wake.notify_all()
        self._bury(worker, "error", why)
        if not opening:
            self._on_change(state, why)

    def _bury(self, worker: _Worker, reason: Any, why: str) -> None:
        """Kill it; its jobs end and its calls are answered."""
        worker.lost = True
        worker.process.kill()
        worker.channel.close()
        worker.process.wait()
        with self._lock:
            listeners, worker.listeners = worker.listeners, {}
            calls, worker.calls = worker.calls, {}
        code = "engine_lost" if reason == "error" else ""
        for number, listener in listeners.items():
            listener(Ended(number=number, reason=reason, error=why, code=code))
        for call, future in calls.items():
            future.set_result(
                Answer(id=call, error="BackendUnavailable", why=f"the engine's process was lost: {why}")
            )

    def _replace(self) -> None:
        pause = min(LONGEST_BACK_OFF, FIRST_BACK_OFF * 2 ** (self._in_a_row - 1))
        with self._wake:
            self._wake.wait_for(lambda: self._closing, pause)
            if self._closing or self._options is None:
                return
            worker = self._start()
            options = self._options
        threading.Thread(target=self._reopen, args=(worker, options), name="reopen", daemon=True).start()
        with self._lock:
            self.state = "opening" if self.state == "lost" else self.state

    def _reopen(self, worker: _Worker, options: EngineOptions) -> None:
        try:
            facts = self._open_in(worker, options)
            if self._proved:
                self._ask_of(worker, "prove", [], OPEN_SECONDS)
        except EdgeError as error:
            with self._lock:
                if self.state == "opening" and self._worker is worker:
                    self.state = "lost"  # so that the loss counts
            self._lose(worker, f"it cannot be opened again: {error}")
            with self._lock:
                if worker.lost and self.state == "opening":
                    self.state = "lost"
            return
        with self._lock:
            if worker.lost or self._closing:
                return
            self._facts = facts
            self.state, self.why = "open", ""
            self.restarts += 1
        self._on_change("open", "")


def _error_of(answer: Answer) -> EdgeError:
    """The worker's error, of its own class where that has one argument."""
    kind = getattr(edge_runtime, answer.error, EdgeError)
    if not (isinstance(kind, type) and issubclass(kind, EdgeError)):
        kind = EdgeError
    try:
        return kind(answer.why)
    except TypeError:  # DoesNotFit has figures; its text says them too
        return EdgeError(answer.why)
