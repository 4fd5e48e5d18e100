"""What an architecture file gives: a Program, and how to make each of its tensors from the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Origin
from edge_runtime.engine.program import Program


@dataclass(frozen=True, slots=True, eq=False)
class TensorSource:
    """One tensor of a Program: checkpoint tensor `key`, or `constant` computed at build time (key is "").

    rows: a slice [start, stop) of the checkpoint tensor's rows (fused projections). offset: added to every
    value (Gemma stores norm weights as w - 1). columns: the checkpoint's column of each column, where
    they are in another order (act-order of GPTQ).
    """

    key: str
    rows: tuple[int, int] | None = None
    offset: float = 0.0
    constant: Array | None = None
    columns: Array | None = None


@dataclass(frozen=True, slots=True)
class Architecture:
    """A model ready to be built; `sources` has exactly the tensors that `program.tensors` declares."""

    program: Program
    sources: dict[str, TensorSource]

    def origins(self) -> dict[str, Origin]:
        """Checkpoint module and first row of every matrix and head, for adapters."""
        found = {}
        for name, spec in self.program.tensors.items():
            made = self.sources[name]
            if spec.role in ("matrix", "head") and made.constant is None:
                row = made.rows[0] if made.rows else 0
                found[name] = Origin(key=made.key.removesuffix(".weight"), row=row)
        return found
