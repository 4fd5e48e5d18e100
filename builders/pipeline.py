"""The table of contents of a build: read -> calibrate -> plan -> quantize -> verify -> pack.

Every phase is one function below, in this order, and leaves one inspectable JSON when `keep_json` names a
folder. Calibration measures activations for algorithms that need them; round-to-nearest needs none, so that
phase has no function here yet and the plan follows the format asked for. Planes stream tensor by tensor into
the temporary file of the engine, so a build never holds a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import numpy as np

from builders import pack, planner
from builders.architecture import Architecture
from builders.archs import read_program
from builders.evaluate import compare_models, known_answer, read_text
from builders.quantize import Algorithm, get_algorithm
from builders.sources import Source, open_source, read_vocabulary
from builders.weights import CheckpointWeights, EngineWeights, row_blocks
from edge_runtime.engine.formats import Array, Format, get_format
from edge_runtime.engine.manifest import KnownAnswer, Manifest, Quality, Vocabulary
from edge_runtime.engine.packing import pack as pack_planes
from edge_runtime.engine.packing import plane_items
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile, load_profile
from edge_runtime.engine.program import Program
from edge_runtime.engine.proof import plane_name
from edge_runtime.engine.writer import EngineWriter, OsCalls
from edge_runtime.errors import QualityLimit, ValueOutOfRange

PART = "language"


@dataclass(frozen=True, slots=True)
class Options:
    """What a build was asked for. `recipe` is what the command line said, for the engine's provenance."""

    model: Path
    output: Path
    profile: str
    request: planner.Request = field(default_factory=planner.Request)
    algorithm: str = "rtn"
    text: Path | None = None
    text_tokens: int = 512
    measure: bool = True
    max_ppl_increase: float | None = None  # percent of perplexity above f32 that the user allows
    force: bool = False
    keep_json: Path | None = None
    recipe: dict[str, str] = field(default_factory=dict)


class Watcher:
    """Hears how a build goes on; the command line shows it, by default nobody does."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step(self, what: str) -> None:
        """One step of it is done."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `read` found: the open source, its program, its f32 weights and special ids."""

    source: Source
    architecture: Architecture
    weights: CheckpointWeights
    vocabulary: Vocabulary

    @property
    def program(self) -> Program:
        return self.architecture.program


@dataclass(frozen=True, slots=True)
class Report:
    """A finished build: the manifest as written, the file's size and the seconds of each phase."""

    path: Path
    nbytes: int
    manifest: Manifest
    seconds: dict[str, float]
    notices: list[str]


def build(options: Options, watcher: Watcher | None = None, calls: OsCalls | None = None) -> Report:
    """Build one engine. Raises an EdgeError; the target is then what it was before."""
    watcher = watcher or Watcher()
    pack.check_target(options.output, options.model, force=options.force)
    profile = load_profile(options.profile)
    seconds: dict[str, float] = {}
    with open_source(options.model) as source:
        with _timed(seconds, "read"):
            checkpoint = read(source, options.request.context)
        with _timed(seconds, "plan"):
            plan = planner.require_fit(checkpoint.program, profile, options.request)
        pack.check_disk(options.output, plan, source)
        _keep(options, "read", {"program": checkpoint.program, "vocabulary": checkpoint.vocabulary})
        _keep(options, "plan", plan)
        reserve = pack.header_reserve(checkpoint.program, plan)
        with EngineWriter(options.output, reserve, calls) as writer:
            with _timed(seconds, "quantize"):
                sqnr = quantize(checkpoint, plan, get_algorithm(options.algorithm), writer, watcher)
            _keep(options, "quantize", {"algorithm": options.algorithm, "sqnr_db": sqnr})
            with _timed(seconds, "verify"):
                quality, answer = verify(checkpoint, plan, profile, options, writer, sqnr, watcher)
            _keep(options, "verify", {"quality": quality, "known_answer": answer})
            if quality is not None and options.max_ppl_increase is not None:
                check_rise(quality, options.max_ppl_increase)
            with _timed(seconds, "pack"):
                watcher.phase("pack", 1)
                manifest = pack.finish(
                    writer,
                    PART,
                    checkpoint.source,
                    checkpoint.program,
                    plan,
                    profile,
                    checkpoint.vocabulary,
                    quality,
                    answer,
                    options.algorithm,
                    options.recipe,
                )
                watcher.step(options.output.name)
        _keep(options, "pack", {"file": options.output.name, "planes": manifest.planes})
        return Report(options.output, options.output.stat().st_size, manifest, seconds, source.notices)


def read(source: Source, context: int | None) -> Checkpoint:
    """Phase 1. The program of an open source, with every tensor and special id checked."""
    architecture = read_architecture(source.config, context)
    weights = CheckpointWeights(architecture, source)
    vocabulary = read_vocabulary(source, architecture.program.vocab_size)
    return Checkpoint(source, architecture, weights, vocabulary)


def read_architecture(config: dict[str, Any], context: int | None) -> Architecture:
    """The architecture for the context that will be planned: some rotary tables depend on it."""
    longest = read_program(config).program.max_context
    architecture = read_program(config, context=planner.default_context(longest, context))
    architecture.program.check()
    return architecture


