"""edge-bench: how fast an engine is here: speed, requests at once, speculation, prefixes; beside its plan."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.cli.calibration_answer import calibration_answer
from edge_runtime.cli.first_token import TAIL, measure_first_token
from edge_runtime.cli.measure import measure_level, measure_speed
from edge_runtime.cli.options import add_open_options, integer, open_with
from edge_runtime.cli.output import Answer, Parser, profiles_answer, progress, run_command, size
from edge_runtime.cli.plots import check_plot, draw
from edge_runtime.cli.report import Findings
from edge_runtime.cli.speedup import measure_speedup
from edge_runtime.cli.tune import tune_answer
from edge_runtime.cli.workload import workload
from edge_runtime.engine.plan import DRAFT_LENGTH, MAX_DRAFT_LENGTH
from edge_runtime.errors import BadConfig, NumericError, Unsupported, nearest
from edge_runtime.serving.device import get_backend
from edge_runtime.serving.guessing import AUTO
from edge_runtime.serving.session import Session

EXAMPLES = (
    "edge-bench model.edge",
    "edge-bench model.edge --prompts 64,512 --depths 0,1024 --decode 128 --repeat 9 --json",
    "edge-bench planner.edge --only requests,speculation --text commands.jsonl --concurrency 1,2,4",
    "edge-bench planner.edge --text commands.jsonl --draft-lengths 1,2,4,8 --plot planner.svg",
    "edge-bench --tune model.edge  # on a GPU, once",
    "edge-bench --calibrate --output here.yaml model.edge  # then: edge-build --profile ./here.yaml MODEL",
)
SECTIONS = ("speed", "requests", "speculation", "prefix")
_LONGEST_PREFIX = 2048  # tokens, unless another is asked for
_MOST = 1000  # of anything that is repeated


@dataclass(frozen=True, slots=True)
class Settings:
    """What is measured, all of it within what the session can do."""

    sections: tuple[str, ...]
    prompts: list[int]
    depths: list[int]
    decode: int
    concurrency: list[int]
    requests: int
    max_tokens: int
    draft_lengths: list[int]
    prefix_tokens: int
    repeat: int


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of edge-bench; returns the exit code."""
    return run_command(make_parser(), run, argv)


def make_parser() -> Parser:
    parser = Parser("edge-bench", "Measure on this machine how fast an engine serves.", EXAMPLES)
    add = parser.add_argument
    add("engine", nargs="?", metavar="ENGINE", help="engine file (.edge)")
    add("--only", metavar="WHAT,WHAT", help=f"of {', '.join(SECTIONS)} [all that the engine allows]")
    add("--repeat", type=integer, default=5, metavar="N", help="take the median of N runs [5]")
    add("--plot", type=Path, metavar="FILE", help="draw all of it (.svg or .png; needs matplotlib)")
    add("--profiles", action="store_true", help="list the devices and stop")
    add(
        "--tune",
        action="store_true",
        help="choose the fastest kernels for ENGINE on this GPU, and keep the choice",
    )
    add = parser.add_argument_group("calibration").add_argument
    add("--calibrate", action="store_true", help="measure the cpu backend here, for plans; checks ENGINE")
    add("--profile", default=None, metavar="NAME", help="the profile to put the figures into [auto]")
    add("--output", type=Path, metavar="FILE", help="profile to write [calibrated.yaml]")
    add("--formats", metavar="FORMAT,FORMAT", help="weight formats to time [all that have kernels]")
    add = parser.add_argument_group("speed").add_argument
    add("--prompts", metavar="N,N", help="prompt lengths to read [32,128,512, as the context allows]")
    add("--depths", metavar="N,N", help="tokens before decoding starts [1 and half the context]")
    add("--decode", type=integer, default=32, metavar="N", help="tokens to write [32]")
    add = parser.add_argument_group("requests, speculation").add_argument
    add("--text", type=Path, metavar="FILE", help="a prompt a line, or .jsonl [known answer, random tokens]")
    add("--requests", type=integer, default=8, metavar="N", help="requests of a round [8]")
    add("--max-tokens", type=integer, metavar="N", help="longest answer [64, as the context allows]")
    add("--concurrency", metavar="N,N", help="requests at once [1,2,4, as the engine allows]")
    add("--draft-lengths", metavar="N,N", help="tokens guessed ahead [1,2,4,8; all sizes of a Medusa tree]")
    add = parser.add_argument_group("prefix").add_argument
    add("--prefix-tokens", type=integer, metavar="N", help="tokens of the prefix [half the context]")
    add_open_options(parser)
    return parser


