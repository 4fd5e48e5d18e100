"""Phase 4 of a build: every tensor of every part quantized, packed and written, one in memory at a time."""

from __future__ import annotations

from dataclasses import replace

from builders.calibrating import Calibrations
from builders.encoding import encode
from builders.equalize import ScaledWeights, equalize
from builders.parts import Contents, Part
from builders.planner import Plans
from builders.quantize import Algorithm, AlgorithmOptions, ChannelScaler
from builders.watcher import Watcher
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.packing import pack
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.proof import plane_name
from edge_runtime.engine.writer import EngineWriter


def scale_channels(
    contents: Contents,
    plans: Plans,
    algorithm: Algorithm,
    options: AlgorithmOptions,
    calibrations: Calibrations,
    watcher: Watcher,
) -> Contents:
    """The contents with magnitude moved between inputs and weights, where the algorithm does so: the same
    functions. Adapters know the weights as they were, so changed tensors lose their origins."""
    if not isinstance(algorithm, ChannelScaler):
        return contents
    watcher.phase("scale", len(contents.parts))
    parts = []
    for part in contents.parts:
        parts.append(_scaled(part, plans[part.name], algorithm, options, calibrations))
        watcher.step(part.name)
    return replace(contents, parts=tuple(parts))


def _scaled(
    part: Part, plan: Plan, scaler: ChannelScaler, options: AlgorithmOptions, calibrations: Calibrations
) -> Part:
    formats = {name: get_format(chosen.format) for name, chosen in plan.tensors.items()}
    weights = equalize(
        part.weights, scaler, formats, lambda name: calibrations.statistics(part.name, name), options
    )
    origins = {name: origin for name, origin in part.origins.items() if name not in weights.changed}
    return replace(part, weights=weights, origins=origins)


def quantize(
    contents: Contents,
    plans: Plans,
    algorithm: Algorithm,
    options: AlgorithmOptions,
    calibrations: Calibrations,
    writer: EngineWriter,
    watcher: Watcher,
) -> dict[str, dict[str, float]]:
    """Quantize, pack and write every tensor of every part.

    Returns part -> tensor -> SQNR in dB, of those that are not exact.
    """
    sqnr: dict[str, dict[str, float]] = {}
    watcher.phase("quantize", sum(len(plan.tensors) for plan in plans.values()))
    for part in contents.parts:
        found = sqnr[part.name] = {}
        for name, tensor in plans[part.name].tensors.items():
            spec = part.program.tensors[name]
            inputs = calibrations.statistics(part.name, name) if algorithm.CALIBRATED else None
            if isinstance(part.weights, ScaledWeights):
                inputs = part.weights.inputs(name, inputs)
            made = encode(part, name, get_format(tensor.format), algorithm, inputs, options)
            packed = pack(tensor.format, tensor.packing, made.planes, spec.rows, spec.cols)
            for plane, data in packed.items():
                writer.add(plane_name(part.name, name, plane), data)
            if made.sqnr_db is not None:
                found[name] = made.sqnr_db
            watcher.step(f"{part.name} {name}")
    return sqnr
