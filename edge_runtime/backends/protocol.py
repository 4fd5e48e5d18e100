"""The seam between serving and execution: plain integer arrays in, logits out.

A backend knows no request and the scheduler knows no byte. Bytes of KV pages belong to the executor;
which page belongs to whom is `serving/pages.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from edge_runtime.engine.formats import Array
from edge_runtime.engine.packed import PackedTensor
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program

__all__ = ["Backend", "Executor", "PackedTensor", "Part", "StepBatch", "Support"]


@dataclass(frozen=True, slots=True)
class Support:
    """The answer to "can you run this?", with a reason that a user can act on."""

    ok: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A program with its weights and the plan's sizes: all a backend needs to load."""

    program: Program
    weights: Mapping[str, PackedTensor]
    kv: KvPlan
    step: StepShape


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass over T tokens of S sequences. All arrays int32 and C-contiguous.

    tokens (T,): ids. positions (T,): absolute position of each in its sequence.
    sequence (T,): row of page_tables of each token. page_tables (S, P): page of each run, -1 = none.
    logit_rows (L,): which tokens' logits are wanted, ascending.
    The key/value of token t is stored at its position before any token of the step attends, so a token
    sees every token of its sequence with a position not above its own.
    """

    tokens: Array
    positions: Array
    sequence: Array
    page_tables: Array
    logit_rows: Array


class Executor(Protocol):
    """A loaded part. `forward` allocates nothing after the first call."""

    def forward(self, batch: StepBatch) -> Array:
        """Logits f32 (L, vocab), a view that the next call overwrites. Raises NumericError on NaN/Inf."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy one KV page in every layer (copy-on-write sharing)."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes held beyond the mapped weights: KV arena, buffers, scratch, repacked weights."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """One way to execute Programs. The module of that name has `BACKEND: Backend`."""

    name: str
    packing: Mapping[str, str]  # format name -> the packing this backend reads without repacking

    def available(self) -> Support: ...

    def supports(self, program: Program, formats: Mapping[str, str]) -> Support:
        """Whether it runs every op of the program with these tensor formats (tensor name -> format name)."""
        ...

    def load(self, part: Part, *, threads: int = 0) -> Executor:
        """Raises Unsupported, BackendUnavailable. threads 0 = all cores this process may use."""
        ...
