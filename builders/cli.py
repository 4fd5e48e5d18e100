"""edge-build: a checkpoint becomes one engine file planned for one device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from builders import fitting, fleet, planner, report
from builders.arguments import make_parser
from builders.budgets import parse_bytes, parse_formats
from builders.calibrating import CalibrationRequest
from builders.corpus import CorpusOptions
from builders.explain import explain
from builders.explanation_text import explanation_text
from builders.fleet_file import read_fleet
from builders.limits import Limits
from builders.pack import engine_name
from builders.parts import Extras, read_companions, read_planned
from builders.picture import check_picture, save_picture
from builders.pipeline import Options, build, settled
from builders.plan_picture import plan_figure
from builders.prefix import read_prefix, write_prefix
from builders.runner import native_backend
from builders.sensitivity import read_sensitivity
from builders.sources import model_name, read_config
from edge_runtime.cli.output import Answer, profiles_answer, progress, run_command
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.profile import load_profile
from edge_runtime.errors import BackendUnavailable, BadConfig, BuildError, QualityLimit

_UNRECORDED = (
    *("model", "output", "json", "force", "profiles", "dry_run", "keep_json", "plot"),
    *("matrix", "jobs", "ray", "calibration_folder"),
)


def run(args: argparse.Namespace) -> Answer:
    if args.profiles:
        return profiles_answer()
    if args.matrix is not None:
        return _fleet(args)
    if args.jobs is not None or args.ray is not None:
        raise BadConfig("--jobs and --ray need --matrix")
    for option, value in (("MODEL", args.model), ("--profile", args.profile)):
        if not value:
            raise BadConfig(f"{option} is missing (see edge-build --help)")
    return dry_run(args, _request(args)) if args.dry_run else _build(args)


def answer(args: argparse.Namespace) -> Answer:
    """What `run` finds; where a limit stops a build, the figures that broke it beside the error."""
    try:
        return run(args)
    except QualityLimit as error:
        return report.broken_answer(error)


def _fleet(args: argparse.Namespace) -> Answer:
    """Many engines, as a file says."""
    given = {k for k, v in vars(args).items() if v != make_parser().get_default(k)}
    if other := sorted(given - {"matrix", "jobs", "ray", "force", "json"}):
        names = ", ".join("MODEL" if k == "model" else f"--{k.replace('_', '-')}" for k in other)
        raise BadConfig(f"{names} cannot stand beside --matrix; write it in {args.matrix.name}")
    cells = read_fleet(args.matrix, make_parser)
    with report.ProgressBar(steps=True) as bar:
        rows = fleet.build_fleet(cells, force=args.force, jobs=args.jobs, ray=args.ray, watcher=bar)
    return Answer(fleet.fleet_data(cells, rows), fleet.fleet_text(rows), fleet.worst_error(rows))


def dry_run(args: argparse.Namespace, request: planner.Request) -> Answer:
    """The plan of a config.json; weights are neither needed nor read."""
    if args.plot is not None:
        check_picture(args.plot)
    profile = load_profile(args.profile)
    blocks = request.in_blocks and args.sensitivity_file is not None and args.rotate is None
    architecture, kept = read_planned(Path(args.model), request.context, blocks=blocks)
    name = read_config(args.model)[1]
    request = settled(request, args.algorithm, quantized=bool(kept))
    if request.weights == planner.KEEP:
        request = replace(request, kept=kept)
    beside = read_companions(_extras(args), architecture, request.context)
    program = architecture.program
    losses = None if args.sensitivity_file is None else read_sensitivity(args.sensitivity_file)
    plans, resolved = planner.choose(program, profile, request, beside, losses)
    error, changes = fitting.shortfall(program, profile, resolved, plans, beside, losses)
    text = report.plan_text(name, program, plans, resolved, profile, changes)
    data = report.plan_data(name, program, plans, resolved, changes)
    if request.weights == planner.AUTO or args.plot is not None:
        why = explain(program, profile, resolved, plans, beside, losses)
        data["explanation"] = why.as_dict()
        text += f"\n\n{explanation_text(why)}"
        if args.plot is not None:
            try:
                save_picture(plan_figure(why), args.plot)
                data["plot"] = str(args.plot)
            except BuildError as lost:
                error = error or lost
    return Answer(data, text, error)


def build_options(args: argparse.Namespace) -> Options:
    """What the options of a command line ask for. Raises BadConfig."""
    if args.task_f32 and args.task is None:
        raise BadConfig("--task-f32 needs --task")
    if args.plot is not None:
        check_picture(args.plot)
    if args.eval_tokens < 2:
        raise BadConfig(f"--eval-tokens is {args.eval_tokens}, expected at least 2")
    request = _request(args)
    model = Path(args.model)
    name = engine_name(f"{model_name(model)}-{args.profile.removesuffix('.yaml').rsplit('/', 1)[-1]}")
    given = "" if args.weights == planner.DEFAULT else f"-{args.weights}"
    output = args.output or Path(f"{name}{given}.edge")
    return Options(
        model=model,
        output=output,
        profile=args.profile,
        request=request,
        extras=_extras(args),
        algorithm=args.algorithm,
        observer=args.observer,
        feedback=args.feedback,
        tune=args.tune,
        activations=args.activations,
        static_scales=args.activation_scales == "static",
        rotate=args.rotate,
        calibration=_calibration(args),
        calibrates=any(x is not None for x in (args.calibration, args.calibration_folder, args.sensitivity)),
        text=args.eval,
        text_tokens=args.eval_tokens,
        measure=not args.no_eval,
        eval_backend=args.eval_backend,
        task=args.task,
        task_f32=args.task_f32 or None,
        limits=Limits(args.max_kl, args.max_ppl_increase, args.min_accuracy),
        force=args.force,
        keep_json=args.keep_json,
        plot=args.plot,
        recipe=_recipe(args),
        sensitivity=None if args.sensitivity_file is None else read_sensitivity(args.sensitivity_file),
        device_code=not args.no_device_code,
    )


def _build(args: argparse.Namespace) -> Answer:
    options = build_options(args)
    beside = None if args.prefix is None else read_prefix(args.prefix)  # before the work of a build
    backend = load_profile(args.profile).backend
    if beside is not None and native_backend(load_profile(args.profile)) is None:
        raise BackendUnavailable(
            f"--prefix runs the engine, and backend {backend!r} cannot run here; build without it, and save "
            "the prefix on the device with session.save_prefix()"
        )
    with report.ProgressBar() as bar:
        done = build(options, bar)
    for notice in done.notices:
        progress(f"note: {notice}")
    data, text = report.build_data(done), report.build_text(done)
    if beside is not None:
        path, tokens = write_prefix(done.path, beside, backend)
        data["prefix"] = {"path": str(path), "tokens": tokens}
        text += f"\nprefix          {path}, {tokens} tokens"
    return Answer(data, text)


def _request(args: argparse.Namespace) -> planner.Request:
    free = args.kv == planner.AUTO
    k, v = kv_pair("int8" if free else args.kv)
    budgets = (args.max_memory, args.min_tokens_per_second, args.max_first_token_ms, args.bits)
    chosen = any(x is not None for x in (*budgets, args.formats, args.sensitivity_file))
    if args.weights is None:
        args.weights = planner.AUTO if chosen else planner.DEFAULT
    return planner.Request(
        weights=args.weights,
        head_weights=args.head_weights,
        kv_k=k,
        kv_v=v,
        context=args.context,
        sequences=args.sequences,
        kv_tokens=args.kv_tokens,
        step_tokens=args.step_tokens,
        page_tokens=args.page_tokens,
        power_mode=args.power_mode,
        draft_weights=args.draft_weights,
        draft_kv=None if args.draft_kv is None else kv_pair(args.draft_kv),
        draft_length=args.draft_length,
        max_memory=None if args.max_memory is None else parse_bytes("--max-memory", args.max_memory),
        bits=args.bits,
        min_tokens_per_second=args.min_tokens_per_second,
        max_first_token_ms=args.max_first_token_ms,
        formats=() if args.formats is None else parse_formats(args.formats),
        kv_choices=planner.KV_CHOICES if free else (),
    )


def _calibration(args: argparse.Namespace) -> CalibrationRequest:
    memory = args.calibration_memory
    plain = CalibrationRequest()
    return CalibrationRequest(
        source=args.calibration,
        corpus=CorpusOptions(args.samples, args.sample_tokens, args.seed),
        device=args.device,
        memory=plain.memory if memory is None else parse_bytes("--calibration-memory", memory),
        folder=args.calibration_folder,
        sensitivity=args.sensitivity,
    )


def _extras(args: argparse.Namespace) -> Extras:
    """Raises BadConfig for an option that has no meaning without another, or a name given twice."""
    if args.draft is None and (args.draft_weights or args.draft_kv):
        raise BadConfig("--draft-weights and --draft-kv need --draft")
    adapters: dict[str, Path] = {}
    for text in args.lora:
        name, equals, folder = text.partition("=")
        if not (name and equals and folder):
            raise BadConfig(f"--lora {text!r}: expected NAME=FOLDER")
        if name in adapters:
            raise BadConfig(f"--lora {name!r} is given twice")
        adapters[name] = Path(folder)
    return Extras(args.draft, args.medusa, adapters)


def _recipe(args: argparse.Namespace) -> dict[str, str]:
    """What was asked for, by option name; of files only the name, so that no path enters the engine."""
    given = {k: v for k, v in sorted(vars(args).items()) if k not in _UNRECORDED}
    return {k.replace("_", "-"): _pathless(v) for k, v in given.items() if v not in (None, False, [])}


def _pathless(value: object) -> str:
    if isinstance(value, list):  # NAME=FOLDER each
        pairs = (str(item).partition("=") for item in value)
        return ",".join(f"{name}={Path(folder).name}" for name, _, folder in pairs)
    return value.name if isinstance(value, Path) else str(value).rsplit("/", 1)[-1]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of edge-build; returns the exit code."""
    return run_command(make_parser(), answer, argv)


if __name__ == "__main__":
    sys.exit(main())
