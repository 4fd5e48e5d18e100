"""A toy engine that carries device code: made-up bytes with all that a manifest says of such."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
from toy_engine import toy_parts

from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry, Manifest
from edge_runtime.engine.memory import adapter_nbytes
from edge_runtime.engine.writer import EngineWriter

CUBIN, PTX = "device.sm_87.cubin", "device.compute_87.ptx"
CODE = {CUBIN: b"\x7fELF" + bytes(300), PTX: b"//\n.version 8.5\n.target sm_87\n\0"}
KERNELS = {
    "norm_256": KernelEntry(
        threads=256, shared_bytes=64, registers=32, stack_bytes=0, spill_stores=0, spill_loads=0
    ),
    "linear_tile": KernelEntry(
        threads=128, shared_bytes=32768, registers=255, stack_bytes=16, spill_stores=12, spill_loads=24
    ),
}
ENTRIES = (
    DeviceCodeEntry(
        blob=CUBIN, kind="cubin", sm=87, ptx="8.5", cuda="12.6", nbytes=len(CODE[CUBIN]), kernels=KERNELS
    ),
    DeviceCodeEntry(
        blob=PTX,
        kind="ptx",
        sm=87,
        ptx="8.5",
        cuda="12.6",
        nbytes=len(CODE[PTX]),
        kernels={s: KernelEntry(threads=k.threads, shared_bytes=k.shared_bytes) for s, k in KERNELS.items()},
    ),
)


def write_device_toy(path: Path, entries: tuple[DeviceCodeEntry, ...] = ENTRIES) -> Manifest:
    """Write it for backend cuda, with room for 4 KiB of device code; returns its manifest."""
    manifest, planes = toy_parts("int4_g32", 1, 2)
    language = manifest.parts["language"]
    adapters = sum(
        adapter_nbytes(
            language.program,
            language.plan.step,
            {name: target.rank for name, target in adapter.targets.items()},
            backend="cuda",
        )
        for adapter in manifest.adapters.values()
    )
    memory = msgspec.structs.replace(language.plan.memory, device_code=4096, adapters=adapters)
    plan = msgspec.structs.replace(language.plan, memory=memory)
    code = {entry.blob: CODE[entry.blob] for entry in entries}
    with EngineWriter(path) as writer:
        for name, array in planes.items():
            writer.add(name, array)
        for name, data in code.items():
            writer.add(f"blob/{name}", np.frombuffer(data, np.uint8))
        return writer.finish(
            msgspec.structs.replace(
                manifest,
                parts={"language": msgspec.structs.replace(language, plan=plan)},
                fingerprint=msgspec.structs.replace(
                    manifest.fingerprint, backend="cuda", compute_capability="8.7"
                ),
                blobs=manifest.blobs | {name: len(data) for name, data in code.items()},
                device_code=entries,
            )
        )
