"""Tables of cosines and sines that a step fills once, for all rotations that use them."""

from __future__ import annotations

from edge_runtime.engine.ops import Rope
from edge_runtime.engine.program import Program


def angle_tables(program: Program) -> dict[tuple[str, float], int]:
    """(inv_freq, scale) -> frequencies, of every table of cosines and sines that a step fills once."""
    ropes = (op for op in program.ops if isinstance(op, Rope))
    return {(op.inv_freq, op.scale): program.tensors[op.inv_freq].cols for op in ropes}
