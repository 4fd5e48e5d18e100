"""The table of contents of a build: read -> calibrate -> plan -> quantize -> verify -> pack.

Every phase is one call of `build`, in this order, and leaves one inspectable JSON when `keep_json` names a
folder; parts.py reads, calibrating.py calibrates, fitting.py plans, quantizing.py quantizes, quality.py
measures, pack.py packs. The plan comes before the values: it needs what calibration measured, and decides
every tensor's format. Device code (device_code.py) is compiled before the long work, once programs are final.
Planes stream tensor by tensor into the temporary file of the engine, so none of the phases holds a model.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec

from builders import pack, planner
from builders.activations import Kind, round_activations
from builders.calibrating import CalibrationRequest, Calibrations
from builders.corpus import BUILTIN, SELF
from builders.device_code import DeviceCode, compile_device_code
from builders.evaluate import EvaluationText, read_text
from builders.explain import explain
from builders.fitting import require_fit
from builders.known_answer import known_answer
from builders.limits import Limits, broken_limits
from builders.nvrtc import compiler_for
from builders.parts import Contents, Extras, Part, open_contents
from builders.plan_picture import draw_plan
from builders.planner import Plans
from builders.quality import Subject, measure_quality, measure_task
from builders.quantize import Algorithm, AlgorithmOptions, ChannelScaler, default_format, get_algorithm
from builders.quantizing import fix_scales, quantize, scale_channels
from builders.refine import Question
from builders.refining import Rounding, refined
from builders.rotate import rotate
from builders.sensitivity import Sensitivity
from builders.sensitivity_plot import draw
from builders.task import Task
from builders.task_file import read_task
from builders.texts import text_files
from builders.tuning import Tuning, require_tuning
from builders.watcher import Watcher
from builders.weights import StoredPlanes
from edge_runtime.engine.folder import sha256_of
from edge_runtime.engine.lowering import device_kernels
from edge_runtime.engine.manifest import LANGUAGE, KnownAnswer, Manifest, Quality
from edge_runtime.engine.profile import SUFFIXES, Profile, load_profile
from edge_runtime.engine.writer import EngineWriter, OsCalls
from edge_runtime.errors import BadConfig, BuildError, Unsupported


@dataclass(frozen=True, slots=True)
class Options:
    """What a build was asked for. `recipe` is what the command line said, for the engine's provenance."""

    model: Path
    output: Path
    profile: str
    request: planner.Request = field(default_factory=planner.Request)
    extras: Extras = field(default_factory=Extras)
    algorithm: str = "rtn"
    observer: str | None = None
    feedback: bool = False  # every tensor knows what those before it have become
    tune: int | None = None  # steps in which all values then learn the f32 model's answers together
    activations: Kind | None = None  # what linears read is rounded to; static: scales from the calibration
    static_scales: bool = False
    rotate: int | None = None  # seed of the rotation, None for none
    calibration: CalibrationRequest = field(default_factory=CalibrationRequest)
    calibrates: bool = False  # even where the algorithm needs no statistics
    text: Path | None = None
    text_tokens: int = 512
    measure: bool = True
    eval_backend: str = "reference"
    task: Path | None = None
    task_f32: bool | None = None  # None: where the model is small
    limits: Limits = field(default_factory=Limits)
    force: bool = False  # replace a target that is no engine, and write one that breaks a limit
    keep_json: Path | None = None
    plot: Path | None = None  # where the plan is drawn
    recipe: dict[str, str] = field(default_factory=dict)
    sensitivity: Sensitivity | None = None  # what the planner spends bytes by; None: its model
    device_code: bool = True  # for a cuda profile; an engine without runs on no cuda device


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
    _check_keep(options.keep_json)
    profile = load_profile(options.profile)
    compiles = options.device_code and profile.backend == "cuda"
    if compiles:
        compiler_for(profile)  # a missing one is said before any work
    algorithm = get_algorithm(options.algorithm)
    if options.static_scales and options.activations is None:
        raise BadConfig("static activation scales need --activations int8 or fp8_e4m3")
    if options.feedback and not algorithm.CALIBRATED:
        raise BadConfig(f"--feedback is for calibrated algorithms such as gptq, not {options.algorithm}")
    seconds: dict[str, float] = {}
    with ExitStack() as stack:
        with _timed(seconds, "read"):
            contents, request = read(stack, options, algorithm)
            if options.tune is not None:
                require_tuning(contents.target.program, options.tune, options.calibration)
            text, task = read_measures(contents, request.context, options)
        _keep(options, "read", {"parts": {part.name: part.program for part in contents.parts}})
        with _timed(seconds, "calibrate"):
            calibrations = stack.enter_context(Calibrations())
            needed = algorithm.CALIBRATED and request.weights != planner.KEEP
            if needed or _asks_for_calibration(options):
                beside = options.output.with_name(options.output.name + ".calibration")
                made = "" if options.rotate is None else f"rotated by {options.rotate}"
                calibrations.run(contents, options.calibration, beside, made, watcher)
                shortage = calibrations.shortage()
                contents.notices.extend([] if shortage is None else [shortage])
            sensitivity = measured_sensitivity(contents, profile, request, calibrations, options, watcher)
        with _timed(seconds, "plan"):
            plans = plan(contents, profile, request, sensitivity, options)
        pack.check_disk(options.output, plans, contents)
        writer = stack.enter_context(
            EngineWriter(options.output, pack.header_reserve(contents, plans), calls)
        )
        with _timed(seconds, "quantize"):
            how = AlgorithmOptions(options.observer, calibrations.device)
            scaled = scale_channels(contents, plans, algorithm, how, calibrations, watcher)
            if options.activations is not None and options.static_scales:
                observer = options.observer or "minmax"
                scaled = fix_scales(scaled, calibrations, options.activations, observer)
        code = None
        if compiles:
            with _timed(seconds, "compile"):
                code = device_code(scaled, plans, profile, watcher)
            _keep(options, "device_code", code.entries)
        tuning = None
        if options.tune is not None:
            tuning = Tuning(options.tune, contents.target, plans[LANGUAGE], calibrations, watcher)
        with _timed(seconds, "quantize"):
            sqnr = quantize(
                scaled,
                plans,
                algorithm,
                how,
                calibrations,
                writer,
                watcher,
                feedback=options.feedback,
                tuner=tuning,
            )
        tuned = {} if tuning is None else tuning.kl
        _keep(options, "quantize", {"algorithm": options.algorithm, "sqnr_db": sqnr, "tuned": tuned})
        with _timed(seconds, "verify"):
            # As it was before its channels were scaled: the same function, in the checkpoint's own basis
            part = replace(contents.language, program=scaled.language.program)
            stored = StoredPlanes(LANGUAGE, part.program, plans[LANGUAGE], writer)
            subject = Subject(contents.target, part, profile, plans[LANGUAGE], stored, code)
            quality, answer = verify(subject, options, text, task, sqnr[LANGUAGE], watcher)
        _keep(options, "verify", {"quality": quality, "known_answer": answer})
        notices = [*contents.notices, *(() if code is None else code.notices)]
        notices += [] if tuning is None else tuning.notices
        if quality is not None and quality.broken:
            if not options.force:
                raise broken_limits(quality)
            notices.append(f"written by --force although {'; '.join(quality.broken)}")
        with _timed(seconds, "pack"):
            watcher.phase("pack", 1)
            record = pack.Record(
                profile,
                quality,
                answer,
                options.algorithm,
                options.recipe,
                digests(contents, options),
                calibrations.record(),
                code,
            )
            manifest = pack.finish(writer, scaled, plans, record)
            watcher.step(options.output.name)
        _keep(options, "pack", {"file": options.output.name, "planes": manifest.planes})
        return Report(options.output, options.output.stat().st_size, manifest, seconds, notices)


