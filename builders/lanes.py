"""The KL divergence that each changed tensor causes, measured exactly: many variants of a model in one pass.

A lane is the model with one tensor replaced. It equals the model up to that tensor's segment, so it begins
there, on the model's own rows, and all lanes go through the segments side by side: each segment's weights are
loaded once for all of them. At most `room` lanes are under way at a time; then the next pass begins.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from builders.divergence import Answers, load_head
from builders.segment_runner import SegmentRunner, batches, kept_after
from builders.segments import cut
from builders.torch_device import Workers
from builders.vocabulary_blocks import inside
from builders.weights import Weights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import weights as names_of

_BLOCK = 1 << 21  # logits that are compared at once, in f64
_CACHE = 1 << 25  # logits of the model that are kept for all lanes, in f64: 256 MiB


@dataclass(frozen=True, slots=True)
class Lane:
    """The model with `tensor` replaced. `make(None)` gives its f32 values (rows, cols), and `make(ids)` those
    of some rows: of an embedding, or a block of one, only the rows of the tokens at hand are asked for."""

    tensor: str
    label: str
    make: Callable[[Array | None], Array]


class LaneRunner:
    """Runs lanes over fixed windows of token ids (windows, length)."""

    def __init__(self, weights: Weights, windows: Array, device: str, workers: Workers, room: int) -> None:
        self._weights, self._program = weights, weights.program
        self._windows, self._device, self._workers, self._room = windows, device, workers, max(1, room)
        self._segments = cut(weights.program)
        self._spans = batches(weights.program, len(windows), windows.shape[1], device)

    def measure(self, lanes: Sequence[Lane]) -> Iterator[tuple[Lane, float]]:
        """Each lane with its KL(model || lane), the mean over all tokens in nats; in the order of their
        tensors in the program. A lane's figure does not depend on the others."""
        waiting = sorted(lanes, key=lambda lane: self._birth(lane.tensor))
        at, base = 0, None
        while waiting:
            now, waiting = waiting[: self._room], waiting[self._room :]
            resume = self._birth(waiting[0].tensor) if waiting else -1
            ends, last, kept = self._through(now, at, base, resume)
            yield from zip(now, self._compare(now, ends, last), strict=True)
            at, base = resume, kept

    def _birth(self, tensor: str) -> int:
        """The first segment that reads a tensor; their number for one that only the logits read."""
        for i, segment in enumerate(self._segments):
            if any(tensor in names_of(op) for op in segment.ops(self._program)):
                return i
        return len(self._segments)

    def _through(
        self, lanes: Sequence[Lane], at: int, base: Array | None, resume: int
    ) -> tuple[list[Array], Array, Array | None]:
        """From segment `at`, where the model has rows `base`, to the inputs of the logits.

        Gives those of the lanes, the model's, (windows, length, hidden) each, and the model's rows before
        segment `resume`.
        """
        birth = [self._birth(lane.tensor) for lane in lanes]
        rows: dict[int, Array | None] = {}
        kept = None
        for i in range(at, len(self._segments)):
            if i == resume:
                kept = base
            runner = SegmentRunner(self._weights, self._segments, i, self._device)
            used = {name for op in self._segments[i].ops(self._program) for name in names_of(op)}
            rows |= {n: base for n, first in enumerate(birth) if first == i}
            changed = {n: lanes[n] for n in rows if lanes[n].tensor in used}

            def run(
                n: int,
                runner: SegmentRunner = runner,
                base: Array | None = base,
                rows: dict[int, Array | None] = rows,
                changed: dict[int, Lane] = changed,
            ) -> Array:
                before = base if n < 0 else rows[n]
                return self._segment(runner, before, changed.get(n))

            numbers = [-1, *rows]
            found = dict(zip(numbers, self._workers.map(run, numbers), strict=True))
            base = found.pop(-1)
            rows = dict(found)
        assert base is not None  # a program has a segment before its logits
        if resume == len(self._segments):
            kept = base
        ends = [rows.get(n) for n in range(len(lanes))]
        return [base if end is None else end for end in ends], base, kept

    def _segment(self, runner: SegmentRunner, rows: Array | None, lane: Lane | None) -> Array:
        """Rows after a segment, of a lane that changes one of its tensors or of one that does not."""
        replaced: dict[str, Tensor] = {}
        tables: dict[str, Callable[[Array], Array]] = {}
        if lane is not None and lane.tensor in runner.tables:
            first = runner.tables[lane.tensor]
            ids = np.unique(self._windows)
            ids = ids[inside(ids, first, self._program.tensors[lane.tensor].rows)] - first
            values = lane.make(ids)
            tables[lane.tensor] = lambda some: np.asarray(values[np.searchsorted(ids, some)])
        elif lane is not None:
            replaced[lane.tensor] = torch.from_numpy(lane.make(None)).to(self._device, copy=True)
        found = np.empty((*self._windows.shape, runner.width), np.float32)
        for a, b in self._spans:
            before = None if rows is None else rows[a:b]
            found[a:b] = (
                runner.run(self._windows[a:b], before, replaced=replaced, tables=tables).cpu().numpy()
            )
        return found

    def _compare(self, lanes: Sequence[Lane], ends: Sequence[Array], base: Array) -> Iterator[float]:
        held = load_head(self._weights, self._device)
        rows = torch.from_numpy(base.reshape(-1, base.shape[-1])).to(self._device)
        few = len(rows) * self._program.vocab_size <= _CACHE
        model = Answers(self._program, held, rows, _BLOCK, kept=few)

        def measure(n: int) -> float:
            head = held
            if lanes[n].tensor in held:
                values = torch.from_numpy(lanes[n].make(None)).to(self._device, copy=True)
                head = {**held, lanes[n].tensor: values}
            return model.kl(head, torch.from_numpy(ends[n].reshape(rows.shape)).to(self._device, copy=True))

        yield from self._workers.map(measure, range(len(lanes)))


def lane_bytes(weights: Weights, tokens: int) -> int:
    """Memory of one lane under way, in bytes."""
    program = weights.program
    segments = cut(program)
    widest = max(
        sum(program.buffers[b] for b in kept_after(program, segments, i)) for i in range(len(segments))
    )
    return 2 * 4 * widest * tokens  # its rows before and after a segment
