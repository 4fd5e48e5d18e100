"""The last phase: blobs, manifest and the atomic finish; and the checks of the target before any work."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec

from builders.device_code import DeviceCode
from builders.parts import Contents
from builders.planner import Plans
from edge_runtime.engine.formats import abi_hash
from edge_runtime.engine.header import HEADER_LIMIT, OPENING
from edge_runtime.engine.header import header_reserve as reserve_for
from edge_runtime.engine.manifest import (
    LANGUAGE,
    SCHEMA,
    AdapterEntry,
    AdapterTarget,
    CalibrationRecord,
    Fingerprint,
    KnownAnswer,
    Manifest,
    PartEntry,
    Provenance,
    Quality,
)
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.proof import adapter_plane
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BuildError

_DEVICE_CODE_TEXT = 32 << 10  # bytes of a manifest: entries of about a hundred kernels, as cubin and PTX
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


def check_disk(target: Path, plans: Plans, contents: Contents) -> None:
    """Raise BuildError when the folder has no room for the engine beside the old one."""
    need = sum(plan.memory.weights + 3 * plan.memory.device_code for plan in plans.values())
    need += sum(update.nbytes for adapter in contents.adapters.values() for update in adapter.values())
    need += len(contents.target.source.tokenizer_json) + HEADER_LIMIT
    free = shutil.disk_usage(target.parent).free
    if free < need:
        raise BuildError(
            f"{target.parent} has {free / 2**20:.0f} MiB free, the engine needs {need / 2**20:.0f} MiB; "
            "make room or choose another -o"
        )


def header_reserve(contents: Contents, plans: Plans) -> int:
    """Bytes to keep free for the header of an engine with these parts and adapters."""
    entries = (*part_entries(contents, plans).values(), *_adapters(contents).values())
    tensors = sum(len(plan.tensors) for plan in plans.values())
    planes = 4 * tensors + 2 * sum(map(len, contents.adapters.values()))
    text = sum(len(msgspec.json.encode(e)) for e in entries) + 48 * tensors
    compiled = any(plan.memory.device_code for plan in plans.values())
    return reserve_for(planes, text + _DEVICE_CODE_TEXT * compiled)


@dataclass(frozen=True, slots=True)
class Record:
    """What a manifest says of a build beyond its parts and plans.

    recipe: options as given. sha256: digests of all files that were read.
    """

    profile: Profile
    quality: Quality | None
    known_answer: KnownAnswer | None
    algorithm: str
    recipe: dict[str, str]
    sha256: dict[str, str]
    calibration: CalibrationRecord | None = None
    device_code: DeviceCode | None = None


def finish(writer: EngineWriter, contents: Contents, plans: Plans, record: Record) -> Manifest:
    """Phase 6. Add adapters and blobs, write the manifest, put the file in place. No time or path enters."""
    source, profile = contents.target.source, record.profile
    for name, adapter in contents.adapters.items():
        for tensor, update in adapter.items():
            writer.add(adapter_plane(name, tensor, "a"), update.a)
            writer.add(adapter_plane(name, tensor, "b"), update.b)
    blobs = {"tokenizer.json": source.tokenizer_json}
    if source.chat_template:
        blobs["chat_template"] = source.chat_template.encode()
    code = record.device_code
    if code is not None:
        blobs |= code.blobs
    for name, data in blobs.items():
        writer.add(f"blob/{name}", data)
    manifest = Manifest(
        schema=SCHEMA,
        name=engine_name(source.name),
        parts=part_entries(contents, plans),
        adapters=_adapters(contents),
        fingerprint=Fingerprint(
            profile=profile.name,
            backend=profile.backend,
            compute_capability=profile.compute_capability,
            abi=f"{abi_hash():016x}",
        ),
        vocabulary=contents.target.vocabulary,
        blobs={name: len(data) for name, data in blobs.items()},
        device_code=() if code is None else code.entries,
        quality=record.quality,
        provenance=Provenance(
            source=source.name,
            source_sha256=record.sha256,
            model_type=str(source.config["model_type"]),
            algorithm=record.algorithm,
            recipe=record.recipe,
            tools=tools(),
            calibration=record.calibration,
        ),
        known_answer=record.known_answer,
        planes={},
    )
    return writer.finish(manifest)


def part_entries(contents: Contents, plans: Plans) -> dict[str, PartEntry]:
    """The parts as the manifest has them, by name."""
    return {
        p.name: PartEntry(program=p.program, plan=plans[p.name], origins=p.origins) for p in contents.parts
    }


def _adapters(contents: Contents) -> dict[str, AdapterEntry]:
    return {
        name: AdapterEntry(
            part=LANGUAGE, targets={t: AdapterTarget(rank=u.rank, scale=u.scale) for t, u in adapter.items()}
        )
        for name, adapter in contents.adapters.items()
    }


def tools() -> dict[str, str]:
    """Package -> version of what numbers depend on."""
    return {name: _version(name) for name in _TOOLS}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a source checkout that was not installed
        return "source"
