"""The manifest of an engine file: JSON in the safetensors metadata key "edge", read strictly.

Plane names are `<part>/<tensor>#<plane>`; blobs are U8 tensors named `blob/<name>`.
"""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program

SCHEMA = 1
Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class PartEntry(_Strict, frozen=True):
    """One model of the engine with the plan made for it."""

    program: Program
    plan: Plan


class Fingerprint(_Strict, frozen=True):
    """What the engine was made for. `abi` is the format table's hash, hex; backend is cpu or cuda."""

    profile: str
    backend: str
    compute_capability: str | None
    abi: Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")]


class Vocabulary(_Strict, frozen=True):
    """Ids that the runtime must know; text <-> ids is blob tokenizer.json, chat is blob chat_template."""

    bos: int | None
    eos: tuple[int, ...]
    pad: int | None
    size: int


class Quality(_Strict, frozen=True):
    """The engine against its f32 checkpoint on `tokens` tokens of `text` (a name, never content)."""

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


class Provenance(_Strict, frozen=True):
    """Where the numbers came from: enough to make the same engine again."""

    source: str  # folder name of the checkpoint, no path
    source_sha256: dict[str, Digest]  # file name -> digest
    model_type: str
    algorithm: str
    recipe: dict[str, str]  # options as given on the command line
    tools: dict[str, str]  # package -> version


class KnownAnswer(_Strict, frozen=True):
    """Greedy continuation that a healthy device must repeat: run before a robot trusts the engine."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    backend: str


class Manifest(_Strict, frozen=True):
    schema: int
    name: Name
    parts: dict[Name, PartEntry]
    fingerprint: Fingerprint
    vocabulary: Vocabulary
    blobs: dict[Name, int]  # true length in bytes, before padding
    quality: Quality | None
    provenance: Provenance
    known_answer: KnownAnswer | None
    planes: dict[str, Digest]  # in file order: sha256 of each plane and blob as stored, padding included
