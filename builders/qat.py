"""Train a model under fake quantization: python -m builders.qat MODEL --data FILE --weights int3_g64 -o OUT

Quantization-aware training: f32 weights learn while the model sees them rounded to the format (fake_quant).
Loss: cross-entropy of the completions, or with --distill the divergence from the model as it was (LLM-QAT,
Liu et al. 2023). OUT is a model folder; `edge-build --weights FORMAT OUT` writes the trained codes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from builders.lessons import Lesson, batches, digest
from builders.role_formats import Formats
from builders.sources import read_vocabulary
from builders.texts import ModelText
from builders.trained_folder import TRAINED, TrainedFolder, trained_nbytes, write_trained
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
from edge_runtime.cli.output import Answer, Parser, run_command, table

if TYPE_CHECKING:
    import torch

    from builders.completions import Completions, Measured
    from builders.qat_model import QatModel

EXAMPLES = (
    "python -m builders.qat path/to/model --data chats.jsonl --weights int3_g64 --steps 300 -o trained",
    "python -m builders.qat path/to/model --data chats.jsonl --weights int2_g64 --distill -o trained",
    "edge-build --profile orin-nano-8gb --weights int3_g64 trained",
)


def make_parser() -> Parser:
    parser = Parser("python -m builders.qat", "Train a model's weights under fake quantization.", EXAMPLES)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="model folder; it is only read")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the trained model goes")
    add_data_options(parser)
    add("--weights", required=True, metavar="FORMAT", help="of the matrices, as of edge-build")
    add("--head-weights", metavar="FORMAT", help=HEAD_WEIGHTS)
    add("--fit", default="mse", metavar="HOW", help="how grids are fitted to the weights: minmax, mse [mse]")
    add("--refit", type=int, default=20, metavar="N", help="fit the grids anew every N steps, 0: never [20]")
    add("--learn-scales", action="store_true", help="let scales of symmetric whole numbers learn (LSQ)")
    add("--distill", action="store_true", help="learn the unquantized model's answers instead of the data's")
    add_run_options(parser, rate=3e-4, seed="order of the data")
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises BadConfig for what cannot be meant."""
    check_run(args, {"--refit": (args.refit, 0, 1e9)})


def train(run: Run, model: QatModel, lessons: Sequence[Lesson], args: argparse.Namespace) -> Iterator[float]:
    """Train to the last step; yields after each how much of the run is done."""
    from builders.completions import completions, cross_entropy, distillation
    from builders.qat_model import teacher_of

    teacher = teacher_of(model.weights) if args.distill else None

    def loss(asked: Completions) -> torch.Tensor:
        if teacher is None:
            return cross_entropy(model.program, asked)
        return distillation(model.program, teacher, asked)

    source = batches(lessons, args.batch_tokens, args.seed)
    for _ in range(run.step):  # a run taken up again sees what it would have seen
        next(source)
    while run.step < args.steps:
        asked = completions(next(source))
        began = monotonic()
        if args.refit and run.step and run.step % args.refit == 0:  # before the first step they are fitted
            model.fit()
        model.requantize()
        run.seconds += monotonic() - began
        take_step(run, args.rate, run.step / args.steps, lambda a=asked: loss(a))
        yield run.step / args.steps


def run(args: argparse.Namespace) -> Answer:
    check(args)
    need_torch()
    set_up = SetUp(4 if args.heldout else 2)
    set_up(f"read {args.model.name} and fit {args.weights} to its weights")
    import torch

    from builders.completions import measure
    from builders.qat_model import QatModel, open_model, teacher_of

    if args.threads:
        torch.set_num_threads(args.threads)
    with TrainedFolder(args.output, TRAINED, args.model) as out, open_model(args.model) as source:
        formats = Formats(args.weights, args.head_weights)
        model = QatModel(source, formats, args.fit, learn_scales=args.learn_scales)
        set_up(f"read {args.data.name}")
        with ModelText(source, read_vocabulary(source, model.program.program.vocab_size)) as text:
            lessons, heldout = read_data(args, text, model.context)
        found: dict[str, Measured] = {}
        if heldout:
            set_up(f"measure f32 on {args.heldout.name}")
            found["f32"] = measure(teacher_of(model.weights), heldout, args.batch_tokens)
            set_up(f"measure {args.weights} on {args.heldout.name}")
            model.requantize()
            found["before"] = measure(model.program, heldout, args.batch_tokens)
        training = Run(model.tensors, model.optimizer(args.rate), _identity(args, source.sha256(), lessons))
        training.kept = model.grids()
        stored = {key: quantizer.format.name for key, quantizer in model.quantizers.items()}
        values = {key: tensor.numel() for key, tensor in model.tensors.items() if key in source.shapes()}
        out.prepare(trained_nbytes(source, stored, values), state_nbytes(training))

        def keep_grids() -> None:
            training.kept = model.grids()

        set_up("train")
        carry_out(
            training,
            train(training, model, lessons, args),
            out.state,
            fresh=args.fresh,
            restored=lambda: model.use_grids(training.kept),
            saving=keep_grids,
        )
        with out.replacing() as folder:
            write_trained(folder, source, model.encode(), model.plain())
        if heldout:
            model.requantize()
            found["after"] = measure(model.program, heldout, args.batch_tokens)
    return _answer(args, training, found, set_up.seconds)


def _identity(args: argparse.Namespace, digests: dict[str, str], lessons: Sequence[Lesson]) -> dict[str, Any]:
    """What makes a run: everything that its numbers depend on."""
    names = ("weights", "head_weights", "fit", "refit", "learn_scales", "distill", "steps", "rate", "length")
    given = {name: getattr(args, name) for name in (*names, "batch_tokens", "seed")}
    return {"kind": "qat", "model": digests, "data": digest(lessons), **given}


def _answer(args: argparse.Namespace, training: Run, found: dict[str, Measured], total: float) -> Answer:
    rows = [("model", str(args.output)), *run_rows(training, found, total)]
    return Answer(run_data(args, training, found, total), table(rows))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
