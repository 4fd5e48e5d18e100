"""A toy engine for the cuda backend that can be talked to: random weights, kernels that the fake GPU runs."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from fake_cuda import add_module, cubin
from speaking_engine import TEMPLATE, tokenizer_json, vocabulary
from toy_engine import toy_manifest, toy_plan, toy_planes, toy_program

from edge_runtime.engine.device_code import Kernel, source
from edge_runtime.engine.kv import cache_nbytes, kv_pair
from edge_runtime.engine.launches import kernels_of
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.manifest import (
    DRAFT,
    LANGUAGE,
    DeviceCodeEntry,
    Fingerprint,
    KernelEntry,
    Manifest,
    PartEntry,
)
from edge_runtime.engine.packing import cuda_packing, packed_nbytes
from edge_runtime.engine.writer import EngineWriter

SM = 87
CUBIN = f"device.sm_{SM}.cubin"
MATRICES = "int8_row"
DRAFT_MATRICES = "int8_g32"  # rounded otherwise, so that some guesses fall


def write_cuda(
    path: Path,
    modules: Path,
    *,
    context: int = 64,
    sequences: int = 3,
    pages: int = 12,
    kv: str = "int8",
    draft: bool = False,
) -> Manifest:
    """Write the engine, and the emulated module of its cubin to `modules`; returns its manifest.

    The draft is the same model with weights of another format.
    """
    names = vocabulary()
    formats = {LANGUAGE: MATRICES} | ({DRAFT: DRAFT_MATRICES} if draft else {})
    kernels: dict[str, Kernel] = {}
    parts: dict[str, PartEntry] = {}
    planes: dict[str, np.ndarray] = {}
    for part, fmt in formats.items():
        entry = _part(fmt, kv, context, sequences, pages)
        parts[part] = entry
        chosen = {name: tensor.format for name, tensor in entry.plan.tensors.items()}
        kernels |= {k.symbol: k for k in kernels_of(lower(entry.program, chosen, entry.plan.kv))}
        planes |= {f"{part}/{name}": array for name, array in toy_planes(entry.program, entry.plan).items()}
    text = source(tuple(kernels[symbol] for symbol in sorted(kernels)))
    image = cubin(SM, content=text.encode())
    add_module(modules, image, text)
    blobs = {"tokenizer.json": tokenizer_json(), "chat_template": TEMPLATE.encode(), CUBIN: image}
    planes |= {f"blob/{name}": np.frombuffer(data, np.uint8) for name, data in blobs.items()}
    code = DeviceCodeEntry(
        blob=CUBIN,
        kind="cubin",
        sm=SM,
        ptx="8.5",
        cuda="12.6",
        nbytes=len(image),
        kernels={k.symbol: _entry(k) for k in kernels.values()},
    )
    language = parts[LANGUAGE]
    beside = sum(entry.plan.memory.need for name, entry in parts.items() if name != LANGUAGE)
    memory = msgspec.structs.replace(language.plan.memory, device_code=len(image), draft=beside)
    plan = msgspec.structs.replace(language.plan, memory=memory)
    parts[LANGUAGE] = msgspec.structs.replace(language, plan=plan)
    manifest = toy_manifest(parts, "fake-gpu")
    manifest = msgspec.structs.replace(
        manifest,
        vocabulary=names,
        blobs={name: len(data) for name, data in blobs.items()},
        fingerprint=Fingerprint(
            profile="orin", backend="cuda", compute_capability="8.7", abi=manifest.fingerprint.abi
        ),
        known_answer=None,
        device_code=(code,),
    )
    with EngineWriter(str(path), 1 << 20) as writer:
        for name, array in planes.items():
            writer.add(name, array)
        return writer.finish(manifest)


def _part(fmt: str, kv: str, context: int, sequences: int, pages: int) -> PartEntry:
    """The toy's program, with weights for the cuda backend."""
    program = toy_program(width=64, vocab=vocabulary().size, context=context)
    plan = toy_plan(program, fmt, sequences=sequences)
    tensors = {
        name: tensor
        if program.tensors[name].role == "vector"
        else msgspec.structs.replace(tensor, packing=cuda_packing(tensor.format))
        for name, tensor in plan.tensors.items()
    }
    k, v = kv_pair(kv)
    caches = msgspec.structs.replace(plan.kv, k=k, v=v, pages=pages)
    memory = msgspec.structs.replace(
        plan.memory,
        kv=cache_nbytes(program, caches, plan.step),
        weights=sum(
            packed_nbytes(t.format, t.packing, program.tensors[n].rows, program.tensors[n].cols)
            for n, t in tensors.items()
        ),
    )
    plan = msgspec.structs.replace(plan, profile="orin", tensors=tensors, kv=caches, memory=memory)
    return PartEntry(program=program, plan=plan)


def _entry(kernel: Kernel) -> KernelEntry:
    return KernelEntry(
        threads=kernel.threads, shared_bytes=0, registers=32, stack_bytes=0, spill_stores=0, spill_loads=0
    )