def quantize(
    checkpoint: Checkpoint, plan: Plan, algorithm: Algorithm, writer: EngineWriter, watcher: Watcher
) -> dict[str, float]:
    """Phase 4. Quantize, pack and write every tensor; returns SQNR in dB of those that are not exact."""
    sqnr: dict[str, float] = {}
    watcher.phase("quantize", len(plan.tensors))
    for name, chosen in plan.tensors.items():
        spec, fmt = checkpoint.program.tensors[name], get_format(chosen.format)
        try:
            planes, signal, noise = _encode(checkpoint.weights, name, fmt, algorithm)
        except ValueOutOfRange as error:
            raise ValueOutOfRange(f"tensor {name!r}: {error}") from error
        for plane, data in pack_planes(chosen.format, chosen.packing, planes, spec.rows, spec.cols).items():
            writer.add(plane_name(PART, name, plane), data)
        if noise > 0.0 and signal > 0.0:
            sqnr[name] = round(10.0 * float(np.log10(signal / noise)), 3)
        watcher.step(name)
    return sqnr


def verify(
    checkpoint: Checkpoint,
    plan: Plan,
    profile: Profile,
    options: Options,
    writer: EngineWriter,
    sqnr: dict[str, float],
    watcher: Watcher,
) -> tuple[Quality | None, KnownAnswer | None]:
    """Phase 5. Measure the planes as they lie in the file against the checkpoint; record a known answer."""
    watcher.phase("verify", 2)
    window = min(plan.step.context, options.text_tokens)
    text = read_text(
        checkpoint.source, checkpoint.vocabulary, options.text, limit=options.text_tokens, window=window
    )
    stored = _StoredPlanes(checkpoint.program, plan, writer)
    quality = None
    if options.measure:
        engine = EngineWeights(checkpoint.program, plan.tensors, stored.of)
        found = compare_models(checkpoint.weights, engine, plan.kv, text)
        del engine  # it keeps the planes of one tensor
        matrices = {n for n, s in checkpoint.program.tensors.items() if s.role != "vector"}
        bits = 8.0 * sum(stored.true_nbytes(n) for n in matrices)
        quality = Quality(
            text=text.name,
            tokens=found.tokens,
            perplexity=found.perplexity,
            perplexity_f32=found.perplexity_f32,
            kl_mean=found.kl_mean,
            kl_p99=found.kl_p99,
            top1_agreement=found.top1_agreement,
            bits_per_weight=bits / sum(checkpoint.program.tensors[n].size for n in matrices),
            bytes=plan.memory.weights,
            sqnr_db=sqnr,
        )
    watcher.step("quality")
    answer = known_answer(profile, checkpoint.program, plan, stored.of, text.windows[0])
    watcher.step("known answer")
    return quality, answer


def check_rise(quality: Quality, most: float) -> None:
    """Raise QualityLimit when perplexity rises above f32 by more than `most` percent."""
    rise = 100.0 * (quality.perplexity / quality.perplexity_f32 - 1.0)
    if rise > most:
        raise QualityLimit(
            f"perplexity rises by {rise:.2f}% on {quality.text}, at most {most:g}% is allowed; nothing was "
            "written; use a format with more bits or smaller groups"
        )


class _StoredPlanes:
    """Packed planes as they lie in the unfinished file; each call maps anew, so nothing stays in memory."""

    def __init__(self, program: Program, plan: Plan, writer: EngineWriter) -> None:
        self._program, self._plan, self._writer = program, plan, writer

    def of(self, tensor: str) -> dict[str, Array]:
        """plane -> 1-D array of its packed items."""
        spec, chosen = self._program.tensors[tensor], self._plan.tensors[tensor]
        stored = self._writer.planes()
        items = plane_items(chosen.format, chosen.packing, spec.rows, spec.cols)
        return {p: stored[plane_name(PART, tensor, p)].view(dtype) for p, (_, dtype) in items.items()}

    def true_nbytes(self, tensor: str) -> int:
        """Bytes of a tensor's numbers, without the padding of its packing."""
        spec = self._program.tensors[tensor]
        return get_format(self._plan.tensors[tensor].format).nbytes(spec.rows, spec.cols)


def _encode(
    weights: CheckpointWeights, name: str, fmt: Format, algorithm: Algorithm
) -> tuple[dict[str, Array], float, float]:
    """(planes, energy of values, energy of error); in blocks of rows where algorithm and format allow."""
    spec = weights.program.tensors[name]
    whole = not algorithm.ROW_WISE or any(p.per == "tensor" for p in fmt.planes)
    blocks = [(0, spec.rows)] if whole else row_blocks(spec.rows, spec.cols)
    planes: dict[str, Array] = {}
    signal = noise = 0.0
    for start, stop in blocks:
        values = weights.block(name, start, stop)
        made = algorithm.quantize(values, fmt)
        if not planes:
            shapes = fmt.shapes(spec.rows, spec.cols)
            planes = {p: np.empty(shapes[p], made[p].dtype) for p in shapes}
        for p, data in made.items():
            planes[p][start:stop] = data
        for a, b in row_blocks(stop - start, spec.cols, 1 << 18):  # the f64 sums need little memory
            part = {p: d if fmt.plane(p).per == "tensor" else d[a:b] for p, d in made.items()}  # type: ignore[union-attr]
            error = fmt.decode(part, b - a, spec.cols) - values[a:b]
            signal += float(np.square(values[a:b], dtype=np.float64).sum())
            noise += float(np.square(error, dtype=np.float64).sum())
    return planes, signal, noise


@contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    begin = monotonic()
    yield
    seconds[phase] = monotonic() - begin


def _keep(options: Options, phase: str, value: Any) -> None:
    if options.keep_json is not None:
        options.keep_json.mkdir(parents=True, exist_ok=True)
        data = msgspec.json.format(msgspec.json.encode(value), indent=1)
        (options.keep_json / f"{phase}.json").write_bytes(data)
