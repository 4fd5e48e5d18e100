"""What the commands that train have in common: options of the data and the run, and what they report."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from builders.lessons import Lesson, read_lessons
from builders.texts import ModelText
from builders.training import Run, check_limits
from edge_runtime.cli.output import Parser, Progress

if TYPE_CHECKING:
    from builders.completions import Measured

HEAD_WEIGHTS = "of embedding and head [as edge-build plans them]"


def add_data_options(parser: Parser) -> None:
    add = parser.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help=".jsonl of chats, prompts with completions, or texts; any other file is plain text",
    )
    add("--heldout", type=Path, metavar="FILE", help="the same, to measure on before and after")


def add_run_options(parser: Parser, *, rate: float, seed: str) -> None:
    """`rate` is the default; `seed` says what is drawn by lot."""
    add = parser.add_argument
    add("--steps", type=int, default=300, metavar="N", help="steps of training [300]")
    add("--rate", type=float, default=rate, metavar="X", help=f"peak learning rate [{rate:g}]")
    add("--length", type=int, default=512, metavar="N", help="longest sequence, tokens [512]")
    add("--batch-tokens", type=int, default=2048, metavar="N", help="tokens of one step [2048]")
    add("--seed", type=int, default=1, metavar="N", help=f"{seed} [1]")
    add("--threads", type=int, default=0, metavar="N", help="cores [all]")
    add("--fresh", action="store_true", help="do not go on from an interrupted run")


def check_run(args: argparse.Namespace, more: Mapping[str, tuple[float, float, float]]) -> None:
    """`more`: limits of a command's own options. Raises BadConfig for what cannot be meant."""
    check_limits(
        {
            **more,
            "--steps": (args.steps, 1, 1e9),
            "--rate": (args.rate, 1e-8, 1.0),
            "--length": (args.length, 3, 1 << 20),
            "--batch-tokens": (args.batch_tokens, 3, 1 << 24),
            "--threads": (args.threads, 0, 1024),
        }
    )


def read_data(args: argparse.Namespace, text: ModelText, context: int) -> tuple[list[Lesson], list[Lesson]]:
    """(lessons, held-out ones or []) of at most --length tokens. Raises BadConfig naming the line."""
    length = min(args.length, context)
    lessons = read_lessons(args.data, text, length)
    return lessons, [] if args.heldout is None else read_lessons(args.heldout, text, length)


class SetUp:
    """Tells on stderr what is under way before the first step, which may take longer than the steps."""

    def __init__(self, phases: int) -> None:
        self._began = monotonic()
        self._told, self._phases = 0, phases
        self._progress = Progress("set-up")

    def __call__(self, what: str) -> None:
        """The next phase begins; after the last of them, training."""
        self._progress(self._told, self._phases, what)
        self._told += 1

    @property
    def seconds(self) -> float:
        """Since it began: at the end of a command, all that it took."""
        return monotonic() - self._began


def run_data(
    args: argparse.Namespace, run: Run, found: Mapping[str, Measured], total: float
) -> dict[str, Any]:
    """A finished run as plain values. `seconds` are of its steps, in all processes that it took; `total`: of
    this command, with set-up, measuring and writing."""
    return {
        "path": str(args.output),
        "steps": run.step,
        "seconds": round(run.seconds, 3),
        "total_seconds": round(total, 3),
        "loss": run.recent if run.losses else None,
        "heldout": {
            name: {"loss": m.loss, "accuracy": m.accuracy, "tokens": m.tokens} for name, m in found.items()
        },
    }


def time_rows(run: Run, total: float) -> list[tuple[str, str]]:
    """What its steps took, and all of this command."""
    return [("steps", f"{run.step}, {run.seconds:.0f} s"), ("in all", f"{total:.0f} s with set-up")]


def run_rows(run: Run, found: Mapping[str, Measured], total: float) -> list[tuple[str, str]]:
    """Rows of its table."""
    rows = time_rows(run, total)
    for name, m in found.items():
        rows.append((f"heldout {name}", f"loss {m.loss:.4f}, {100 * m.accuracy:.2f}% of {m.tokens} tokens"))
    return rows
