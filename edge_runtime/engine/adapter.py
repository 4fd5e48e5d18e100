"""Low-rank adapters (LoRA, Hu et al. 2021): what a request may add to a quantized base, weights untouched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.engine.formats import Array

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
