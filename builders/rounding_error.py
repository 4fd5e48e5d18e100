"""One tensor in one format: its values as they come back, and the error at its output by the statistics.

tr(E H E^T) with E = Q - W is the mean square of what the rounding adds to the outputs (statistics.py). All
rows of a matrix have the same inputs, so a sample of them is enough for the ratio to tr(W H W^T). An
embedding has no inputs, and each of its rows counts as often as its token occurs.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from builders.encoding import encode
from builders.parts import Part
from builders.quantize import Algorithm, AlgorithmOptions
from builders.sources.matrix import Stored
from builders.statistics import InputStatistics
from builders.weights import Model
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.program import TensorSpec

SAMPLED_ROWS = 512  # of a matrix: the ratio of two traces over them is near that over all
SAMPLED_TOKENS = 4096  # of an embedding, of those that occur


class Rounder:
    """Rounds tensors of a model by one algorithm."""

    def __init__(self, weights: Model, algorithm: Algorithm, options: AlgorithmOptions) -> None:
        self.algorithm = algorithm
        self._weights, self._options = weights, options

    def rounded(
        self, name: str, fmt: Format, inputs: InputStatistics | None, ids: Array | None = None
    ) -> Array:
        """f32 values of the tensor (or of its rows `ids`) after a round trip. Raises ValueOutOfRange."""
        program, alone = self._weights.program, False
        if ids is not None and not len(ids):
            return np.empty((0, program.tensors[name].cols), np.float32)
        stored = self._weights.stored(name, fmt.name)
        if ids is not None and stored is None and not any(p.per == "tensor" for p in fmt.planes):
            alone = self.algorithm.ROW_WISE  # rows do not know of each other: others need no rounding
        values = self._weights.rows(name, ids) if alone and ids is not None else self._weights(name)
        spec = TensorSpec(len(values), values.shape[1], program.tensors[name].role)
        small = msgspec.structs.replace(program, tensors={**program.tensors, name: spec})
        made = encode(
            Part("the model", small, _Held(values, stored)), name, fmt, self.algorithm, inputs, self._options
        )
        found = fmt.decode(made.planes, spec.rows, spec.cols)
        return found if ids is None or alone else np.asarray(found[ids])


@dataclass(frozen=True, slots=True)
class _Held:
    """One tensor in memory."""

    values: Array
    planes: Stored | None

    def block(self, name: str, start: int, stop: int) -> Array:
        return np.asarray(self.values[start:stop])

    def stored(self, name: str, fmt: str) -> Stored | None:
        return self.planes


def sampled(count: int, most: int = SAMPLED_ROWS) -> Array:
    """At most so many of the numbers below `count`, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.int64))


def weighted_square(values: Array, hessian: Tensor) -> float:
    """tr(V H V^T) of f32 values (rows, n): the product in f32, the sum in f64."""
    v = torch.from_numpy(np.ascontiguousarray(values)).to(hessian.device, copy=True)
    return max(float(((v @ hessian).double() * v.double()).sum()), 0.0)


def occurrences(values: Array, counts: Array) -> float:
    """Sum of squares of rows (k, n), each as often as its token occurs (k,)."""
    return float((np.square(values, dtype=np.float64).sum(axis=1) * counts).sum())
