"""Who builds the cells of a fleet: processes of this machine, or the machines of a Ray cluster.

A crew starts cells and tells which have ended. Every cell has a process of its own, so that one that is
killed takes no other with it, and one that has ended gives all its memory back.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

from builders.fleet_cell import build_cell, failed
from builders.fleet_file import Cell
from edge_runtime.errors import BackendUnavailable, Unsupported

Outcome = dict[str, Any]  # fields of a Row
_GRACE = 5.0  # seconds that a process has to end after it was told to, and a cluster to answer


class Crew(Protocol):
    room: int  # cells that it can build at once

    def start(self, cell: Cell, force: bool, log: Path) -> None: ...

    def ended(self) -> list[tuple[Cell, Outcome]]:
        """Waits until at least one of the cells that were started has ended."""
        ...

    def stop(self) -> None:
        """End what is running."""
        ...


@dataclass(frozen=True, slots=True)
class _Running:
    cell: Cell
    process: BaseProcess
    receiver: Connection


class Processes:
    """`room` processes of this machine, started anew for each cell (spawn: nothing is inherited)."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._context = multiprocessing.get_context("spawn")
        self._running: list[_Running] = []

    def start(self, cell: Cell, force: bool, log: Path) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_send, args=(sender, cell.words, force, str(log)))
        process.start()
        sender.close()  # so that the receiver sees the end of a process that sends nothing
        self._running.append(_Running(cell, process, receiver))

    def ended(self) -> list[tuple[Cell, Outcome]]:
        ready = wait([one.receiver for one in self._running])
        done = [one for one in self._running if one.receiver in ready]
        self._running = [one for one in self._running if one not in done]
        return [(one.cell, _outcome(one)) for one in done]

    def stop(self) -> None:
        for one in self._running:
            one.process.terminate()
        for one in self._running:
            one.process.join(_GRACE)
            if one.process.is_alive():
                one.process.kill()
                one.process.join()
        self._running = []


class RayTasks:
    """A Ray cluster at `address`, or one that is started here; `room` None: as many as it has processors."""

    def __init__(self, address: str, room: int | None) -> None:
        """Raises Unsupported without ray, BackendUnavailable where no cluster answers."""
        try:
            import ray
        except ImportError:
            raise Unsupported("--ray needs Ray: pip install 'edge-runtime[fleet]'") from None
        self._ray = ray
        self._own = not ray.is_initialized()
        chosen = address or os.environ.get("RAY_ADDRESS") or None
        if self._own and chosen is not None:
            _reach(chosen)
        try:
            if self._own:
                ray.init(address=chosen, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise BackendUnavailable(f"no Ray cluster answers at {chosen}: {str(error)[:200]}") from None
        self.room = room or max(1, int(ray.cluster_resources().get("CPU", 1)))
        # A worker that is killed is an outcome, and one worker builds one engine, as the processes here do
        self._task: Any = ray.remote(num_cpus=1, max_calls=1, max_retries=0)(build_cell)
        self._running: dict[Any, Cell] = {}

    def start(self, cell: Cell, force: bool, log: Path) -> None:
        self._running[self._task.remote(list(cell.words), force, str(log))] = cell

    def ended(self) -> list[tuple[Cell, Outcome]]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1)
        return [(self._running.pop(one), self._get(one)) for one in ready]

    def stop(self) -> None:
        for one in self._running:
            self._ray.cancel(one, force=True)
        self._running = {}
        if self._own:
            self._ray.shutdown()

    def _get(self, one: Any) -> Outcome:
        try:
            found: Outcome = self._ray.get(one)
        except self._ray.exceptions.RayTaskError as error:
            return failed(f"its Ray task failed: {type(error.cause).__name__}: {error.cause}")
        except self._ray.exceptions.RayError as error:
            return failed(f"its Ray worker died ({type(error).__name__})")
        return found


def _reach(address: str) -> None:
    """Raise BackendUnavailable unless HOST:PORT answers: Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # "auto" and the like are Ray's to understand
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_GRACE).close()
    except (OSError, OverflowError) as error:
        raise BackendUnavailable(f"no Ray cluster answers at {address}: {error}") from None


def _send(sender: Connection, words: tuple[str, ...], force: bool, log: str) -> None:
    """Body of a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a Ctrl-C is the parent's, which ends its processes
    signal.signal(signal.SIGTERM, _stop)
    sender.send(build_cell(words, force, log))
    sender.close()


def _stop(number: int, _: object) -> None:
    """So that a build clears away what it began, undisturbed by a second signal."""
    signal.signal(number, signal.SIG_IGN)
    sys.exit(1)


def _outcome(one: _Running) -> Outcome:
    try:
        found: Outcome = one.receiver.recv()
    except (EOFError, OSError):
        one.process.join()
        return failed(f"its process {_end(one.process.exitcode)} before it was done")
    finally:
        one.receiver.close()
    one.process.join()
    return found


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


def crew_of(ray: str | None, jobs: int | None) -> Crew:
    """`ray`: address of a cluster, "" for RAY_ADDRESS or one of this machine, None for processes here."""
    if ray is not None:
        return RayTasks(ray, jobs)
    return Processes(jobs or max(1, (os.cpu_count() or 1) // 4))  # a build uses several cores at times
