"""Phase 4 of a build: every tensor of every part quantized, packed and written, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from builders.activations import Kind, round_activations
from builders.calibrating import Calibrations
from builders.encoding import Encoded, encode, measured
from builders.equalize import ScaledWeights, equalize
from builders.parts import Contents, Part
from builders.planner import Plans
from builders.quantize import Algorithm, AlgorithmOptions, ChannelScaler
from builders.sources.matrix import Stored
from builders.statistics import InputStatistics
from builders.watcher import Watcher
from edge_runtime.engine.formats import Array, Planes, get_format
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
        parts.append(scaled_part(part, plans[part.name], algorithm, options, calibrations))
        watcher.step(part.name)
    return replace(contents, parts=tuple(parts))


def scaled_part(
    part: Part, plan: Plan, algorithm: Algorithm, options: AlgorithmOptions, calibrations: Calibrations
) -> Part:
    """One part, its channels scaled for the formats of its plan where the algorithm scales any, and where
    there are statistics to scale them by."""
    if not isinstance(algorithm, ChannelScaler) or not calibrations.covers(part.name):
        return part
    formats = {name: get_format(chosen.format) for name, chosen in plan.tensors.items()}
    weights = equalize(
        part.model, algorithm, formats, lambda name: calibrations.statistics(part.name, name), options
    )
    origins = {name: origin for name, origin in part.origins.items() if name not in weights.changed}
    return replace(part, weights=weights, origins=origins)


def fix_scales(contents: Contents, calibrations: Calibrations, kind: Kind, observer: str) -> Contents:
    """The language part's activations rounded with scales from its calibration, in place of one a token.
    Raises BadConfig where a linear has no statistics."""
    part = contents.language
    program = round_activations(
        part.model.program, kind, lambda name: inputs_of(part, name, calibrations), observer
    )
    return contents.with_language(replace(part, program=program))


def inputs_of(part: Part, name: str, calibrations: Calibrations) -> InputStatistics | None:
    """Statistics of what a tensor of a part reads, as scaled channels have them, or None."""
    found = calibrations.statistics(part.name, name)
    return part.weights.inputs(name, found) if isinstance(part.weights, ScaledWeights) else found


# Planes of every tensor of a part -> those that are better, of the tensors that change
Tuner = Callable[[Part, Mapping[str, Planes]], Mapping[str, dict[str, Array]]]


@dataclass(frozen=True, slots=True)
class _Writing:
    """One part on its way into the file. `sqnr`: tensor -> dB, of those that are not exact; `chosen`: tensors
    whose values an algorithm has chosen. With `waits`, they lie in `held` until `finish`."""

    part: Part
    plan: Plan
    algorithm: Algorithm
    options: AlgorithmOptions
    writer: EngineWriter
    waits: bool
    sqnr: dict[str, float] = field(default_factory=dict)
    chosen: set[str] = field(default_factory=set)
    held: dict[str, Encoded] = field(default_factory=dict)

    def choose(self, name: str, inputs: InputStatistics | None) -> dict[str, Array]:
        """Quantize a tensor, and pack and write it unless it waits; its codec planes."""
        fmt = get_format(self.plan.tensors[name].format)
        made = encode(self.part, name, fmt, self.algorithm, inputs, self.options)
        self.chosen.add(name)
        if self.waits:
            self.held[name] = made
        else:
            self._write(name, made)
        return made.planes

    def choose_decoded(self, name: str, inputs: InputStatistics | None) -> Array:
        """The same; its values f32 (rows, cols) as they will be read."""
        spec = self.part.program.tensors[name]
        fmt = get_format(self.plan.tensors[name].format)
        return fmt.decode(self.choose(name, inputs), spec.rows, spec.cols)

    def finish(self, tuner: Tuner) -> None:
        """Tune what was held, and write it."""
        tuned = tuner(self.part, {name: made.planes for name, made in self.held.items()})
        for name in self.plan.tensors:
            made = self.held.pop(name)
            if name in tuned:
                made = measured(self.part, name, Stored(self.plan.tensors[name].format, tuned[name]))
            self._write(name, made)

    def _write(self, name: str, made: Encoded) -> None:
        spec, chosen = self.part.program.tensors[name], self.plan.tensors[name]
        packed = pack(chosen.format, chosen.packing, made.planes, spec.rows, spec.cols)
        for plane, data in packed.items():
            self.writer.add(plane_name(self.part.name, name, plane), data)
        if made.sqnr_db is not None:
            self.sqnr[name] = made.sqnr_db


def quantize(
    contents: Contents,
    plans: Plans,
    algorithm: Algorithm,
    options: AlgorithmOptions,
    calibrations: Calibrations,
    writer: EngineWriter,
    watcher: Watcher,
    *,
    feedback: bool = False,
    tuner: Tuner | None = None,
) -> dict[str, dict[str, float]]:
    """Quantize, pack and write every tensor of every part; with `feedback` each knowing what those before it
    have become, in the parts that were calibrated. The language part is held in memory for a `tuner`.

    Returns part -> tensor -> SQNR in dB, of those that are not exact.
    """

    def own(part: Part) -> AlgorithmOptions:
        if not algorithm.CALIBRATED or not calibrations.covers(part.name):
            return options
        formats = {chosen.format for chosen in plans[part.name].tensors.values()}
        return replace(options, row_importance=calibrations.row_importance(part, formats))

    parts = [
        _Writing(
            part,
            plans[part.name],
            algorithm,
            own(part),
            writer,
            waits=tuner is not None and part.name == LANGUAGE,
        )
        for part in contents.parts
    ]
    for writing in parts:
        if feedback and calibrations.covers(writing.part.name):
            known = partial(inputs_of, writing.part, calibrations=calibrations)
            calibrations.in_order(writing.part, writing.choose_decoded, known, watcher)
    watcher.phase("quantize", sum(len(w.plan.tensors) - len(w.chosen) for w in parts))
    for writing in parts:
        part = writing.part
        for name in [name for name in writing.plan.tensors if name not in writing.chosen]:
            writing.choose(name, inputs_of(part, name, calibrations) if algorithm.CALIBRATED else None)
            watcher.step(f"{part.name} {name}")
    for writing in parts:
        if writing.waits and tuner is not None:
            writing.finish(tuner)
    return {writing.part.name: writing.sqnr for writing in parts}
