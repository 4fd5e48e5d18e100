"""Phase 4 of a build: every tensor of every part quantized, packed and written, one in memory at a time."""

from __future__ import annotations

from builders.calibrating import Calibrations
from builders.encoding import encode
from builders.parts import Contents
from builders.planner import Plans
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.watcher import Watcher
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.packing import pack
from edge_runtime.engine.proof import plane_name
from edge_runtime.engine.writer import EngineWriter


def quantize(
    contents: Contents,
    plans: Plans,
    algorithm: str,
    options: AlgorithmOptions,
    calibrations: Calibrations,
    writer: EngineWriter,
    watcher: Watcher,
) -> dict[str, dict[str, float]]:
    """Quantize, pack and write every tensor of every part.

    Returns part -> tensor -> SQNR in dB, of those that are not exact.
    """
    chosen = get_algorithm(algorithm)
    sqnr: dict[str, dict[str, float]] = {}
    watcher.phase("quantize", sum(len(plan.tensors) for plan in plans.values()))
    for part in contents.parts:
        found = sqnr[part.name] = {}
        for name, tensor in plans[part.name].tensors.items():
            spec = part.program.tensors[name]
            inputs = calibrations.statistics(part.name, name) if chosen.CALIBRATED else None
            made = encode(part, name, get_format(tensor.format), chosen, inputs, options)
            packed = pack(tensor.format, tensor.packing, made.planes, spec.rows, spec.cols)
            for plane, data in packed.items():
                writer.add(plane_name(part.name, name, plane), data)
            if made.sqnr_db is not None:
                found[name] = made.sqnr_db
            watcher.step(f"{part.name} {name}")
    return sqnr
