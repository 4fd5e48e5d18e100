"""The seam between serving and execution: plain integer arrays in, logits or the likeliest tokens out.

A backend knows no request and the scheduler knows no byte. Bytes of KV pages belong to the executor;
which page belongs to whom is `serving/pages.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.device_code import TOP
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import DeviceCodeEntry
from edge_runtime.engine.packed import PackedTensor
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program

__all__ = [
    "TOP",
    "Backend",
    "DeviceCode",
    "Executor",
    "OnDevice",
    "PackedTensor",
    "Part",
    "StepBatch",
    "Support",
]


@dataclass(frozen=True, slots=True)
class Support:
    """The answer to "can you run this?", with a reason that a user can act on."""

    ok: bool
    why: str = ""


@dataclass(frozen=True, slots=True)
class DeviceCode:
    """What an engine carries for GPUs: its entries, and `read`, which gives the bytes of a blob.

    engine: the file, beside which what was measured on this device may lie.
    """

    entries: tuple[DeviceCodeEntry, ...]
    read: Callable[[str], memoryview]
    engine: Path | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """A program with its weights, the plan's sizes and device code where there is any: all that is loaded."""

    program: Program
    weights: Mapping[str, PackedTensor]
    kv: KvPlan
    step: StepShape
    code: DeviceCode | None = None


class OnDevice(Protocol):
    """An array in a GPU's memory, of torch, cupy, pycuda or a DeviceArray."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One forward pass over T tokens of S sequences. Integer arrays are int32 and C-contiguous.

    tokens (T,): ids. positions (T,): absolute position of each in its sequence.
    sequence (T,): row of page_tables of each token. page_tables (S, P): page of each run, -1 = none.
    logit_rows (L,): which tokens' logits are wanted, ascending.
    The key/value of token t is stored at its position before any token of the step attends, so a token
    sees every token of its sequence with a position not above its own.

    The rest has defaults for steps that need none of it:
    parents (T,), places (T,): a tree of tokens, several of which may share a position. Token t's key/value is
    stored at place `places[t]` of its sequence; it sees itself, its ancestors (parents[t] is the row of the
    token one position before it, -1 = that token is in the cache already) and, before its topmost ancestor's
    position p, every place below p. Keys are met in the order of positions, so that a path's numbers are
    those of the same tokens run as a plain sequence. Given both or neither.
    slots (S,): a number in [0, step.sequences) that a sequence keeps for life; None = its row. Where K is per
    channel, the keys of a sequence's open pages lie there unquantized (engine/kv.py). Its tokens in a step
    are then one run of consecutive positions, which begins at a page's start or goes on in a page that the
    slot holds: at least the last and the one before it, so that guesses can be rolled back. No trees then.
    adapters (S,): number of the adapter (of `add_adapter`) that the sequence uses, -1 = none.
    inputs f32 (T, width): rows for the program's `input` op; tokens are then not looked up. The cuda backend
    takes them in the GPU's memory too.
    """

    tokens: Array
    positions: Array
    sequence: Array
    page_tables: Array
    logit_rows: Array
    parents: Array | None = None
    places: Array | None = None
    slots: Array | None = None
    adapters: Array | None = None
    inputs: Array | OnDevice | None = None


class Executor(Protocol):
    """A loaded part. `forward` allocates nothing after the first call."""

    def forward(self, batch: StepBatch) -> Array:
        """Logits f32 (L, vocab), a view that the next call overwrites. Raises NumericError on NaN/Inf."""
        ...

    def likeliest(self, batch: StepBatch) -> Array:
        """`forward` for the likeliest token of each row of logits alone: int32 (L,), equals by their lowest
        id; a view that the next call overwrites. Where the logits lie on a device, they stay there.

        -1 stands for a row that is not finite, where that has not raised. Raises as `forward`.
        """
        ...

    def top(self, batch: StepBatch, k: int) -> tuple[Array, Array]:
        """`forward` for the `k` likeliest tokens of each row, 1 to TOP of the vocabulary's: ids int32 and
        their logits f32 (L, k), in descending order, equals by their lowest id; views as of `likeliest`.

        A row that is not finite, where that has not raised, has logits NaN. Raises as `forward`, BadRequest
        on another k.
        """
        ...

    def chain(self, batch: StepBatch, count: int) -> Array:
        """`count` steps with one token and one row of logits for each of S sequences, whose likeliest token
        is fed to the next step at the next position: int32 (count, S). Raises as `forward`.
        """
        ...

    def warm_up(self, sizes: Sequence[int], chains: Sequence[int] = ()) -> None:
        """Prepare what steps of so many tokens, and chains of so many sequences, would prepare when they
        first come. Runs none.
        """
        ...

    @property
    def hidden(self) -> Array:
        """Inputs of the logits op f32 (L, width) of the last step, a view that the next one overwrites."""
        ...

    def copy_page(self, source: int, target: int) -> None:
        """Copy one KV page in every layer (copy-on-write sharing)."""
        ...

    def move(self, pages: Array, sources: Array, targets: Array) -> None:
        """Copy keys and values from places to places of the sequence with the page-table row `pages`.

        After a tree was verified: its accepted path moves to its positions. Both ascend, sources[i] >=
        targets[i].
        """
        ...

    @property
    def page_nbytes(self) -> int:
        """Bytes of one KV page in all layers."""
        ...

    def read_page(self, page: int) -> Array:
        """The bytes of one KV page in all layers, u8 (page_nbytes,), a copy."""
        ...

    def write_page(self, page: int, data: Array) -> None:
        """What `read_page` gave, of this or another session with the same program, KV formats and backend.

        Raises BadRequest on a wrong size.
        """
        ...

    def add_adapter(self, adapter: Adapter) -> int:
        """Load a low-rank adapter; returns its number.

        Raises BadRequest on a tensor that is no linear's weight, or a wrong shape.
        """
        ...

    def drop_adapter(self, number: int) -> None:
        """Free an adapter; its number may be given again. Raises BadRequest for one that is not loaded."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes held beyond the mapped weights: KV arena, buffers, scratch, repacked weights, adapters."""
        ...

    def close(self) -> None: ...


class Backend(Protocol):
    """One way to execute Programs. The module of that name has `BACKEND: Backend`."""

    name: str
    packing: Mapping[str, str]  # format name -> the packing this backend reads without repacking
    exact: bool  # whether a token's numbers are the same bits whatever shares its step

    def available(self) -> Support: ...

    def supports(self, program: Program, formats: Mapping[str, str]) -> Support:
        """Whether it runs every op of the program with these tensor formats (tensor name -> format name)."""
        ...

    def check_code(self, code: DeviceCode) -> None:
        """Raise DeviceMismatch, naming both sides, where this machine's device does not run the code."""
        ...

    def memory(self) -> tuple[int, str]:
        """(bytes, source): what may be allocated now where this backend keeps weights and pages.

        What was opened to find out is kept for the next `load`; `release` gives it back where none comes.
        """
        ...

    def release(self) -> None: ...

    def load(self, part: Part, *, threads: int = 0) -> Executor:
        """Raises Unsupported, BackendUnavailable. threads 0 = all cores this process may use."""
        ...
