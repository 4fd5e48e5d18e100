"""Which format each role of a program's tensors is trained in."""

from __future__ import annotations

from dataclasses import dataclass

from builders.planner import HEAD_FORMAT, precision
from edge_runtime.engine.formats import get_format


@dataclass(frozen=True, slots=True)
class Formats:
    """weights: of matrices. head: of embedding and head, None for what edge-build plans beside `weights`."""

    weights: str
    head: str | None = None

    def of_role(self, role: str) -> str:
        """Raises BadConfig naming the nearest format for an unknown one."""
        if role == "vector":
            return "f32"
        if role == "matrix":
            return get_format(self.weights).name
        if self.head is not None:
            return get_format(self.head).name
        return self.weights if precision(self.weights) in ("f32", "f16", "bf16", "int8") else HEAD_FORMAT
