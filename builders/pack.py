"""The last phase: blobs, manifest and the atomic finish; and the checks of the target before any work."""

from __future__ import annotations

import re
import shutil
from importlib import metadata
from pathlib import Path

import msgspec

from builders.sources import Source
from edge_runtime.engine.formats import abi_hash
from edge_runtime.engine.header import HEADER_LIMIT, OPENING
from edge_runtime.engine.header import header_reserve as reserve_for
from edge_runtime.engine.manifest import (
    SCHEMA,
    Fingerprint,
    KnownAnswer,
    Manifest,
    PartEntry,
    Provenance,
    Quality,
    Vocabulary,
)
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BuildError

_TOOLS = ("edge-runtime", "numpy", "safetensors", "tokenizers")


def engine_name(text: str) -> str:
    """A name that a manifest takes: letters, digits, dot, dash and underscore, at most 64."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-.")[:64] or "model"


def check_target(target: Path, model: Path, *, force: bool) -> None:
    """Refuse, before any work, a target that cannot or should not be written. Raises BuildError."""
    folder = target.parent
    if not folder.is_dir():
        raise BuildError(f"{folder} is not a folder; make it first, or choose another -o")
    if target.is_dir():
        raise BuildError(f"{target} is a folder; -o names the engine file")
    if model.is_dir() and target.resolve().is_relative_to(model.resolve()):
        raise BuildError(f"{target} lies inside the model folder, which is only read; choose another -o")
    if force or not target.exists():
        return
    try:
        with target.open("rb") as file:
            head = file.read(8 + len(OPENING))
    except OSError as error:
        raise BuildError(f"{target} cannot be read: {error.strerror}") from None
    if head[8:] != OPENING:
        raise BuildError(f"{target} exists and is not an engine; choose another -o, or --force to replace it")


def check_disk(target: Path, plan: Plan, source: Source) -> None:
    """Raise BuildError when the folder has no room for the engine beside the old one."""
    need = plan.memory.weights + len(source.tokenizer_json) + HEADER_LIMIT
    free = shutil.disk_usage(target.parent).free
    if free < need:
        raise BuildError(
            f"{target.parent} has {free / 2**20:.0f} MiB free, the engine needs {need / 2**20:.0f} MiB; "
            "make room or choose another -o"
        )


def header_reserve(program: Program, plan: Plan) -> int:
    """Bytes to keep free for the header of an engine with this one part."""
    part = len(msgspec.json.encode(PartEntry(program=program, plan=plan)))
    return reserve_for(4 * len(plan.tensors), part + 48 * len(plan.tensors))


def finish(
    writer: EngineWriter,
    part: str,
    source: Source,
    program: Program,
    plan: Plan,
    profile: Profile,
    vocabulary: Vocabulary,
    quality: Quality | None,
    known_answer: KnownAnswer | None,
    algorithm: str,
    recipe: dict[str, str],
) -> Manifest:
    """Phase 6. Add the blobs, write the manifest, put the file in place. No time and no path enters it."""
    blobs = {"tokenizer.json": source.tokenizer_json}
    if source.chat_template:
        blobs["chat_template"] = source.chat_template.encode()
    for name, data in blobs.items():
        writer.add(f"blob/{name}", data)
    manifest = Manifest(
        schema=SCHEMA,
        name=engine_name(source.name),
        parts={part: PartEntry(program=program, plan=plan)},
        fingerprint=Fingerprint(
            profile=profile.name,
            backend=profile.backend,
            compute_capability=profile.compute_capability,
            abi=f"{abi_hash():016x}",
        ),
        vocabulary=vocabulary,
        blobs={name: len(data) for name, data in blobs.items()},
        quality=quality,
        provenance=Provenance(
            source=source.name,
            source_sha256=source.sha256(),
            model_type=str(source.config["model_type"]),
            algorithm=algorithm,
            recipe=recipe,
            tools={name: _version(name) for name in _TOOLS},
        ),
        known_answer=known_answer,
        planes={},
    )
    return writer.finish(manifest)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a source checkout that was not installed
        return "source"
