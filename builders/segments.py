"""A Program cut into pieces that can be run one after another with little kept between them.

A cut lies where only buffers in `kept` are still to be read: in a decoder that is the residual stream alone,
between attention and feed-forward and between layers. What a piece needs is then its own weights, the kept
rows of every token, and the keys and values of its own layer.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.engine.layout import live_segments
from edge_runtime.engine.ops import AnyOp, Attention, Embed, KvAppend, Linear, weights, writes
from edge_runtime.engine.program import Program


@dataclass(frozen=True, slots=True)
class Segment:
    """Ops [start, stop) of a program; `reads` are the buffers that it takes over from the one before."""

    start: int
    stop: int
    reads: tuple[str, ...]

    def ops(self, program: Program) -> tuple[AnyOp, ...]:
        return program.ops[self.start : self.stop]


def cut(program: Program) -> list[Segment]:
    """Segments of all ops but the logits; each ends where as few buffers as possible live on.

    The first is the embedding alone. A cache slot is written and read inside one segment wherever the program
    allows it.
    """
    last = len(program.body)
    spans = live_segments(program)
    alive = [
        tuple(sorted(n for n, ranges in spans.items() if any(a <= i < b for a, b in ranges)))
        for i in range(last)
    ]
    fewest = min(map(len, alive))
    bounds = [
        i + 1
        for i in range(last)
        if len(alive[i]) == fewest and not _cache_open(program, i) and not _looked_up(program, i)
    ]
    if not bounds or bounds[-1] != last:
        bounds.append(last)
    segments, start = [], 0
    for stop in bounds:
        if not any(weights(op) for op in program.ops[start:stop]) and stop != last:
            continue  # nothing to calibrate or load in it: let it join the next
        reads = () if start == 0 else alive[start - 1]
        segments.append(Segment(start, stop, reads))
        start = stop
    return segments


def linear_groups(program: Program, segment: Segment) -> list[tuple[str, ...]]:
    """Weights of the segment's linears, those that read the same values of one buffer together, in order."""
    groups: list[list[str]] = []
    source: tuple[str, int] | None = None
    version: dict[str, int] = {}
    for op in segment.ops(program):
        if isinstance(op, Linear):
            at = (op.x, version.get(op.x, 0))
            if at != source:
                groups.append([])
                source = at
            groups[-1].append(op.weight)
        for name in writes(op):
            version[name] = version.get(name, 0) + 1
    return [tuple(group) for group in groups]


def _looked_up(program: Program, i: int) -> bool:
    """Whether the next op looks up more of the same tokens."""
    op = program.ops[i + 1]
    return isinstance(op, Embed) and op.first > 0


def _cache_open(program: Program, i: int) -> bool:
    """Whether a cache slot written by now is read later."""
    written = {op.layer for op in program.ops[: i + 1] if isinstance(op, KvAppend)}
    return any(isinstance(op, Attention) and op.layer in written for op in program.ops[i + 1 :])