def run(args: argparse.Namespace) -> Answer:
    """Open, measure, report."""
    if args.profiles:
        return profiles_answer()
    if args.calibrate:
        return calibration_answer(args)
    if args.tune:
        return tune_answer(args)
    for option in ("profile", "output", "formats"):
        if getattr(args, option) is not None:
            raise BadConfig(f"--{option} is for --calibrate; give both or neither")
    if args.engine is None:
        raise BadConfig("which engine file? (see edge-bench --help)")
    _check_early(args)
    with open_with(args) as session:
        for notice in session.notices:
            progress(f"note: {notice}")
        settings = _settings(args, session)
        found = Findings(
            f"{session.manifest.name} on {session.backend}, KV {session.kv.k},{session.kv.v}",
            settings.repeat,
            session.plan.predicted.decode_tokens_per_s,
            settings.max_tokens,
            session.speculate,
        )
        data = {
            "engine": session.manifest.name,
            "backend": session.backend,
            "kv": {"k": session.kv.k, "v": session.kv.v},
            "memory": {"planned_bytes": session.memory.need, "used_bytes": session.memory_used},
            "predicted_decode_tokens_per_s": found.predicted,
            "planned_for": session.plan.profile,
            "sections": list(settings.sections),
        }
        memory = f"memory planned {size(session.memory.need)}, used {size(session.memory_used)}"
        _measure(session, settings, args.text, found, lambda: open_with(args))
    data |= found.as_dict()
    text = (
        f"{found.title}, median of {found.repeat}\n\n{found.as_text()}\n\n"
        f"planned for {data['planned_for']}: {found.predicted:.1f} tokens/s decode predicted · {memory}"
    )
    if args.plot is not None:
        draw(found, args.plot)
        data["plot"] = str(args.plot)
    return Answer(data, text, _broken(found, str(data["backend"])))


def _measure(
    session: Session, settings: Settings, text: Path | None, found: Findings, reopen: Callable[[], Session]
) -> None:
    """All sections in order; the last one closes the session."""
    sections, repeat = settings.sections, settings.repeat
    if "requests" in sections or "speculation" in sections:
        asked = workload(session, text, settings.requests, settings.max_tokens)
        found.source = asked.source
    if "speed" in sections:
        progress(f"speed: {len(settings.prompts)} prompts and {len(settings.depths)} depths, {repeat} times")
        found.rows = measure_speed(session, settings.prompts, settings.depths, settings.decode, repeat)
    if "requests" in sections:
        for level in settings.concurrency:
            progress(f"requests: {settings.requests}, {level} at once, {repeat} times")
            found.levels.append(measure_level(session, asked.requests, level, repeat))
    if "speculation" in sections:
        lengths = settings.draft_lengths
        progress(f"speculation: {session.speculate}, lengths {_listed(lengths)}, {repeat} times")
        found.speedup = measure_speedup(session, asked.source, asked.requests, lengths, repeat)
    if "prefix" in sections:
        progress(f"prefix: {settings.prefix_tokens} tokens, {repeat} times")
        found.first = measure_first_token(session, reopen, settings.prefix_tokens, repeat)


def _broken(found: Findings, backend: str) -> NumericError | None:
    """Answers must not change with what was guessed or cached, where a backend promises that."""
    if not get_backend(backend).exact:
        return None
    if found.speedup is not None and found.speedup.different:
        return NumericError(
            f"{found.speedup.different} of {found.speedup.answers} answers differ with speculation; "
            "this backend must give the same with and without: please report it"
        )
    if found.first is not None and not found.first.same:
        return NumericError("a cached prefix changed the first token; it must not: please report it")
    return None


