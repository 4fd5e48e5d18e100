"""Train an adapter on a quantized model: python -m builders.qlora MODEL --data chats.jsonl -o ADAPTER

QLoRA (Dettmers et al. 2023): the model is frozen in the planes of a format, or of an engine that is already
built; only low-rank updates learn. ADAPTER is a PEFT folder, for `edge-build --lora NAME=ADAPTER` and
`session.load_adapter`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.lessons import Lesson, batches, digest
from builders.packed_base import PackedBase, engine_base, read_base
from builders.role_formats import Formats
from builders.texts import ModelText
from builders.trained_folder import Kind, TrainedFolder
from builders.training import Run, carry_out, need_torch, state_nbytes, take_step
from builders.training_options import (
    HEAD_WEIGHTS,
    SetUp,
    add_data_options,
    add_run_options,
    check_run,
    read_data,
    run_data,
    run_rows,
)
from edge_runtime.cli.output import Answer, Parser, run_command, size, table
from edge_runtime.engine.adapter import MAX_RANK
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.peft import CONFIG, MAX_ALPHA, WEIGHTS
from edge_runtime.errors import BadConfig

if TYPE_CHECKING:
    from builders.completions import Measured
    from builders.low_rank import LowRankProgram

EXAMPLES = (
    "python -m builders.qlora path/to/model --data chats.jsonl --weights nf4_g64 --rank 8 -o adapter",
    "python -m builders.qlora robot.edge --data chats.jsonl --targets q,v,down --steps 500 -o adapter",
    "edge-build --profile orin-nano-8gb --weights nf4_g64 --lora tidy=adapter path/to/model",
)
DEFAULT_WEIGHTS = "nf4_g64"


def make_parser() -> Parser:
    parser = Parser("python -m builders.qlora", "Train an adapter on a frozen, quantized model.", EXAMPLES)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="model folder, or an .edge engine; it is only read")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the adapter goes")
    add_data_options(parser)
    add("--weights", metavar="FORMAT", help=f"of a folder's matrices, as of edge-build [{DEFAULT_WEIGHTS}]")
    add("--head-weights", metavar="FORMAT", help=HEAD_WEIGHTS)
    add("--rank", type=int, default=8, metavar="N", help="of the updates [8]")
    add("--alpha", type=float, default=16.0, metavar="X", help="updates count alpha / rank times [16]")
    add("--targets", default="all", metavar="NAMES", help="layers to adapt, such as q,v or down_proj [all]")
    add_run_options(parser, rate=1e-3, seed="order of the data, first values of A")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises BadConfig for what cannot be meant."""
    check_run(args, {"--rank": (args.rank, 1, MAX_RANK), "--alpha": (args.alpha, 1e-6, MAX_ALPHA)})
    if args.model.is_file() and (args.weights or args.head_weights):
        raise BadConfig(f"{args.model} is an engine, whose formats are fixed; leave out --weights")


def open_base(args: argparse.Namespace) -> PackedBase:
    """The frozen model: a folder's weights rounded now, or an engine's."""
    if not args.model.is_file():
        return read_base(args.model, Formats(args.weights or DEFAULT_WEIGHTS, args.head_weights))
    engine = read_engine(args.model)
    try:
        return engine_base(engine)
    finally:
        engine.close()


def train(
    run: Run, model: LowRankProgram, lessons: Sequence[Lesson], args: argparse.Namespace
) -> Iterator[float]:
    """Train to the last step; yields after each how much of the run is done."""
    from builders.completions import completions, cross_entropy

    source = batches(lessons, args.batch_tokens, args.seed)
    for _ in range(run.step):  # a run taken up again sees what it would have seen
        next(source)
    while run.step < args.steps:
        asked = completions(next(source))
        take_step(run, args.rate, run.step / args.steps, lambda a=asked: cross_entropy(model, a))
        yield run.step / args.steps


def run(args: argparse.Namespace) -> Answer:
    check(args)
    need_torch()
    from builders.low_rank import is_ours

    with TrainedFolder(args.output, Kind("builders.qlora", (WEIGHTS, CONFIG), is_ours), args.model) as out:
        return _run(args, out)


def _run(args: argparse.Namespace, out: TrainedFolder) -> Answer:
    set_up = SetUp(3 if args.heldout else 2)
    set_up(f"read {args.model.name}" + ("" if args.model.is_file() else " and round its weights"))
    base = open_base(args)
    import torch

    from builders.completions import measure
    from builders.low_rank import LowRankProgram, write_peft

    if args.threads:
        torch.set_num_threads(args.threads)
    targets = [name.strip() for name in args.targets.split(",") if name.strip()]
    model = LowRankProgram(base, targets, args.rank, args.alpha, args.seed)
    set_up(f"read {args.data.name}")
    with ModelText(base.words, base.words.vocabulary) as text:
        lessons, heldout = read_data(args, text, model.context)
    found: dict[str, Measured] = {}
    if heldout:
        set_up(f"measure on {args.heldout.name}")
        found["before"] = measure(model, heldout, args.batch_tokens)
    optimizer = torch.optim.AdamW(
        list(model.tensors.values()), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.0
    )
    training = Run(model.tensors, optimizer, _identity(args, base, lessons))
    halves = 2 * sum(tensor.numel() for tensor in model.tensors.values())
    out.prepare(halves, state_nbytes(training))
    set_up("train")
    carry_out(training, train(training, model, lessons, args), out.state, fresh=args.fresh)
    with out.replacing() as folder:
        write_peft(folder, model, base.name)
    if heldout:
        found["after"] = measure(model, heldout, args.batch_tokens)
    return _answer(args, training, base, found, set_up.seconds)


def _identity(args: argparse.Namespace, base: PackedBase, lessons: Sequence[Lesson]) -> dict[str, Any]:
    """What makes a run: everything that its numbers depend on."""
    names = ("rank", "alpha", "targets", "steps", "rate", "length", "batch_tokens", "seed")
    given = {name: getattr(args, name) for name in names}
    return {
        "kind": "qlora",
        "model": base.digests,
        "formats": base.formats,
        "data": digest(lessons),
        **given,
    }


def _answer(
    args: argparse.Namespace, training: Run, base: PackedBase, found: dict[str, Measured], total: float
) -> Answer:
    trained = sum(tensor.numel() for tensor in training.tensors.values())
    data = run_data(args, training, found, total) | {
        "trained": trained,
        "base_bytes": base.nbytes,
        "base_parameters": base.parameters,
    }
    rows = [
        ("adapter", f"{args.output}, {trained:,} trained values"),
        ("base", f"{size(base.nbytes)} in memory, {size(2 * base.parameters)} as f16"),
        *run_rows(training, found, total),
    ]
    return Answer(data, table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