def _asks_for_calibration(options: Options) -> bool:
    return options.calibrates or options.static_scales or options.tune is not None


def read(stack: ExitStack, options: Options, algorithm: Algorithm) -> tuple[Contents, planner.Request]:
    """Phase 1. The parts, the language part rotated where asked; and the request, weights settled.

    What is already quantized is kept as it is unless other weights are asked for.
    """
    request = options.request
    # Where nothing is known of tokens there is nothing to choose by; a rotation knows one table and one head
    known = options.sensitivity is not None or algorithm.CALIBRATED or _asks_for_calibration(options)
    blocks = request.in_blocks and known and options.rotate is None
    contents = stack.enter_context(
        open_contents(options.model, options.extras, request.context, blocks=blocks)
    )
    quantized = bool(contents.target.source.matrices)
    request = settled(request, options.algorithm, quantized=quantized)
    if request.weights == planner.KEEP and quantized:
        kept, notices = contents.target.weights.kept()
        request = replace(request, kept=kept)
        contents.notices.extend(notices)
    scales = isinstance(algorithm, ChannelScaler)
    calibrates = algorithm.CALIBRATED and request.weights == planner.KEEP  # and would find nothing to choose
    changes = [f"--algorithm {options.algorithm}"] if scales or calibrates else []
    if options.rotate is not None:
        changes.append("--rotate")
    tunes = [] if options.tune is None else ["--tune"]
    if (changes or tunes) and request.weights == planner.KEEP:
        raise BadConfig(
            f"{' and '.join([*changes, *tunes])} would change every value, and quantized weights are kept as "
            "they are; name another --weights, or leave it away"
        )
    for change in changes:
        check_adapters(contents, change)
    if options.rotate is not None:
        turned = rotate(contents.target.weights, options.rotate)
        if len(turned.program.tensors) > len(contents.language.program.tensors):
            contents.notices.append("--rotate makes two tables of one that is embedding and head at once")
        contents = contents.with_language(Part(LANGUAGE, turned.program, turned))
    if options.activations is not None:
        part = contents.language
        rounded = round_activations(part.program, options.activations)
        contents = contents.with_language(replace(part, program=rounded))
    return contents, request


