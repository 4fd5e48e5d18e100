"""edge-bench: how fast an engine reads prompts and writes tokens here, beside what its plan predicted."""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.cli.options import add_open_options, integer, open_with
from edge_runtime.cli.output import Answer, Parser, profiles_answer, progress, run_command, size, table
from edge_runtime.errors import BadConfig, NumericError, Unsupported
from edge_runtime.serving.request import Completion, Request
from edge_runtime.serving.session import Session

EXAMPLES = (
    "edge-bench model.edge",
    "edge-bench model.edge --prompts 64,512 --depths 0,1024 --decode 128 --repeat 9 --json",
    "edge-bench model.edge --threads 2 --plot speed.svg",
)
_SEED = 7


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, repeated: `tokens` new tokens after `depth` tokens that were there already."""

    kind: str  # prefill | decode
    depth: int
    tokens: int
    seconds: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / statistics.median(self.seconds)

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "depth": self.depth,
            "tokens": self.tokens,
            "tokens_per_s": self.tokens_per_s,
            "slowest_tokens_per_s": self.tokens / max(self.seconds),
            "fastest_tokens_per_s": self.tokens / min(self.seconds),
            "seconds": list(self.seconds),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of edge-bench; returns the exit code."""
    return run_command(make_parser(), run, argv)


def make_parser() -> Parser:
    parser = Parser("edge-bench", "Measure an engine's prefill and decode speed on this machine.", EXAMPLES)
    add = parser.add_argument
    add("engine", nargs="?", metavar="ENGINE", help="engine file (.edge)")
    add("--prompts", metavar="N,N", help="prompt lengths to read [32,128,512, as the context allows]")
    add("--depths", metavar="N,N", help="tokens before decoding starts [1 and half the context]")
    add("--decode", type=integer, default=32, metavar="N", help="tokens to write [32]")
    add("--repeat", type=integer, default=5, metavar="N", help="take the median of N runs [5]")
    add("--plot", type=Path, metavar="FILE", help="draw the speeds (.svg or .png; needs matplotlib)")
    add("--profiles", action="store_true", help="list the devices and stop")
    add_open_options(parser)
    return parser


def run(args: argparse.Namespace) -> Answer:
    """Open, measure, report."""
    if args.profiles:
        return profiles_answer()
    if args.engine is None:
        raise BadConfig("which engine file? (see edge-bench --help)")
    if not 1 <= args.repeat <= 1000:
        raise BadConfig(f"--repeat {args.repeat}: expected 1 to 1000")
    if args.plot is not None:  # known before minutes of measuring
        _check_plot(args.plot)
    with open_with(args) as session:
        for notice in session.notices:
            progress(f"note: {notice}")
        prompts, depths = _lengths(args, session.context)
        rows = measure(session, prompts, depths, args.decode, args.repeat)
        predicted = session.plan.predicted
        data = {
            "engine": session.manifest.name,
            "backend": session.backend,
            "kv": {"k": session.kv.k, "v": session.kv.v},
            "memory": {"planned_bytes": session.memory.need, "used_bytes": session.memory_used},
            "predicted_decode_tokens_per_s": predicted.decode_tokens_per_s,
            "planned_for": session.plan.profile,
            "rows": [row.as_dict() for row in rows],
        }
        text = _text(session, rows)
    if args.plot is not None:
        plot(rows, f"{data['engine']} on {data['backend']}", args.plot)
        data["plot"] = str(args.plot)
    return Answer(data, text)


