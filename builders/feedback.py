"""Quantization in the order of the program, each tensor knowing what those before it have done.

Two models run side by side over the calibration text, segment by segment: the f32 one and the one that is
quantized so far. A linear's statistics are of the inputs that it will really get, and their drift from the
f32 model's lets an algorithm aim its outputs at the f32 model's (GPTAQ, Li et al. 2025, "GPTAQ: Efficient
Finetuning-Free Quantization for Asymmetric Calibration"), so that errors do not pile up from layer to layer.

A segment of g groups of linears is run g + 1 times by both models. Rows between segments lie in memory while
they are few, else in a folder; weights of one segment are in memory, twice once they are quantized.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from builders.calibration import groups_of, unpacked
from builders.calibration_folder import FEEDBACK, passing_rows
from builders.kept_rows import RowsReader, RowsWriter
from builders.moments import Moments, sample_tokens
from builders.segment_runner import SegmentRunner, batches
from builders.segments import Segment, cut
from builders.serial_weights import SerialWeights
from builders.statistics import InputStatistics
from builders.torch_device import Workers, repeatable, resolve_device
from builders.watcher import Watcher
from builders.weights import Model, Weights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Embed, Linear
from edge_runtime.errors import Unsupported, ValueOutOfRange

# A tensor and what is known of its inputs (None for an embedding) -> f32 (rows, cols) as it will come back
Choose = Callable[[str, InputStatistics | None], Array]
Known = Callable[[str], InputStatistics | None]  # of a tensor's inputs in the f32 model


def nothing_known(name: str) -> InputStatistics | None:
    return None


@dataclass(frozen=True, slots=True)
class FeedbackOptions:
    """seed: which inputs are kept as samples. device: auto, cpu or cuda. memory: bytes of rows that may lie
    in memory for each model; more go to disk. cores: 0 for as many as torch would use."""

    seed: int = 1
    device: str = "auto"
    memory: int = 128 << 20
    cores: int = 0


def quantize_in_order(
    weights: Model,
    windows: Array,
    choose: Choose,
    folder: Path,
    options: FeedbackOptions = FeedbackOptions(),
    watcher: Watcher | None = None,
    known: Known = nothing_known,
) -> None:
    """Call `choose` once for every matrix, embedding and head of the program of `weights`, in order.

    windows: token ids (windows, length). folder: where rows may lie meanwhile; nothing of it remains. What
    `choose` returns is what the tensors behind it will see. known: asked of every embedding. One that is the
    head too is rounded before its inputs as a head can be known of the quantized model, so these are the f32
    model's: to nearest, it costs twice as much. Raises Unsupported for a program that begins with
    rows, ValueOutOfRange when an activation is not finite, and as `choose` does.
    """
    program = weights.program
    if program.input_width is not None:
        raise Unsupported("a program that begins with rows (Medusa heads) cannot be quantized in order")
    device, watcher = resolve_device(options.device), watcher or Watcher()
    segments = cut(program)
    watcher.phase("quantize in order", len(segments))
    folder.mkdir(parents=True, exist_ok=True)
    with passing_rows(folder, FEEDBACK) as rows, repeatable(device, options.cores) as workers:
        run = _Run(SerialWeights(weights), segments, windows, choose, known, rows, options, device, workers)
        for i in range(len(segments)):
            run.segment(i)
            watcher.step(f"segment {i + 1} of {len(segments)}")


class _Run:
    """Where the two models stand: the rows that the last segment left, by "f32" and "quantized"."""

    def __init__(
        self,
        weights: Weights,
        segments: list[Segment],
        windows: Array,
        choose: Choose,
        known: Known,
        folder: Path,
        options: FeedbackOptions,
        device: str,
        workers: Workers,
    ) -> None:
        self._weights, self._segments, self._windows = weights, segments, windows
        self._choose, self._known, self._folder, self._options = choose, known, folder, options
        self._device, self._workers = device, workers
        self._held: dict[str, Array | None] = {}
        self._tables: dict[str, Array] = {}  # embeddings as they come back
        self._done: set[str] = set()

    def segment(self, i: int) -> None:
        program = self._weights.program
        for op in self._segments[i].ops(program):
            if isinstance(op, Embed) and op.weight not in self._done:
                self._done.add(op.weight)
                self._tables[op.weight] = self._choose(op.weight, self._known(op.weight))
        runner = SegmentRunner(self._weights, self._segments, i, self._device)
        replaced: dict[str, Tensor] = {}
        last = i == len(self._segments) - 1
        for group in groups_of(program, self._segments, i):
            names = [name for name in group if name not in self._done]
            if not names:  # a head that is the embedding too
                continue
            head = last and names[0] not in runner.held
            inputs = self._statistics(i, runner, replaced, None if head else names[0])
            for name in names:
                self._done.add(name)
                values = self._choose(name, inputs)
                if not head:
                    replaced[name] = torch.from_numpy(values).to(self._device, copy=True)
        if not last:
            self._advance(i, runner, replaced)

    def _statistics(
        self, i: int, runner: SegmentRunner, replaced: dict[str, Tensor], linear: str | None
    ) -> InputStatistics:
        """Of what a linear of segment i reads in the quantized model, or (None) what the segment leaves."""
        program = self._weights.program
        width = runner.width if linear is None else program.tensors[linear].cols
        sample = sample_tokens(self._windows.size, self._options.seed)
        moments = Moments(width, sample, self._device)
        drift = torch.zeros(width, width, device=self._device)
        for (_, exact), (_, found) in self._both(i, runner, replaced, linear):
            x = found.flatten(0, 1)
            moments.add(x, self._workers)
            drift.addmm_((exact.flatten(0, 1) - x).T, x)
        drift /= moments.count
        return unpacked(moments.packed(), moments.count, drift.cpu().numpy())

    def _advance(self, i: int, runner: SegmentRunner, replaced: dict[str, Tensor]) -> None:
        """Write what segment i leaves in both models, and forget what it read."""
        shape = (*self._windows.shape, runner.width)
        with ExitStack() as stack:
            writers = [
                RowsWriter(stack.enter_context(self._path(i, kind).open("wb")), shape, self._options.memory)
                for kind in ("f32", "quantized")
            ]
            for outs in self._both(i, runner, replaced, None):
                for writer, (out, _) in zip(writers, outs, strict=True):
                    writer.add(out.cpu().numpy())
        for kind, writer in zip(("f32", "quantized"), writers, strict=True):
            self._held[kind] = writer.held
            if i > 0:
                self._path(i - 1, kind).unlink()

    def _both(
        self, i: int, runner: SegmentRunner, replaced: dict[str, Tensor], linear: str | None
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Batches of both models: ((rows, input of the linear) of f32, the same of the quantized one)."""
        program, (samples, length) = self._weights.program, self._windows.shape
        tables = {name: table.__getitem__ for name, table in self._tables.items()}
        with ExitStack() as stack:
            before: dict[str, RowsReader] = {}
            if i > 0:
                reads = sum(program.buffers[name] for name in self._segments[i].reads)
                for kind in ("f32", "quantized"):
                    reader = RowsReader(
                        self._path(i - 1, kind), (samples, length, reads), self._held.get(kind)
                    )
                    stack.callback(reader.close)
                    before[kind] = reader

            def run(span: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
                found = []
                for kind in ("f32", "quantized"):
                    seen: dict[str, Tensor] = {}

                    def hook(op: Linear, x: Tensor, seen: dict[str, Tensor] = seen) -> Tensor:
                        seen[op.weight] = x
                        return x

                    own = kind == "quantized"
                    out = runner.run(
                        self._windows[slice(*span)],
                        before[kind].read(*span) if before else None,
                        hook,
                        replaced if own else None,
                        tables if own else None,
                    )
                    found.append((out, out if linear is None else seen[linear]))
                return found

            for both in self._workers.map(run, batches(program, samples, length, self._device)):
                if not all(bool(torch.isfinite(out).all()) for out, _ in both):
                    raise ValueOutOfRange(
                        f"segment {i + 1} gives NaN or Inf on the calibration text; the checkpoint is "
                        "damaged, or the format too coarse for it"
                    )
                yield both

    def _path(self, i: int, kind: str) -> Path:
        return self._folder / f"{kind}.{i}.rows"
