"""Low-rank adapters (LoRA, Hu et al. 2021): what a request may add to a quantized base, weights untouched."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass
from itertools import count

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Linear, Logits
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadRequest, nearest

MAX_RANK = 512


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one matrix (rows, cols): y += scale * b @ (a @ x).

    a: f16 (rank, cols); b: f16 (rows, rank). Products and sums are f32.
    """

    a: Array
    b: Array
    scale: float

    @property
    def rank(self) -> int:
        return int(self.a.shape[0])

    @property
    def nbytes(self) -> int:
        return int(self.a.nbytes + self.b.nbytes)


Adapter = Mapping[str, LowRank]  # tensor of the program -> its update


def updatable(program: Program) -> list[Linear | Logits]:
    """The ops whose products an adapter may update, in order."""
    return [op for op in program.ops if isinstance(op, Linear | Logits)]


def free_number(taken: Container[int]) -> int:
    """The lowest number that no loaded adapter has."""
    return next(n for n in count() if n not in taken)


def check_adapter(adapter: Adapter, program: Program) -> None:
    """Prove that each update fits a linear or the head. Raises BadRequest naming the tensor and the fault."""
    matrices = {op.weight for op in updatable(program)}
    if not adapter:
        raise BadRequest("the adapter has no updates")
    for name, low in adapter.items():
        if name not in matrices:
            raise BadRequest(
                f"the adapter updates {name!r}, which is no linear's weight; {nearest(name, matrices)}"
            )
        spec = program.tensors[name]
        for what, plane in (("a", low.a), ("b", low.b)):
            if plane.ndim != 2 or plane.dtype != np.float16:
                raise BadRequest(f"{what} of {name!r} is {plane.ndim}-D {plane.dtype}, expected 2-D float16")
        if not 1 <= low.rank <= MAX_RANK:
            raise BadRequest(f"the update of {name!r} has rank {low.rank}, expected 1 to {MAX_RANK}")
        for what, plane, shape in (
            ("a", low.a, (low.rank, spec.cols)),
            ("b", low.b, (spec.rows, low.rank)),
        ):
            if plane.shape != shape:
                raise BadRequest(f"{what} of {name!r} is {plane.shape}, expected {shape}")
            if not np.isfinite(plane).all():
                raise BadRequest(f"{what} of {name!r} holds NaN or Inf")
        if not math.isfinite(low.scale):
            raise BadRequest(f"the scale of {name!r} is {low.scale}, expected a finite number")
