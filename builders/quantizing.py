"""Phase 4 of a build: every tensor of every part quantized, packed and written, one in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

from builders.calibrating import Calibrations
from builders.encoding import Encoded, encode
from builders.equalize import ScaledWeights, equalize
from builders.parts import Contents, Part
from builders.planner import Plans
from builders.quantize import Algorithm, AlgorithmOptions, ChannelScaler
from builders.statistics import InputStatistics
from builders.watcher import Watcher
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.manifest import LANGUAGE
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
    in_order: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Quantize, pack and write every tensor of every part.

    in_order: a folder where activations may lie meanwhile. The language part is then quantized in the order
    of its program, and a calibrated algorithm knows what the tensors before have done (feedback.py).
    Returns part -> tensor -> SQNR in dB, of those that are not exact.
    """
    sqnr: dict[str, dict[str, float]] = {}
    watcher.phase("quantize", sum(len(plan.tensors) for plan in plans.values()))
    for part in contents.parts:
        line = _Line(part, plans[part.name], algorithm, options, writer, watcher)
        windows = calibrations.windows
        if in_order is not None and part.name == LANGUAGE and algorithm.CALIBRATED and windows is not None:
            line.in_order(windows, in_order)
        else:
            line.one_by_one(calibrations)
        sqnr[part.name] = line.sqnr
    return sqnr


@dataclass(slots=True)
class _Line:
    """Tensors of one part on their way into the file."""

    part: Part
    plan: Plan
    algorithm: Algorithm
    options: AlgorithmOptions
    writer: EngineWriter
    watcher: Watcher
    sqnr: dict[str, float] = field(default_factory=dict)

    def one_by_one(self, calibrations: Calibrations) -> None:
        for name in self.plan.tensors:
            inputs = calibrations.statistics(self.part.name, name) if self.algorithm.CALIBRATED else None
            if isinstance(self.part.weights, ScaledWeights):
                inputs = self.part.weights.inputs(name, inputs)
            self.take(name, inputs)

    def in_order(self, windows: Array, folder: Path) -> None:
        from builders.feedback import FeedbackOptions, quantize_in_order

        done = set()

        def choose(name: str, inputs: InputStatistics | None) -> Array:
            done.add(name)
            spec, fmt = self.part.program.tensors[name], get_format(self.plan.tensors[name].format)
            return fmt.decode(self.take(name, inputs).planes, spec.rows, spec.cols)

        device = FeedbackOptions(device=self.options.device)
        quantize_in_order(self.part.weights, windows, choose, folder, device)  # type: ignore[arg-type]
        for name in self.plan.tensors:
            if name not in done:  # norms, biases and tables
                self.take(name, None)

    def take(self, name: str, inputs: InputStatistics | None) -> Encoded:
        """Quantize, pack and write one tensor."""
        chosen, spec = self.plan.tensors[name], self.part.program.tensors[name]
        made = encode(self.part, name, get_format(chosen.format), self.algorithm, inputs, self.options)
        for plane, data in pack(chosen.format, chosen.packing, made.planes, spec.rows, spec.cols).items():
            self.writer.add(plane_name(self.part.name, name, plane), data)
        if made.sqnr_db is not None:
            self.sqnr[name] = made.sqnr_db
        self.watcher.step(f"{self.part.name} {name}")
        return made