def settled(request: planner.Request, algorithm: str, *, quantized: bool) -> planner.Request:
    """The request with weights where none were asked for: those of a quantized checkpoint, else the format
    that the algorithm is made for."""
    if request.weights != planner.DEFAULT:
        return request
    weights = planner.KEEP if quantized else default_format(algorithm) or planner.DEFAULT_WEIGHTS
    return replace(request, weights=weights)


def check_adapters(contents: Contents, option: str) -> None:
    """Raise Unsupported where adapters are to travel with weights that they were not trained on."""
    if contents.adapters:
        raise Unsupported(
            f"{option} changes what the weights mean to an adapter, and --lora brings some; build with gptq, "
            "hqq or rtn, or without --lora"
        )


def measured_sensitivity(
    contents: Contents,
    profile: Profile,
    request: planner.Request,
    calibrations: Calibrations,
    options: Options,
    watcher: Watcher,
) -> Sensitivity | None:
    """What the planner spends bytes by: the file given; measured, where the build calibrates and chooses
    formats, or where asked for; else None for the model of losses.py. Refined, where formats are chosen.

    Raises BadConfig for a file of another model's losses."""
    if options.sensitivity is not None:
        options.sensitivity.check_model(contents.target.source.sha256())
        return options.sensitivity
    if not calibrations.made:
        return None
    if request.weights != planner.AUTO and options.calibration.sensitivity is None:
        return None
    program = contents.language.program
    resolved = planner.resolve(program, profile, request, contents.companions())
    found = calibrations.sensitivity(
        contents.language,
        planner.candidates(profile, resolved),
        options.calibration.sensitivity,
        options.algorithm,
        watcher,
    )
    if request.weights == planner.AUTO:
        question = Question(program, profile, resolved, contents.companions())
        rounding = Rounding(options.algorithm, options.observer, options.feedback)
        found = refined(question, contents.language, found, calibrations, rounding, watcher)
    found = found.of_model(contents.target.source.sha256())
    _keep(options, "sensitivity", found)
    if options.keep_json is not None and importlib.util.find_spec("matplotlib") is not None:
        draw(found, options.keep_json / "sensitivity.png")
    return found


