"""Device code of an engine for people: its blobs, and what each kernel takes of a GPU."""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.cli.output import size, table
from edge_runtime.engine.manifest import DeviceCodeEntry, Manifest

_BLOBS = ("device code", "for", "PTX ISA", "compiler", "size", "kernels", "most registers", "spills")
_KERNELS = ("kernel", "threads", "registers", "shared", "stack", "spill stores", "spill loads")


def device_code_text(manifest: Manifest) -> list[str]:
    """Sections of `edge-inspect`; none for an engine that is for no GPU."""
    entries = manifest.device_code
    if not entries:
        missing = "device code: none (edge-build --no-device-code); no cuda device runs this engine"
        return [missing] if manifest.fingerprint.backend == "cuda" else []
    return [
        table([_blob(entry) for entry in entries], _BLOBS, right=(4, 5, 6)),
        *(_kernels(entry) for entry in entries if entry.kind == "cubin"),
    ]


def _blob(entry: DeviceCodeEntry) -> tuple[object, ...]:
    target = f"sm_{entry.sm}" if entry.kind == "cubin" else f"sm_{entry.sm} and later"
    row = (entry.blob, target, entry.ptx, f"CUDA {entry.cuda}", size(entry.nbytes), len(entry.kernels))
    if entry.kind == "ptx":
        return (*row, "by driver", "by driver")
    spilling = list(_spilling(entry))
    spills = f"{len(spilling)} of {len(entry.kernels)}" if spilling else "none"
    return (*row, max(kernel.registers or 0 for kernel in entry.kernels.values()), spills)


def _spilling(entry: DeviceCodeEntry) -> Iterator[str]:
    for symbol, kernel in entry.kernels.items():
        if kernel.spill_stores or kernel.spill_loads:
            yield symbol


def _kernels(entry: DeviceCodeEntry) -> str:
    rows = [
        (symbol, k.threads, k.registers, k.shared_bytes, k.stack_bytes, k.spill_stores, k.spill_loads)
        for symbol, k in entry.kernels.items()
    ]
    return f"kernels of {entry.blob}, bytes\n" + table(rows, _KERNELS, right=(1, 2, 3, 4, 5, 6))
