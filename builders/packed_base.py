"""A frozen model in its quantized planes: what an adapter is trained on, and later runs on.

Planes stay packed in memory; a matrix is decoded for one product and let go, in the backward pass once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from builders.encoding import encode
from builders.parts import Extras, open_contents
from builders.quantize import get_algorithm
from builders.role_formats import Formats
from builders.weights import EngineWeights
from edge_runtime.engine.file import Engine
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.manifest import LANGUAGE, Origin, Vocabulary
from edge_runtime.engine.packing import pack, unpack
from edge_runtime.engine.plan import TensorPlan
from edge_runtime.engine.program import Program

ROWS = "rows"


@dataclass(frozen=True, slots=True)
class Words:
    """What a ModelText needs of the base."""

    tokenizer_json: bytes
    chat_template: str | None
    vocabulary: Vocabulary


@dataclass(frozen=True, slots=True)
class PackedBase:
    """name: of the checkpoint. formats: tensor -> format. nbytes: of all planes as they lie in memory.

    digests: of the files or planes that it was read from, by name.
    """

    name: str
    program: Program
    origins: dict[str, Origin]
    formats: dict[str, str]
    weights: EngineWeights
    nbytes: int
    digests: dict[str, str]
    words: Words

    @property
    def parameters(self) -> int:
        return sum(spec.size for spec in self.program.tensors.values())


def read_base(folder: Path, formats: Formats) -> PackedBase:
    """A model folder, rounded to nearest as edge-build does it without calibration; trained or imported
    planes of those formats stay as they are. Raises as `open_contents`, ValueOutOfRange."""
    algorithm = get_algorithm("rtn")
    with open_contents(folder, Extras(), None) as contents:
        part, source = contents.parts[0], contents.target.source
        chosen = {name: formats.of_role(spec.role) for name, spec in part.program.tensors.items()}
        planes = {name: encode(part, name, get_format(fmt), algorithm).planes for name, fmt in chosen.items()}
        words = Words(source.tokenizer_json, source.chat_template, contents.target.vocabulary)
        program, origins = part.program, part.origins
        weights, nbytes = _packed(program, chosen, planes)
        return PackedBase(source.name, program, origins, chosen, weights, nbytes, source.sha256(), words)


def engine_base(engine: Engine) -> PackedBase:
    """The language part of an engine, its very planes (copied: they are kept row by row here)."""
    part, manifest = engine.part(LANGUAGE), engine.manifest
    planes = {
        name: unpack(held.format, held.packing, held.planes, held.rows, held.cols)
        for name, held in part.weights.items()
    }
    chosen = {name: held.format for name, held in part.weights.items()}
    digests = {name: d for name, d in manifest.planes.items() if name.startswith(f"{LANGUAGE}/")}
    template = bytes(engine.blob("chat_template")).decode() if "chat_template" in manifest.blobs else None
    words = Words(bytes(engine.blob("tokenizer.json")), template, manifest.vocabulary)
    weights, nbytes = _packed(part.program, chosen, planes)
    name = manifest.provenance.source
    return PackedBase(name, part.program, dict(part.origins), chosen, weights, nbytes, digests, words)


def _packed(
    program: Program, formats: Mapping[str, str], planes: Mapping[str, dict[str, Array]]
) -> tuple[EngineWeights, int]:
    """Codec planes as they will lie in memory, and their bytes."""
    flat = {}
    for tensor, found in planes.items():
        spec = program.tensors[tensor]
        flat[tensor] = pack(formats[tensor], ROWS, found, spec.rows, spec.cols)
    plans = {tensor: TensorPlan(fmt, ROWS) for tensor, fmt in formats.items()}
    nbytes = sum(plane.nbytes for found in flat.values() for plane in found.values())
    return EngineWeights(program, plans, flat.__getitem__), nbytes
