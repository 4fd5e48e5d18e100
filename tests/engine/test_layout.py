"""Buffers never overlap while both are alive, and the arena is no larger than it must be."""

from __future__ import annotations

import itertools

from edge_runtime.engine.layout import lay_out, live_segments
from edge_runtime.engine.ops import Activation, Add, Embed, Linear, Logits
from edge_runtime.engine.plan import StepShape
from edge_runtime.engine.program import Program, TensorSpec

STEP = StepShape(context=32, sequences=2, tokens=5, logits=2)


def feed_forward(layers: int) -> Program:
    ops: list[object] = [Embed(out="hidden", weight="embedding")]
    for _ in range(layers):
        ops += [
            Linear(x="hidden", out="up", weight="up"),
            Activation(x="up", out="up", kind="relu"),
            Linear(x="up", out="down", weight="down"),
            Add(a="hidden", b="down", out="hidden"),
        ]
    ops.append(Logits(x="hidden", weight="embedding"))
    program = Program(
        ops=tuple(ops),  # type: ignore[arg-type]
        tensors={
            "embedding": TensorSpec(50, 24, "embedding"),
            "up": TensorSpec(40, 24, "matrix"),
            "down": TensorSpec(24, 40, "matrix"),
        },
        buffers={"hidden": 24, "up": 40, "down": 24},
        cache=(),
        vocab_size=50,
        max_context=32,
    )
    program.check()
    return program


def test_an_in_place_op_keeps_a_segment_going() -> None:
    segments = live_segments(feed_forward(2))
    assert segments["up"] == [(1, 3), (5, 7)]
    assert segments["down"] == [(3, 4), (7, 8)]
    assert segments["hidden"] == [(0, 9)]


def test_buffers_alive_together_do_not_share_bytes() -> None:
    program = feed_forward(3)
    layout = lay_out(program, STEP)
    segments = live_segments(program)
    spans = {n: (o, o + program.buffers[n] * 4 * STEP.tokens) for n, o in layout.offsets.items()}
    for a, b in itertools.combinations(spans, 2):
        together = any(s1 <= e2 and s2 <= e1 for s1, e1 in segments[a] for s2, e2 in segments[b])
        if together:
            assert spans[a][1] <= spans[b][0] or spans[b][1] <= spans[a][0], (a, b)
    assert all(o % 64 == 0 for o in layout.offsets.values())
    assert layout.nbytes >= max(end for _, end in spans.values())


def test_buffers_never_alive_together_share_bytes() -> None:
    """`first` is dead once `second` is written from `middle`: the three wide buffers need two places."""
    ops = (
        Embed(out="hidden", weight="embedding"),
        Linear(x="hidden", out="first", weight="wide"),
        Linear(x="first", out="middle", weight="square"),
        Linear(x="middle", out="second", weight="square"),
        Linear(x="second", out="hidden", weight="narrow"),
        Logits(x="hidden", weight="embedding"),
    )
    program = Program(
        ops=ops,
        tensors={
            "embedding": TensorSpec(9, 16, "embedding"),
            "wide": TensorSpec(160, 16, "matrix"),
            "square": TensorSpec(160, 160, "matrix"),
            "narrow": TensorSpec(16, 160, "matrix"),
        },
        buffers={"hidden": 16, "first": 160, "middle": 160, "second": 160},
        cache=(),
        vocab_size=9,
        max_context=8,
    )
    program.check()
    wide = 160 * 4 * STEP.tokens
    assert lay_out(program, STEP).nbytes <= 2 * wide + 16 * 4 * STEP.tokens + 3 * 64