def _check_early(args: argparse.Namespace) -> None:
    """What can be said without the engine, which may take long to load. Brings `only` and the draft lengths
    into shape, and has the session opened for the longest of these.
    """
    for option in ("repeat", "requests"):
        if not 1 <= getattr(args, option) <= _MOST:
            raise BadConfig(f"--{option} {getattr(args, option)}: expected 1 to {_MOST}")
    if args.plot is not None:
        check_plot(args.plot)
    if args.only is not None:
        words = [word.strip() for word in args.only.split(",")]
        for word in words:
            if word not in SECTIONS:
                raise BadConfig(f"--only {word!r:.60}: {nearest(word, SECTIONS)}")
        args.only = [word for word in SECTIONS if word in words]
    if args.draft_lengths is not None:
        longest = MAX_DRAFT_LENGTH if args.draft_length is None else args.draft_length
        args.draft_lengths = _numbers("--draft-lengths", args.draft_lengths, 1, longest, "--draft-length")
        if args.draft_length is None:
            args.draft_length = max(DRAFT_LENGTH, *args.draft_lengths)


def _settings(args: argparse.Namespace, session: Session) -> Settings:
    """Raises BadConfig for what the session cannot hold, Unsupported for a section it has no part for."""
    context, step, kv = session.context, session.step_shape, session.kv
    if not 1 <= args.decode <= context - 2:
        raise BadConfig(f"--decode {args.decode}: expected 1 to {context - 2}, which the context holds")
    deepest = context - args.decode - 1
    prompts = [n for n in (32, 128, 512) if n < context] or [context - 1]
    depths = sorted({1, min(context // 2, deepest)})
    if args.prompts is not None:
        prompts = _numbers("--prompts", args.prompts, 1, context - 1, "the context")
    if args.depths is not None:  # depth 0 cannot be: something must be continued
        depths = _numbers("--depths", args.depths, 0, deepest, "the context")
    levels = [n for n in (1, 2, 4) if n <= step.sequences]
    if args.concurrency is not None:
        levels = _numbers("--concurrency", args.concurrency, 1, step.sequences, "the engine's plan")
    max_tokens = min(64, context // 2) if args.max_tokens is None else args.max_tokens
    if not 1 <= max_tokens < context:
        raise BadConfig(f"--max-tokens {max_tokens}: expected 1 to {context - 1}, which the context holds")
    room = min(context, kv.pages * kv.page_tokens) - TAIL - 1
    prefix = max(kv.page_tokens, min(context // 2, room, _LONGEST_PREFIX))
    if args.prefix_tokens is not None:
        prefix = args.prefix_tokens
        if not kv.page_tokens <= prefix <= room:
            raise BadConfig(
                f"--prefix-tokens {prefix}: expected {kv.page_tokens}, a page, to {room}, which cache and "
                "context hold"
            )
    return Settings(
        sections=_sections(args, session, room),
        prompts=prompts,
        depths=[max(n, 1) for n in depths],
        decode=args.decode,
        concurrency=levels,
        requests=args.requests,
        max_tokens=max_tokens,
        draft_lengths=_draft_lengths(args, session),
        prefix_tokens=prefix,
        repeat=args.repeat,
    )


def _sections(args: argparse.Namespace, session: Session, room: int) -> tuple[str, ...]:
    """Those asked for, else all that say something about this engine."""
    lacks = {}
    if session.speculate == "off":
        lacks["speculation"] = (
            "this session does not guess ahead; open it with --speculate draft, medusa or lookup"
        )
    if room < session.kv.page_tokens:
        lacks["prefix"] = (
            f"context and cache must hold a prefix of a page, {session.kv.page_tokens} tokens, and "
            f"{TAIL + 1} more"
        )
    if args.only is None:
        if session.speculate == "lookup" and args.speculate == AUTO:  # every engine can; it was not asked for
            lacks["speculation"] = ""
        return tuple(s for s in SECTIONS if s not in lacks)
    for section in args.only:
        if section in lacks:
            raise Unsupported(f"--only {section}: {lacks[section]}")
    return tuple(args.only)


def _draft_lengths(args: argparse.Namespace, session: Session) -> list[int]:
    can = session.speculation.lengths
    if args.draft_lengths is None:
        return [n for n in can if n in (1, 2, 4, 8) or session.speculate == "medusa"]
    for n in args.draft_lengths:
        if can and n not in can:
            raise BadConfig(f"--draft-lengths {n}: {session.speculate} guesses {_listed(can)} tokens here")
    return list(args.draft_lengths)


def _numbers(option: str, text: str, least: int, most: int, holder: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise BadConfig(f"{option} {text!r:.60}: expected numbers such as 64,512") from None
    for n in found:
        if not least <= n <= most:
            raise BadConfig(f"{option} {n}: expected {least} to {most}, which {holder} holds")
    return found


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
