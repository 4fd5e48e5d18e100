"""What a step of the cuda backend launches: a record for each kind of launch, by names, without addresses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from edge_runtime.engine.device_code import ROW_THREADS, Kernel, MatrixKernels
from edge_runtime.engine.ops import Attention

# Not buffers of the program: inputs of the logits op and its outputs, a row for each logit row of the step
ROWS, LOGITS = "@rows", "@logits"
MATRICES = 4  # of a launch
Rows = Literal["tokens", "logits"]


@dataclass(frozen=True, slots=True)
class EmbedLaunch:
    kernel: Kernel
    weight: str
    out: str
    scale: float
    first: int = 0  # the token id of the weight's first row


@dataclass(frozen=True, slots=True)
class PrepareLaunch:
    """Inputs of the linears after it, made of x (a norm of it, an activation); `out` where others read it."""

    kernel: Kernel
    kind: str
    shared: bool  # whether blocks may share a row
    width: int
    x: str
    y: str | None = None
    weight: str | None = None
    bias: str | None = None
    out: str | None = None
    eps: float = 0.0
    rows: Rows = "tokens"


@dataclass(frozen=True, slots=True)
class Product:
    """One matrix of a launch: out = scale * (W x + bias), or add + add_scale * (W x + bias).

    first: where its outputs begin in a row of LOGITS.
    """

    weight: str
    bias: str | None
    out: str
    scale: float = 1.0
    add: str | None = None
    add_scale: float = 1.0
    first: int = 0


@dataclass(frozen=True, slots=True)
class LinearLaunch:
    kernels: MatrixKernels
    products: tuple[Product, ...]
    cols: int
    rows: Rows = "tokens"


@dataclass(frozen=True, slots=True)
class Update:
    """What adapters add to a product: out += scale * (the adapter's scale * B (A x)), for rows that use one.

    op: its number among the program's linear and logits ops. scale: what the launch multiplied W x by.
    """

    op: int
    weight: str
    out: str
    scale: float
    first: int = 0  # of its outputs in a row of LOGITS


@dataclass(frozen=True, slots=True)
class LowRankLaunch:
    """A x of a launch's products, before it, or B (A x) added, after it; x (rows, cols) as it prepared it."""

    kernel: Kernel
    side: Literal["in", "out"]
    updates: tuple[Update, ...]
    x: str
    cols: int
    rows: Rows = "tokens"


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """per: what a share of the grid is: a run of `group` values (`threads` each), a token, or any values."""

    kernel: Kernel
    per: Literal["runs", "tokens", "values"]
    x_width: int
    out_width: int
    out: str
    x: str | None = None  # None: the step's inputs
    y: str | None = None
    weight: str | None = None
    bias: str | None = None
    group: int = 0
    threads: int = ROW_THREADS
    eps: float = 0.0
    scale: float = 0.0


@dataclass(frozen=True, slots=True)
class AnglesLaunch:
    kernel: Kernel
    inv_freq: str
    scale: float
    freqs: int
    table: int


@dataclass(frozen=True, slots=True)
class AppendLaunch:
    """Rotation of q and k in place by a table of angles, where asked for, and the store of k and v."""

    kernel: Kernel
    layer: int
    q: str | None
    key: str
    value: str
    table: int | None
    heads: int
    kv_heads: int
    freqs: int


@dataclass(frozen=True, slots=True)
class RotateLaunch:
    """Rotation alone, of a buffer that is no layer's q or k."""

    kernel: Kernel
    x: str
    table: int
    heads: int
    freqs: int


@dataclass(frozen=True, slots=True)
class AttentionLaunch:
    """split and merge for few tokens, looped for many: the same numbers."""

    split: Kernel
    merge: Kernel
    looped: Kernel
    op: Attention


@dataclass(frozen=True, slots=True)
class SampleLaunches:
    """What ends a step: logits checked and capped, the likeliest of each row, and a chain's next tokens."""

    finish: Kernel
    merge: Kernel
    advance: Kernel
    softcap: float


Launch = (
    EmbedLaunch
    | PrepareLaunch
    | LinearLaunch
    | LowRankLaunch
    | RowLaunch
    | AnglesLaunch
    | AppendLaunch
    | RotateLaunch
    | AttentionLaunch
)


@dataclass(frozen=True, slots=True)
class Lowered:
    """The launches of a step in order; `adapting`: of one some of whose sequences use adapters, the same
    numbers for all others; `moves`: by layer, what moves rows of its cache; `tables` of angles, by
    (inv_freq, scale)."""

    launches: tuple[Launch, ...]
    adapting: tuple[Launch, ...]
    sample: SampleLaunches
    moves: tuple[Kernel, ...]
    tables: tuple[tuple[str, float], ...]


def kernels_of(lowered: Lowered) -> tuple[Kernel, ...]:
    """Every kernel that a step may launch, each once, by name."""
    found: dict[str, Kernel] = {}
    for launch in (*lowered.launches, *lowered.adapting):
        for kernel in _kernels(launch):
            found[kernel.symbol] = kernel
    sample = lowered.sample
    for kernel in (sample.finish, sample.merge, sample.advance, *lowered.moves):
        found[kernel.symbol] = kernel
    return tuple(found[symbol] for symbol in sorted(found))


def _kernels(launch: Launch) -> Iterable[Kernel]:
    match launch:
        case LinearLaunch():
            return (*launch.kernels.split.values(), launch.kernels.deep, launch.kernels.tile)
        case AttentionLaunch():
            return (launch.split, launch.merge, launch.looped)
        case _:
            return (launch.kernel,)
