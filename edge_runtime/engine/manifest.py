"""The manifest of an engine file: JSON in the safetensors metadata key "edge", read strictly.

Plane names are `<part>/<tensor>#<plane>`; blobs are U8 tensors named `blob/<name>`. An adapter's planes are
`adapter.<name>/<tensor>.a#w`, f16 (rank, cols), and `….b#w`, f16 (rows, rank), in C order.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, field

from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program

SCHEMA = 5
# Parts with a meaning of their own; any other name is a model that stands for itself.
LANGUAGE = "language"  # the target: the model that answers
DRAFT = "draft"  # a smaller model with the same vocabulary, which proposes tokens to the target
MEDUSA = "medusa-"  # medusa-1 .. medusa-N: heads on the target's last hidden row
MAX_HEADS = 16
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
Symbol = Annotated[str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,127}\Z")]  # of a kernel, as C has it
Release = Annotated[str, Meta(pattern=r"^[0-9]{1,2}\.[0-9]{1,2}\Z")]  # of CUDA or of the PTX ISA


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Origin(_Strict, frozen=True):
    """Where a matrix was in its checkpoint: the tensor's name without ".weight", and its first row there.

    Rows above 0 are those of fused projections. A PEFT folder names modules so, and the runtime reads it
    without knowing any model.
    """

    key: str
    row: int


class PartEntry(_Strict, frozen=True):
    """One model of the engine with the plan made for it; origins of its matrices and head by tensor name."""

    program: Program
    plan: Plan
    origins: dict[str, Origin] = field(default_factory=dict)


def medusa_parts(parts: Iterable[str]) -> list[str]:
    """The Medusa heads among `parts`, in order: head k predicts the token k places after the next."""
    return sorted((name for name in parts if name.startswith(MEDUSA)), key=lambda n: (len(n), n))


class AdapterTarget(_Strict, frozen=True):
    """The update of one tensor, see `engine.adapter.LowRank`."""

    rank: int
    scale: float


class AdapterEntry(_Strict, frozen=True):
    """A low-rank adapter (LoRA) for the part of that name: tensor -> update."""

    part: Name
    targets: dict[str, AdapterTarget]


class Fingerprint(_Strict, frozen=True):
    """What the engine was made for. `abi` is the format table's hash, hex; backend is cpu or cuda."""

    profile: str
    backend: str
    compute_capability: str | None
    abi: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]


class KernelEntry(_Strict, frozen=True):
    """A kernel of device code, of blocks of at most `threads`. shared_bytes: without what a launch adds.

    The others are the compiler's report, of a thread: stack and spills in bytes. None in PTX, where the
    driver decides.
    """

    threads: int
    shared_bytes: int
    registers: int | None = None
    stack_bytes: int | None = None
    spill_stores: int | None = None
    spill_loads: int | None = None


class DeviceCodeEntry(_Strict, frozen=True):
    """A blob of code for a GPU: a cubin for one sm (87 is compute capability 8.7), or PTX, which a driver
    that knows its ISA compiles for that sm and for later ones.

    cuda: release of the compiler. ptx: ISA of the PTX, and of what the cubin was made from. PTX ends with a
    NUL, as drivers want it.
    """

    blob: Name
    kind: Literal["cubin", "ptx"]
    sm: int
    ptx: Release
    cuda: Release
    nbytes: int
    kernels: dict[Symbol, KernelEntry]


def loaded_nbytes(entries: Sequence[DeviceCodeEntry]) -> int:
    """Bytes of the device code that a device loads: one entry, a cubin where there is one."""
    sizes = {kind: [e.nbytes for e in entries if e.kind == kind] for kind in ("cubin", "ptx")}
    return max(sizes["cubin"] or sizes["ptx"], default=0)


class Vocabulary(_Strict, frozen=True):
    """Ids that the runtime must know; text <-> ids is blob tokenizer.json, chat is blob chat_template."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    size: int


class TaskQuality(_Strict, frozen=True):
    """Share of a task file's cases that are answered rightly, 0 to 1, as `backend` runs the engine.

    accuracy_f32: that of the f32 checkpoint with an f32 cache, where it was measured.
    """

    name: str
    cases: int
    accuracy: float
    accuracy_f32: float | None
    backend: str


class Quality(_Strict, frozen=True):
    """The engine against its f32 checkpoint on `tokens` tokens of `text` (a name, never content).

    KL in nats. backend: "reference" computed the engine's logits with f32 activations, another one as it
    serves them. layer_cosine: by layer, cosine of the two models' residual streams after it, mean over
    tokens. bytes, bits_per_weight: of matrices, scales included and padding not. broken: one clause for each
    limit that --force overrode.
    """

    text: str
    tokens: int
    perplexity: float
    perplexity_f32: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    bits_per_weight: float
    bytes: int
    sqnr_db: dict[str, float]
    backend: str = "reference"
    layer_cosine: tuple[float, ...] = ()
    task: TaskQuality | None = None
    broken: tuple[str, ...] = ()


class CalibrationRecord(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The text whose activations chose the values: its name, tokens, and the digest of the statistics."""

    text: str
    tokens: int
    sha256: Digest


class Provenance(_Strict, frozen=True):
    """Where the numbers came from: enough to make the same engine again."""

    source: str  # folder name of the checkpoint, no path
    source_sha256: dict[str, Digest]  # file name -> digest
    model_type: str
    algorithm: str
    recipe: dict[str, str]  # options as given on the command line
    tools: dict[str, str]  # package -> version
    calibration: CalibrationRecord | None = None


class KnownAnswer(_Strict, frozen=True):
    """Greedy continuation that a healthy device must repeat: run before a robot trusts the engine."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    backend: str


class Manifest(_Strict, frozen=True, kw_only=True):
    schema: int
    name: Name
    parts: dict[Name, PartEntry]
    adapters: dict[Name, AdapterEntry] = field(default_factory=dict)
    fingerprint: Fingerprint
    vocabulary: Vocabulary
    blobs: dict[Name, int]  # true length in bytes, before padding
    device_code: tuple[DeviceCodeEntry, ...] = ()  # of a cuda engine: blobs among those
    quality: Quality | None
    provenance: Provenance
    known_answer: KnownAnswer | None
    planes: dict[str, Digest]  # in file order: sha256 of each plane and blob as stored, padding included
