"""How much a model's answers depend on each row of each of its matrices.

The KL of a model with changed weights to the unchanged one is half the squares of the changes, weighted with
the Fisher information of its answers, and its diagonal is the mean of squared gradients of the log of their
probability, for answers drawn from the model itself. Here is its mean over each row: of a linear, the mean
square gradient by that output times that of its inputs; of the head, whose gradients are known, p (1 - p); of
an embedding, of those tokens alone that a row is looked up for.

Rows of most formats do not know of one another, and no row's choice of codes depends on how much it matters.
Those of a trellis format share paths: what rows of little weight lose, their neighbours gain (trellis.py).

The model runs forward segment by segment and then backward; rows between segments lie on disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor

from builders.calibration_folder import IMPORTANCE, passing_rows
from builders.divergence import load_head
from builders.kept_rows import RowsReader, RowsWriter
from builders.segment_runner import SegmentRunner, batches, kept_after
from builders.segments import Segment, cut
from builders.serial_weights import SerialWeights
from builders.torch_device import Workers, repeatable
from builders.torch_program import TorchProgram
from builders.vocabulary_blocks import cut_rows, inside, join_rows
from builders.weights import Model, Weights, row_blocks
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadConfig, ValueOutOfRange

KEPT = "row-importance.safetensors"  # in the calibration's folder
TOKENS = 8192  # at most: with 32768 KL is the same
# Tokens more, in which all rows of a matrix matter alike, for a short text knows little of each row: KL of
# stories260K in tcq4_g64 is 23% more by 256 tokens alone than with no weights of rows; so it is 20% less
PRIOR = 64


def row_importance(
    weights: Model, windows: Array, folder: Path, device: str, seed: int = 1, cores: int = 0
) -> dict[str, Array]:
    """Matrix, embedding and head, their blocks joined -> f32 (rows,), the mean over tokens of the first
    windows of token ids (windows, length). folder: where rows may lie meanwhile. seed: of the answers. The
    same on any cores. Raises ValueOutOfRange for a gradient that is not finite."""
    few = windows[: max(1, TOKENS // windows.shape[1])]
    with passing_rows(folder, IMPORTANCE) as rows, repeatable(device, cores) as workers:
        run = _Run(SerialWeights(weights), few, rows, device, seed, workers)
        for i in range(len(run.segments)):
            run.forward(i)
        gradient = run.answers()
        for i in reversed(range(len(run.segments))):
            gradient = run.backward(i, gradient)
    found = {}
    sums = {name: total.cpu().numpy() for name, total in run.sums.items()}
    for name, total in join_rows(sums, weights.program).items():
        alike = PRIOR * total.mean() / few.size
        found[name] = (total + alike) / (few.size + PRIOR)
    damaged = [name for name, each in found.items() if not np.isfinite(each).all()]
    if damaged:
        raise ValueOutOfRange(
            f"the gradient of the answers by {damaged[0]!r} is NaN or Inf on the calibration text; the "
            "checkpoint is damaged or cannot be run in f32"
        )
    return {name: each.astype(np.float32) for name, each in found.items()}


def kept_row_importance(
    weights: Model, windows: Array, folder: Path, device: str, seed: int
) -> Mapping[str, Array]:
    """The same by tensor, once for a calibration's folder: what is there is of the same model and text."""
    path = folder / KEPT
    if not path.is_file():
        part = path.with_suffix(".part")
        save_file(row_importance(weights, windows, folder, device, seed), part)
        os.replace(part, path)
    try:
        return cut_rows(load_file(path), weights.program)
    except SafetensorError as error:
        raise BadConfig(f"{path} is damaged ({error}); remove it") from None


