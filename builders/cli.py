"""edge-build: a checkpoint becomes one engine file planned for one device."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from builders import fitting, planner, report
from builders.limits import Limits
from builders.pack import engine_name
from builders.parts import Extras, read_architecture, read_companions
from builders.pipeline import Options, build
from builders.prefix import read_prefix, write_prefix
from builders.quality import EVAL_BACKENDS
from builders.quantize import algorithms
from builders.runner import native_backend
from builders.sources import model_name, read_config
from edge_runtime.cli.output import Answer, Parser, profiles_answer, progress, run_command
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import K_FORMATS, kv_pair
from edge_runtime.engine.plan import DRAFT_LENGTH
from edge_runtime.engine.profile import load_profile
from edge_runtime.errors import BackendUnavailable, BadConfig

_EXAMPLES = (
    "edge-build --profile orin-nano-8gb --weights int4_g64 --kv int8 path/to/model",
    "edge-build --profile auto --weights auto -o planner.edge path/to/model",
    "edge-build --profile orin --draft path/to/small --lora tidy=path/to/peft path/to/model",
    "edge-build --dry-run --profile orin-nano-8gb --context 8192 path/to/config.json",
    "edge-build --profile orin-agx-64gb --power-mode 30W --eval notes.txt --json path/to/model",
    "edge-build --profile orin --task cases.jsonl --min-accuracy 0.95 --max-kl 0.05 path/to/model",
    "edge-build --profiles",
)
_UNRECORDED = ("model", "output", "json", "force", "profiles", "dry_run", "keep_json")


def make_parser() -> Parser:
    parser = Parser(
        "edge-build", "Turn a Hugging Face model folder into one engine file for one device.", _EXAMPLES
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="model folder; with --dry-run also a config.json")
    add(
        "--profile", metavar="NAME", help="device: a name of --profiles, a .yaml file, or auto (this machine)"
    )
    add("--profiles", action="store_true", help="list the devices and stop")
    add("--dry-run", action="store_true", help="plan from config.json alone, without weights, and stop")
    add("-o", "--output", type=Path, metavar="FILE", help="engine to write [MODEL-PROFILE-WEIGHTS.edge]")
    add(
        "--force",
        action="store_true",
        help="replace a file there that is no engine; write an engine that breaks a quality limit",
    )
    plan = parser.add_argument_group("plan")
    add = plan.add_argument
    add(
        "--weights",
        default=planner.DEFAULT_WEIGHTS,
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}, or auto: the best that fits [{planner.DEFAULT_WEIGHTS}]",
    )
    add(
        "--head-weights",
        metavar="FORMAT",
        help="embedding and head [as --weights if float or int8, else int8_row]",
    )
    add(
        "--kv",
        default="int8",
        metavar="FORMAT",
        help=f"{', '.join(K_FORMATS)} (c: K per channel), or K,V such as int8,int4 [int8]",
    )
    add("--context", type=int, metavar="N", help="longest sequence, tokens [the model's, at most 4096]")
    add("--sequences", type=int, default=4, metavar="N", help="sequences served at once [4]")
    add(
        "--kv-tokens",
        type=int,
        metavar="N",
        help="tokens that the KV cache holds for all of them [--context]",
    )
    add(
        "--step-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens of one step; sizes the buffers [128]",
    )
    add("--page-tokens", type=int, default=16, metavar="N", help="tokens of a KV page, 16 or 32 [16]")
    add("--power-mode", metavar="MODE", help="power mode of the profile to predict for [its default]")
    beside = parser.add_argument_group("speculation and adapters")
    add = beside.add_argument
    add(
        "--draft",
        type=Path,
        metavar="FOLDER",
        help="smaller model with the same vocabulary; config.json will do for --dry-run",
    )
    add("--draft-weights", metavar="FORMAT", help="its weights [--weights]")
    add("--draft-kv", metavar="FORMAT", help="its KV cache, one format or K,V [--kv]")
    add(
        "--draft-length",
        type=int,
        metavar="N",
        help=f"tokens proposed at once; sizes the logits [{DRAFT_LENGTH} with --draft or --medusa, else 0]",
    )
    add("--medusa", type=Path, metavar="FOLDER", help="heads that builders.medusa trained on the model")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="PEFT folder that requests choose by name; may be repeated",
    )
    add(
        "--prefix",
        type=Path,
        metavar="FILE",
        help="text, or .json with chat messages, whose KV pages go into ENGINE.prefix",
    )
    quality = parser.add_argument_group("quality")
    add = quality.add_argument
    add(
        "--algorithm",
        default="rtn",
        metavar="NAME",
        help=f"how values are chosen: {', '.join(algorithms())} [rtn]",
    )
    add("--eval", type=Path, metavar="FILE", help="text to measure perplexity and KL on [built-in]")
    add("--eval-tokens", type=int, default=512, metavar="N", help="tokens of it [512]")
    add(
        "--eval-backend",
        choices=EVAL_BACKENDS,
        default=EVAL_BACKENDS[0],
        help="reference: activations f32; native: as this machine's backend computes [reference]",
    )
    add("--task", type=Path, metavar="FILE", help="JSONL of prompts and right answers to measure accuracy on")
    add("--task-f32", action="store_true", help="the f32 checkpoint's accuracy too [where it is small]")
    add("--max-kl", type=float, metavar="NATS", help="write nothing if mean KL is more (exit code 3)")
    add(
        "--max-ppl-increase",
        type=float,
        metavar="PERCENT",
        help="write nothing if perplexity rises more (exit code 3)",
    )
    add(
        "--min-accuracy",
        type=float,
        metavar="SHARE",
        help="write nothing if less of the task, 0 to 1, is right (exit code 3)",
    )
    add("--no-eval", action="store_true", help="do not measure quality")
    add("--keep-json", type=Path, metavar="FOLDER", help="leave one JSON of every phase there")
    return parser


def run(args: argparse.Namespace) -> Answer:
    if args.profiles:
        return profiles_answer()
    for option, value in (("MODEL", args.model), ("--profile", args.profile)):
        if not value:
            raise BadConfig(f"{option} is missing (see edge-build --help)")
    request = _request(args)
    return dry_run(args, request) if args.dry_run else _build(args, request)


def dry_run(args: argparse.Namespace, request: planner.Request) -> Answer:
    """The plan of a config.json; weights are neither needed nor read."""
    profile = load_profile(args.profile)
    config, name = read_config(args.model)
    architecture = read_architecture(config, request.context)
    beside = read_companions(_extras(args), architecture, request.context)
    program = architecture.program
    plans, resolved = planner.choose(program, profile, request, beside)
    changes, error = [], None
    if not planner.fits(plans):
        changes = fitting.changes_that_fit(program, profile, resolved, beside)
        error = fitting.does_not_fit(plans, profile, changes)
    text = report.plan_text(name, program, plans, resolved, profile, changes)
    return Answer(report.plan_data(name, program, plans, resolved, changes), text, error)


def _build(args: argparse.Namespace, request: planner.Request) -> Answer:
    if args.task_f32 and args.task is None:
        raise BadConfig("--task-f32 needs --task")
    if args.eval_tokens < 2:
        raise BadConfig(f"--eval-tokens is {args.eval_tokens}, expected at least 2")
    model = Path(args.model)
    name = engine_name(f"{model_name(model)}-{args.profile.removesuffix('.yaml').rsplit('/', 1)[-1]}")
    output = args.output or Path(f"{name}-{args.weights}.edge")
    options = Options(
        model=model,
        output=output,
        profile=args.profile,
        request=request,
        extras=_extras(args),
        algorithm=args.algorithm,
        text=args.eval,
        text_tokens=args.eval_tokens,
        measure=not args.no_eval,
        eval_backend=args.eval_backend,
        task=args.task,
        task_f32=args.task_f32 or None,
        limits=Limits(args.max_kl, args.max_ppl_increase, args.min_accuracy),
        force=args.force,
        keep_json=args.keep_json,
        recipe=_recipe(args),
    )
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
    k, v = kv_pair(args.kv)
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
    return run_command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