def plan(
    contents: Contents,
    profile: Profile,
    request: planner.Request,
    sensitivity: Sensitivity | None,
    options: Options,
) -> Plans:
    """Phase 3. Raises DoesNotFit or BudgetNotMet, with the smallest changes that would help."""
    program, beside = contents.language.program, contents.companions()
    plans, resolved = require_fit(program, profile, request, beside, sensitivity)
    why = {}
    if options.plot is not None or (resolved.weights == planner.AUTO and options.keep_json is not None):
        why["explanation"] = explain(program, profile, resolved, plans, beside, sensitivity)
    if options.plot is not None:
        draw_plan(why["explanation"], options.plot)
    _keep(options, "plan", plans | why)
    return plans


def device_code(contents: Contents, plans: Plans, profile: Profile, watcher: Watcher) -> DeviceCode:
    """The kernels that the programs need, compiled for the profile. Raises BuildError, or Unsupported for
    an op or format that the cuda backend has no kernel for."""
    watcher.phase("compile", 1)
    room = sum(plan.memory.device_code for plan in plans.values())
    code = compile_device_code(device_kernels(pack.part_entries(contents, plans)), profile, room)
    watcher.step(f"{len(code.entries[0].kernels)} kernels for sm_{code.entries[0].sm}")
    return code


def digests(contents: Contents, options: Options) -> dict[str, str]:
    """Digest of every file that the engine was made, planned or measured with, by its name in the provenance.

    Those that are no part of it as `eval/…`, `task/…`, `calibration/…` and, for a profile of the user's own,
    `profile/…`; losses that a file gave as `sensitivity`.
    """
    beside = {"eval": options.text, "task": options.task}
    if options.calibration.source not in (None, SELF, BUILTIN):
        beside["calibration"] = Path(options.calibration.source)
    if options.profile.endswith(SUFFIXES):
        beside["profile"] = Path(options.profile)
    found = contents.sha256()
    for prefix, path in beside.items():
        files = () if path is None else text_files(path) if path.is_dir() else (path,)
        found |= {f"{prefix}/{file.name}": sha256_of(file) for file in files}
    if options.sensitivity is not None:
        found["sensitivity"] = hashlib.sha256(msgspec.json.encode(options.sensitivity)).hexdigest()
    return found


def read_measures(
    contents: Contents, asked: int | None, options: Options
) -> tuple[EvaluationText, Task | None]:
    """The evaluation text and the task in the target's tokens, before any long work. `asked`: the request's
    context. Raises BadConfig.
    """
    target = contents.target
    context = planner.default_context(target.program.max_context, asked)
    limit, window = options.text_tokens, min(context, options.text_tokens)
    text = read_text(target.source, target.vocabulary, options.text, limit=limit, window=window)
    if options.task is None:
        return text, None
    if not options.measure:
        raise BadConfig("--task is part of the quality report; leave --no-eval away")
    return text, Task(read_task(options.task), target.source, target.vocabulary, context)


def verify(
    subject: Subject,
    options: Options,
    text: EvaluationText,
    task: Task | None,
    sqnr: dict[str, float],
    watcher: Watcher,
) -> tuple[Quality | None, KnownAnswer | None]:
    """Phase 5. Measure the language part's planes as they lie in the file against the checkpoint; record a
    known answer. Companions change no answer, so they are not measured here."""
    watcher.phase("verify", 2)
    quality = None
    if options.measure:
        quality = measure_quality(subject, text, options.eval_backend, sqnr)
    watcher.step("quality")
    program, stored = subject.part.program, subject.stored.of
    answer = known_answer(subject.profile, program, subject.plan, stored, text.windows[0], subject.code)
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
    seconds[phase] = seconds.get(phase, 0.0) + monotonic() - begin


def _check_keep(folder: Path | None) -> None:
    """Raise BadConfig where --keep-json cannot be written to, before any work."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadConfig(f"--keep-json {folder}: not a folder that can be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise BadConfig(f"--keep-json {folder}: nothing may be written there; name another folder")


def _keep(options: Options, phase: str, value: Any) -> None:
    if options.keep_json is None:
        return
    path = options.keep_json / f"{phase}.json"
    try:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
    except OSError as error:
        raise BuildError(f"--keep-json: {path} could not be written: {error.strerror}") from error