def measure(
    session: Session, prompts: Sequence[int], depths: Sequence[int], decode: int, repeat: int
) -> list[Row]:
    """One row for each prompt length and depth. Runs are interleaved, so that drift meets all rows alike."""
    ids = (
        np.random.default_rng(_SEED).integers(0, session.tokenizer.vocabulary.size, session.context).tolist()
    )
    _run(session, ids[: min(8, session.context - 2)], 2)  # caches and thread pool are warm after this
    prefill: dict[int, list[float]] = {n: [] for n in prompts}
    writing: dict[int, list[float]] = {n: [] for n in depths}
    for _ in range(repeat):
        for n in prompts:
            timing = _run(session, ids[:n], 1).timing
            prefill[n].append((timing.ttft_ms - timing.queue_ms) / 1e3)
        for n in depths:
            writing[n].append(decode / _run(session, ids[:n], decode + 1).timing.tokens_per_s)
    return [Row("prefill", 0, n, tuple(s)) for n, s in prefill.items()] + [
        Row("decode", n, decode, tuple(s)) for n, s in writing.items()
    ]


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Draw prefill speed over prompt length and decode speed over depth. Raises Unsupported, BadConfig."""
    _check_plot(path)
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    figure.suptitle(title)
    for axis, kind, label in zip(
        figure.subplots(1, 2), ("prefill", "decode"), ("prompt tokens", "tokens before"), strict=True
    ):
        chosen = sorted((r.tokens if kind == "prefill" else r.depth, r) for r in rows if r.kind == kind)
        x, speeds = [n for n, _ in chosen], [row.tokens_per_s for _, row in chosen]
        low = [s - row.tokens / max(row.seconds) for s, (_, row) in zip(speeds, chosen, strict=True)]
        high = [row.tokens / min(row.seconds) - s for s, (_, row) in zip(speeds, chosen, strict=True)]
        axis.errorbar(x, speeds, yerr=[low, high], marker="o", capsize=3)
        axis.set(title=kind, xlabel=label, ylabel="tokens/s (median, range)", ylim=(0, None))
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise BadConfig(f"--plot {path}: {error}") from error


def _run(session: Session, prompt: list[int], tokens: int) -> Completion:
    done = session.answer(Request(prompt=prompt, max_tokens=tokens, ignore_eos=True))
    if done.finish_reason != "length":
        raise NumericError(
            f"a run of {len(prompt)}+{tokens} tokens ended by {done.finish_reason}: {done.error}"
        )
    return done


def _lengths(args: argparse.Namespace, context: int) -> tuple[list[int], list[int]]:
    """Prompt lengths and depths. Raises BadConfig for one that the context cannot hold."""
    if not 1 <= args.decode <= context - 2:
        raise BadConfig(f"--decode {args.decode}: expected 1 to {context - 2}, which the context holds")
    deepest = context - args.decode - 1
    prompts = [n for n in (32, 128, 512) if n < context] or [context - 1]
    depths = sorted({1, min(context // 2, deepest)})
    if args.prompts is not None:
        prompts = _numbers("--prompts", args.prompts, 1, context - 1)
    if args.depths is not None:  # depth 0 cannot be: something must be continued
        depths = _numbers("--depths", args.depths, 0, deepest)
    return prompts, [max(n, 1) for n in depths]


def _numbers(option: str, text: str, least: int, most: int) -> list[int]:
    try:
        found = list(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise BadConfig(f"{option} {text!r:.60}: expected numbers such as 64,512") from None
    for n in found:
        if not least <= n <= most:
            raise BadConfig(f"{option} {n}: expected {least} to {most}, which the context holds")
    return found


def _text(session: Session, rows: Sequence[Row]) -> str:
    lines = [
        (
            row.kind,
            row.depth,
            row.tokens,
            f"{row.tokens_per_s:.1f}",
            f"{row.tokens / max(row.seconds):.1f}",
            f"{row.tokens / min(row.seconds):.1f}",
        )
        for row in rows
    ]
    head = ("", "after", "tokens", "tokens/s", "slowest", "fastest")
    predicted = session.plan.predicted.decode_tokens_per_s
    return (
        f"{session.manifest.name} on {session.backend}, KV {session.kv.k},{session.kv.v}, median of "
        f"{len(rows[0].seconds)}\n\n{table(lines, head, right=(1, 2, 3, 4, 5))}\n\n"
        f"planned for {session.plan.profile}: {predicted:.1f} tokens/s decode predicted · "
        f"memory planned {size(session.memory.need)}, used {size(session.memory_used)}"
    )


def _check_plot(path: Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("--plot needs matplotlib; install it with: pip install 'edge-runtime[plot]'")
    if path.suffix not in (".svg", ".png"):
        raise BadConfig(f"--plot {path}: expected a name that ends in .svg or .png")


if __name__ == "__main__":
    sys.exit(main())
