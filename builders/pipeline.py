"""The table of contents of a build: read -> calibrate -> plan -> quantize -> verify -> pack.

Every phase is one call of `build`, in this order, and leaves one inspectable JSON when `keep_json` names a
folder; parts.py reads, fitting.py plans, pack.py packs. Calibration measures activations for algorithms that
need them; round-to-nearest needs none, so that phase has no function here yet and the plan follows the format
asked for. Planes stream tensor by tensor into the temporary file of the engine, so none holds a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from builders import pack, planner
from builders.encoding import encode
from builders.evaluate import read_text
from builders.fitting import require_fit
from builders.known_answer import known_answer
from builders.limits import Limits, broken_limits
from builders.parts import Contents, Extras, open_contents
from builders.planner import Plans
from builders.quality import Subject, measure_quality, measure_task
from builders.quantize import Algorithm, get_algorithm
from builders.task import Task
from builders.task_file import read_task
from builders.watcher import Watcher
from builders.weights import StoredPlanes
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.manifest import LANGUAGE, KnownAnswer, Manifest, Quality
from edge_runtime.engine.packing import pack as pack_planes
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile, load_profile
from edge_runtime.engine.proof import plane_name
from edge_runtime.engine.writer import EngineWriter, OsCalls
from edge_runtime.errors import BadConfig


@dataclass(frozen=True, slots=True)
class Options:
    """What a build was asked for. `recipe` is what the command line said, for the engine's provenance."""

    model: Path
    output: Path
    profile: str
    request: planner.Request = field(default_factory=planner.Request)
    extras: Extras = field(default_factory=Extras)
    algorithm: str = "rtn"
    text: Path | None = None
    text_tokens: int = 512
    measure: bool = True
    eval_backend: str = "reference"
    task: Path | None = None
    task_f32: bool | None = None  # None: where the model is small
    limits: Limits = field(default_factory=Limits)
    force: bool = False  # replace a target that is no engine, and write one that breaks a limit
    keep_json: Path | None = None
    recipe: dict[str, str] = field(default_factory=dict)


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
    options.limits.check(measured=options.measure, task=options.task is not None)
    pack.check_target(options.output, options.model, force=options.force)
    profile = load_profile(options.profile)
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with _timed(seconds, "read"):
            contents = stack.enter_context(
                open_contents(options.model, options.extras, options.request.context)
            )
        with _timed(seconds, "plan"):
            beside = contents.companions()
            plans, _ = require_fit(contents.target.program, profile, options.request, beside)
        pack.check_disk(options.output, plans, contents)
        task = read_target_task(contents, plans[LANGUAGE], options)
        programs = {part.name: part.program for part in contents.parts}
        _keep(options, "read", {"parts": programs, "vocabulary": contents.target.vocabulary})
        _keep(options, "plan", plans)
        writer = stack.enter_context(
            EngineWriter(options.output, pack.header_reserve(contents, plans), calls)
        )
        with _timed(seconds, "quantize"):
            sqnr = quantize(contents, plans, get_algorithm(options.algorithm), writer, watcher)
        _keep(options, "quantize", {"algorithm": options.algorithm, "sqnr_db": sqnr})
        with _timed(seconds, "verify"):
            quality, answer = verify(contents, plans, profile, options, task, writer, sqnr[LANGUAGE], watcher)
        _keep(options, "verify", {"quality": quality, "known_answer": answer})
        notices = list(contents.notices)
        if quality is not None and quality.broken:
            if not options.force:
                raise broken_limits(quality.broken)
            notices.append(f"written by --force although {'; '.join(quality.broken)}")
        with _timed(seconds, "pack"):
            watcher.phase("pack", 1)
            record = pack.Record(profile, quality, answer, options.algorithm, options.recipe)
            manifest = pack.finish(writer, contents, plans, record)
            watcher.step(options.output.name)
        _keep(options, "pack", {"file": options.output.name, "planes": manifest.planes})
        return Report(options.output, options.output.stat().st_size, manifest, seconds, notices)


def quantize(
    contents: Contents, plans: Plans, algorithm: Algorithm, writer: EngineWriter, watcher: Watcher
) -> dict[str, dict[str, float]]:
    """Phase 4. Quantize, pack and write every tensor of every part.

    Returns part -> tensor -> SQNR in dB, of those that are not exact.
    """
    sqnr: dict[str, dict[str, float]] = {}
    watcher.phase("quantize", sum(len(plan.tensors) for plan in plans.values()))
    for part in contents.parts:
        found = sqnr[part.name] = {}
        for name, chosen in plans[part.name].tensors.items():
            spec = part.program.tensors[name]
            made = encode(part, name, get_format(chosen.format), algorithm)
            packed = pack_planes(chosen.format, chosen.packing, made.planes, spec.rows, spec.cols)
            for plane, data in packed.items():
                writer.add(plane_name(part.name, name, plane), data)
            if made.sqnr_db is not None:
                found[name] = made.sqnr_db
            watcher.step(f"{part.name} {name}")
    return sqnr


def read_target_task(contents: Contents, plan: Plan, options: Options) -> Task | None:
    """The task file in the target's tokens, before any long work. Raises BadConfig."""
    if options.task is None:
        return None
    if not options.measure:
        raise BadConfig("--task is part of the quality report; leave --no-eval away")
    target = contents.target
    return Task(read_task(options.task), target.source, target.vocabulary, plan.step.context)


def verify(
    contents: Contents,
    plans: Plans,
    profile: Profile,
    options: Options,
    task: Task | None,
    writer: EngineWriter,
    sqnr: dict[str, float],
    watcher: Watcher,
) -> tuple[Quality | None, KnownAnswer | None]:
    """Phase 5. Measure the language part's planes as they lie in the file against the checkpoint; record a
    known answer. Companions change no answer, so they are not measured here."""
    watcher.phase("verify", 2)
    target, plan = contents.target, plans[LANGUAGE]
    window = min(plan.step.context, options.text_tokens)
    text = read_text(target.source, target.vocabulary, options.text, limit=options.text_tokens, window=window)
    stored = StoredPlanes(LANGUAGE, target.program, plan, writer)
    quality = None
    if options.measure:
        subject = Subject(target, profile, plan, stored)
        quality = measure_quality(subject, text, options.eval_backend, sqnr)
    watcher.step("quality")
    answer = known_answer(profile, target.program, plan, stored.of, text.windows[0])
    watcher.step("known answer")
    if quality is not None and task is not None:
        figures = measure_task(subject, task, options.task_f32, watcher)
        quality = msgspec.structs.replace(quality, task=figures)
    if quality is not None:
        quality = msgspec.structs.replace(quality, broken=tuple(options.limits.broken(quality)))
    return quality, answer


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
