"""Activations in 8 bits: `Round` ops in front of a program's linears, with dynamic or calibrated scales.

Dynamic: a scale per token, its absmax (LLM.int8(), SmoothQuant's O1). Static: one scale for all tokens, found
in calibration (SmoothQuant's O3; Micikevicius et al. 2022 for fp8), which saves the search for the absmax and
clips what is larger than anything seen. Channels are scaled and weights rotated first, if at all: what comes
behind a rounding can no longer be merged through it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import msgspec
import numpy as np

from builders.observers import get_observer
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.ops import AnyOp, Linear, Round, reads, writes
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig

Kind = Literal["fp8_e4m3", "int8"]
_LARGEST = {"fp8_e4m3": 448.0, "int8": 127.0}


def round_activations(
    program: Program,
    kind: Kind,
    statistics: Callable[[str], InputStatistics | None] | None = None,
    observer: str = "minmax",
) -> Program:
    """The program with what its linears read rounded to `kind`; the head reads what it did.

    statistics: of a linear's inputs, by its weight: scales are then static, from the observer; None: a scale
    per token. Values that linears alone read are rounded in place, others into a buffer of their own. Raises
    BadConfig where a linear has no statistics.
    """
    ops: list[AnyOp] = []
    buffers = dict(program.buffers)
    rounded: dict[str, str] = {}  # buffer -> where its present value lies rounded
    for i, op in enumerate(program.ops):
        if isinstance(op, Linear):
            if op.x not in rounded:
                target = op.x
                if not _only_linears_read(program, i, op.x):
                    target = f"{op.x}.rounded"
                    buffers[target] = program.buffers[op.x]
                scale = (
                    None if statistics is None else static_scale(statistics(op.weight), kind, observer, op)
                )
                ops.append(Round(x=op.x, out=target, format=kind, scale=scale))
                rounded[op.x] = target
            op = msgspec.structs.replace(op, x=rounded[op.x])
        ops.append(op)
        for name in writes(program.ops[i]):
            rounded.pop(name, None)
    found = msgspec.structs.replace(program, ops=tuple(ops), buffers=buffers)
    found.check()
    return found


def static_scale(inputs: InputStatistics | None, kind: Kind, observer: str, op: Linear) -> float:
    """The step that covers the observer's range of the inputs: of all that was seen for minmax, of the
    sampled rows for others. Raises BadConfig without statistics."""
    if inputs is None:
        raise BadConfig(
            f"linear {op.weight!r} has no statistics of its inputs, which static activation scales need; "
            "calibrate the model, or take dynamic scales"
        )
    if observer == "minmax":
        largest = float(inputs.absmax.max())
    else:
        fmt = get_format("fp8_e4m3_row" if kind == "fp8_e4m3" else "int8_row")
        low, high = get_observer(observer)(inputs.rows.astype(np.float32).reshape(1, -1), fmt, None)
        largest = float(max(-low[0, 0], high[0, 0]))
    return max(largest / _LARGEST[kind], 2.0**-126)  # never denormal, as the formats' scales


def _only_linears_read(program: Program, first: int, buffer: str) -> bool:
    """Whether only linears read a buffer from op `first` on, until it is written anew."""
    for op in program.ops[first:]:
        if buffer in reads(op) and not isinstance(op, Linear):
            return False
        if buffer in writes(op):
            return True
    return True
