"""Train Medusa heads on a frozen model: python -m builders.medusa MODEL --jsonl chats.jsonl -o HEADS

Medusa-1 (Cai et al. 2024, arXiv 2401.10774): proj starts at zero and each head as the model's own, so an
untrained head says what the model says. The model never changes. `edge-build --medusa HEADS` takes them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from builders.lessons import Lesson, batches, read_lessons
from builders.medusa_heads import (
    Base,
    Heads,
    accuracy,
    ask,
    identity_of,
    new_heads,
    train_step,
    write_heads,
)
from builders.sources.medusa import CONFIG, WEIGHTS, MedusaConfig
from builders.trained_folder import Kind, TrainedFolder
from builders.training import (
    check_limits,
    learning_rate,
    restore_state,
    save_state,
    state_nbytes,
    watch,
)
from builders.training_options import SetUp, time_rows
from edge_runtime.cli.output import Answer, Parser, run_command, table
from edge_runtime.engine.manifest import MAX_HEADS
from edge_runtime.errors import BadConfig

EXAMPLES = (
    "python -m builders.medusa path/to/model --jsonl chats.jsonl --minutes 10 -o heads",
    "python -m builders.medusa path/to/model --text notes.txt --heads 3 --steps 500 -o heads",
)

HEADS = Kind("builders.medusa", (CONFIG, WEIGHTS), lambda folder: (folder / CONFIG).exists())


def make_parser() -> Parser:
    parser = Parser("python -m builders.medusa", "Train Medusa heads on a frozen model.", EXAMPLES)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="model folder; it is only read")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the heads go")
    add("--heads", type=int, default=4, metavar="N", help="heads to train [4]")
    add("--text", type=Path, metavar="FILE", help="plain text to learn from")
    add("--jsonl", type=Path, metavar="FILE", help="chats, prompts with completions, or texts, one a line")
    add("--heldout", type=Path, metavar="FILE", help="text or .jsonl to measure on")
    add("--minutes", type=float, default=10.0, metavar="M", help="training time [10]")
    add("--steps", type=int, metavar="N", help="a number of steps instead; repeats exactly")
    add("--length", type=int, default=512, metavar="N", help="longest sequence, tokens [512]")
    add("--batch-tokens", type=int, default=4096, metavar="N", help="tokens of one step [4096]")
    add("--rate", type=float, default=1e-3, metavar="X", help="peak learning rate [0.001]")
    add("--seed", type=int, default=1, metavar="N", help="order of the texts [1]")
    add("--threads", type=int, default=0, metavar="N", help="cores [all]")
    add("--fresh", action="store_true", help="do not go on from an interrupted run")
    return parser


def check(args: argparse.Namespace) -> Path:
    """The text to learn from. Raises BadConfig for what cannot be meant."""
    given = [path for path in (args.text, args.jsonl) if path is not None]
    if len(given) != 1:
        raise BadConfig("give either --text FILE or --jsonl FILE")
    if args.jsonl is not None and args.jsonl.suffix != ".jsonl":
        raise BadConfig(f"--jsonl {args.jsonl.name}: expected a file that ends in .jsonl")
    check_limits(
        {
            "--heads": (args.heads, 1, MAX_HEADS),
            "--minutes": (args.minutes, 0.01, 1e5),
            "--steps": (1 if args.steps is None else args.steps, 1, 1e9),
            "--length": (args.length, 8, 1 << 20),
            "--batch-tokens": (args.batch_tokens, 8, 1 << 24),
            "--rate": (args.rate, 1e-8, 1.0),
            "--threads": (args.threads, 0, 1024),
        }
    )
    return Path(given[0])


def train(heads: Heads, base: Base, lessons: Sequence[Lesson], args: argparse.Namespace) -> Iterator[float]:
    """Train to the end of the budget; yields after each step how much of it is done."""
    source = batches(lessons, args.batch_tokens, args.seed)
    for _ in range(heads.step):  # a run taken up again sees what it would have seen
        next(source)
    while True:
        done = heads.step / args.steps if args.steps else heads.seconds / (60 * args.minutes)
        if done >= 1:
            return
        began = monotonic()
        for group in heads.optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, heads.step, done)
        heads.losses.append(train_step(heads, ask(base, next(source), heads.count), base.vocab_size))
        heads.step += 1
        heads.seconds += monotonic() - began
        yield done


def run(args: argparse.Namespace) -> Answer:
    text = check(args)
    with TrainedFolder(args.output, HEADS, args.model) as out:
        return _run(args, text, out)


def _run(args: argparse.Namespace, text: Path, out: TrainedFolder) -> Answer:
    set_up = SetUp(2)
    set_up(f"read {args.model.name}")
    base = Base(args.model)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    length = min(args.length, base.context)
    set_up(f"read {text.name}")
    with base.text as words:
        lessons = read_lessons(text, words, length)
        heldout = [] if args.heldout is None else read_lessons(args.heldout, words, length)
    config = MedusaConfig(
        heads=args.heads,
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        base=base.name,
        base_sha256=base.sha256,
    )
    heads = new_heads(base, args.heads, args.rate)
    halves = 2 * sum(tensor.numel() for tensor in heads.tensors.values())
    out.prepare(halves, state_nbytes(heads))
    heads.identity = identity_of(config, args.seed)
    if out.state.exists() and not args.fresh:
        restore_state(heads, out.state)
    set_up("train")
    watch(heads, train(heads, base, lessons, args), lambda: save_state(heads, out.state))
    with out.replacing() as folder:
        write_heads(heads, folder, config)
    found = accuracy(heads, base, heldout, args.batch_tokens) if heldout else []
    data: dict[str, Any] = {
        "path": str(args.output),
        "steps": heads.step,
        "seconds": round(heads.seconds, 3),
        "total_seconds": round(set_up.seconds, 3),
        "loss": heads.losses[-1] if heads.losses else None,
        "accuracy": found,
    }
    rows = [("heads", f"{heads.count} in {args.output}"), *time_rows(heads, set_up.seconds)]
    rows += [(f"head {k}", f"{100 * share:.2f}% of held-out tokens") for k, share in enumerate(found, 1)]
    return Answer(data, table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
