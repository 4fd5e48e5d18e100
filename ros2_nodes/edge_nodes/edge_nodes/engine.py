"""The seam between nodes and engines: what a node may ask, in whichever process the engine runs.

Nothing here knows ROS. `Engine` has two implementations: `engine_host.EngineHost` in this process, and
`supervisor.SupervisedEngine` in a child that is watched and replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from edge_nodes.job import ChatTurn, Event, Job

State = Literal["closed", "opening", "open", "lost", "failed"]
Listener = Callable[[Event], None]


class EngineOptions(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Arguments of edge_runtime.open_engine; "" and 0 mean what the engine was planned for."""

    path: str
    backend: str = "auto"
    threads: int = 0
    context: int = 0
    parallel: int = 0
    cache_k: str = ""
    cache_v: str = ""
    speculate: str = "auto"
    draft_length: int = 0
    memory_limit: int = 0
    max_waiting: int = 64
    adapters: tuple[tuple[str, str], ...] = ()  # (name, PEFT folder)
    prefix: str = ""


class Facts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an opened engine is; the fields of edge_interfaces/srv/GetMetadata."""

    name: str
    model: str
    model_type: str
    backend: str
    profile: str
    digest: str
    engine_path: str
    context: int
    parallel: int
    vocabulary: int
    cache_type_k: str
    cache_type_v: str
    speculative: str
    adapters: tuple[str, ...]
    has_chat: bool
    memory_planned: int
    memory_used: int
    bits_per_weight: float
    perplexity: float
    perplexity_f32: float
    notices: tuple[str, ...]


class Engine(Protocol):
    """Every method may be called from any thread. Errors are EdgeErrors, except where "never raises" is said.

    state: "lost" while a worker that died or hung is being replaced, "failed" when that was given up.
    why: a sentence for the states lost and failed, else "".
    restarts: times that the worker was replaced.
    """

    @property
    def state(self) -> State: ...
    @property
    def why(self) -> str: ...
    @property
    def restarts(self) -> int: ...

    def open(self, options: EngineOptions) -> Facts:
        """Open the engine and reserve its memory; blocks."""

    def prove(self) -> None:
        """Repeat the known answer, where the engine has one, and run every shape of step once; blocks. A
        worker that is replaced later is proved again before it serves."""

    def submit(self, number: int, job: Job, listener: Listener) -> None:
        """Never raises and never waits. The listener gets the job's events on a thread of the engine, in
        order, and `Ended` exactly once, whatever happens; it must not block. number: the caller's, never used
        twice."""

    def cancel(self, number: int) -> None:
        """End a job at the end of the running step; its listener gets Ended. Never raises, never waits."""

    def facts(self) -> Facts: ...

    def tokenize(self, text: str) -> list[int]: ...

    def detokenize(self, tokens: Sequence[int]) -> str: ...

    def save_prefix(self, text: str, messages: Sequence[ChatTurn], path: str, adapter: str) -> int:
        """Tokens that the file holds."""

    def forget(self) -> None:
        """Drop the remembered conversation and cached prefixes of prompts."""

    def figures(self) -> dict[str, Any]:
        """The newest `Session.snapshot()`, {} before the first. Never raises, never waits."""

    def close(self) -> None:
        """End all jobs as cancelled, free all. A second close does nothing; `open` may follow. Never
        raises."""