@dataclass(slots=True)
class _Run:
    """`sums`: over tokens, of what they add to the importance of each row, f64 (rows,)."""

    weights: Weights
    windows: Array
    folder: Path
    device: str
    seed: int
    workers: Workers
    segments: list[Segment] = field(init=False)
    sums: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.segments = cut(self.weights.program)

    def forward(self, i: int) -> None:
        """Write what segment i leaves."""
        runner = SegmentRunner(self.weights, self.segments, i, self.device)
        with ExitStack() as stack:
            before = self._left(stack, i - 1)
            file = stack.enter_context(self._path(i).open("wb"))
            writer = RowsWriter(file, (*self.windows.shape, runner.width), 0)

            def run(span: tuple[int, int]) -> Tensor:
                return runner.run(self.windows[slice(*span)], before and before.read(*span))

            for out in self.workers.map(run, self._spans()):
                writer.add(out.cpu().numpy())

    def answers(self) -> Array:
        """The gradient by what the last segment leaves (windows, length, hidden), for answers drawn."""
        program = self.weights.program
        held = load_head(self.weights, self.device)
        model = TorchProgram(program, held.__getitem__, checked=True)
        with ExitStack() as stack:
            last = self._left(stack, len(self.segments) - 1)
            assert last is not None
            hidden = last.read(0, len(self.windows))
        flat = hidden.reshape(-1, hidden.shape[-1])
        chance = np.random.default_rng((self.seed, 5)).random(len(flat))

        def work(span: tuple[int, int]) -> tuple[Tensor, Tensor]:
            x = torch.from_numpy(flat[slice(*span)]).to(self.device, copy=True).requires_grad_()
            drawn = torch.from_numpy(chance[slice(*span), None]).to(self.device)
            with torch.enable_grad():  # each thread has its own switch
                z = model.logits(x).log_softmax(-1)
            p = z.detach().double().exp()
            answer = (p.cumsum(-1) < drawn).sum(-1, keepdim=True).clamp_(max=p.shape[-1] - 1)
            (gradient,) = torch.autograd.grad(z.gather(-1, answer).sum(), x)
            size = x.detach().double().square().mean(-1, keepdim=True) * program.heads[0].scale ** 2
            return gradient, (p * (1 - p) * size).sum(0)

        parts = []
        for gradient, share in self.workers.map(work, row_blocks(len(flat), program.vocab_size)):
            parts.append(gradient.cpu().numpy())
            for head in program.heads:
                self._add(head.weight, share[head.first : head.first + program.tensors[head.weight].rows])
        return np.concatenate(parts).reshape(hidden.shape)

    def backward(self, i: int, gradient: Array) -> Array:
        """From the gradient by what segment i leaves to that by what it took over."""
        runner = SegmentRunner(self.weights, self.segments, i, self.device)
        parts = []
        with ExitStack() as stack:
            before = self._left(stack, i - 1)

            def run(span: tuple[int, int]) -> tuple[list[tuple[str, Tensor]], Tensor | None]:
                tokens, rows = self.windows[slice(*span)], before and before.read(*span)
                slope = torch.from_numpy(gradient[slice(*span)]).to(self.device, copy=True)
                products, looked_up, left = runner.slopes(tokens, rows, slope)
                shares = [(name, _outputs(y) * x.double().square().mean()) for name, x, y in products]
                firsts = runner.tables
                shares += [(name, self._of_tokens(name, firsts[name], tokens, e)) for name, e in looked_up]
                return shares, left

            for shares, left in self.workers.map(run, self._spans()):
                for name, share in shares:
                    self._add(name, share)
                if left is not None:
                    parts.append(left.cpu().numpy())
        self._path(i).unlink()
        return np.concatenate(parts) if parts else gradient[..., :0]

    def _of_tokens(self, name: str, first: int, tokens: Array, slope: Tensor) -> Tensor:
        """Squares of an embedding's rows from the id `first` on, each where its token stands."""
        squares = slope.flatten(0, 1).double().square().mean(-1).cpu().numpy()
        rows, ids = self.weights.program.tensors[name].rows, tokens.reshape(-1)
        here = inside(ids, first, rows)
        return torch.from_numpy(np.bincount(ids[here] - first, squares[here], rows)).to(self.device)

    def _add(self, name: str, share: Tensor) -> None:
        self.sums[name] = share if name not in self.sums else self.sums[name] + share

    def _left(self, stack: ExitStack, i: int) -> RowsReader | None:
        """What segment i left."""
        if i < 0:
            return None
        program = self.weights.program
        width = sum(program.buffers[n] for n in kept_after(program, self.segments, i))
        reader = RowsReader(self._path(i), (*self.windows.shape, width))
        stack.callback(reader.close)
        return reader

    def _spans(self) -> Iterator[tuple[int, int]]:
        count, length = self.windows.shape
        return iter(batches(self.weights.program, count, length, self.device))

    def _path(self, i: int) -> Path:
        return self.folder / f"{i}.rows"


def _outputs(slope: Tensor) -> Tensor:
    """Sums of squares over all tokens, f64 (outputs,)."""
    return slope.flatten(0, -2).double().square().sum(0)
