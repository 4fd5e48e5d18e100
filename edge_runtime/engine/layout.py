"""Where each activation buffer lies in the arena: decided once, so that serving allocates nothing.

Every non-in-place write makes a buffer's old value dead, so a buffer is live in segments; two buffers whose
segments never overlap share bytes. Placement is greedy, largest first, at the lowest free offset.
"""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.engine.ops import reads, writes
from edge_runtime.engine.plan import StepShape
from edge_runtime.engine.program import Program

ALIGN = 64


def round_up(nbytes: int) -> int:
    """Bytes up to the next multiple of ALIGN."""
    return -(-nbytes // ALIGN) * ALIGN


@dataclass(frozen=True, slots=True)
class Layout:
    """Byte offset of every used buffer (step.tokens, width) f32, and the arena's size."""

    offsets: dict[str, int]
    nbytes: int


def live_segments(program: Program) -> dict[str, list[tuple[int, int]]]:
    """Op index ranges [write, last read] of each buffer, both ends included."""
    segments: dict[str, list[tuple[int, int]]] = {}
    for i, op in enumerate(program.ops):
        used = reads(op)
        for name in used:
            start, _ = segments[name][-1]
            segments[name][-1] = (start, i)
        for name in writes(op):
            if name not in used:  # an in-place op keeps the segment going
                segments.setdefault(name, []).append((i, i))
    return segments


def lay_out(program: Program, step: StepShape) -> Layout:
    """Place every buffer; the program must have passed `check`."""
    segments = live_segments(program)
    size = {n: round_up(program.buffers[n] * 4 * step.tokens) for n in segments}
    placed: list[str] = []
    offsets: dict[str, int] = {}
    for name in sorted(segments, key=lambda n: (-size[n], n)):
        busy = sorted(
            (offsets[other], offsets[other] + size[other])
            for other in placed
            if _overlap(segments[name], segments[other])
        )
        at = 0
        for start, end in busy:
            if at + size[name] <= start:
                break
            at = max(at, end)
        offsets[name] = at
        placed.append(name)
    return Layout(offsets, max((offsets[n] + size[n] for n in placed), default=0))


def _overlap(a: list[tuple[int, int]], b: list[tuple[int, int]]) -> bool:
    return any(s1 <= e2 and s2 <= e1 for s1, e1 in a for s2, e2 in b)
