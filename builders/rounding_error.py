"""One tensor in one format: its values as they come back, and the error at its output by the statistics.

tr(E H E^T) with E = Q - W is the mean square of what the rounding adds to the outputs (statistics.py). All
rows of a matrix have the same inputs, so a sample of them is enough for the ratio to tr(W H W^T). An
embedding has no inputs, and each of its rows counts as often as its token occurs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from builders.encoding import encode
from builders.parts import Blocks, Part
from builders.quantize import Algorithm, AlgorithmOptions
from builders.statistics import InputStatistics
from builders.weights import Weights
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.program import Program, TensorSpec

SAMPLED_ROWS = 512  # of a matrix: the ratio of two traces over them is near that over all


class Model(Weights, Blocks, Protocol):
    """Weights of a model that can be asked for in every way, and for planes that they already have."""


@dataclass(frozen=True, slots=True)
class Rounder:
    """Rounds tensors of a model by one algorithm; `part` names it in errors."""

    weights: Model
    algorithm: Algorithm
    options: AlgorithmOptions

    def rounded(
        self, name: str, fmt: Format, inputs: InputStatistics | None, ids: Array | None = None
    ) -> Array:
        """f32 values of the tensor (or of its rows `ids`) after a round trip. Raises ValueOutOfRange."""
        spec = self.weights.program.tensors[name]
        alone = self.algorithm.ROW_WISE and not any(p.per == "tensor" for p in fmt.planes)
        alone &= self.weights.stored(name, fmt.name) is None
        if ids is not None and alone:  # rows do not know of each other, so the others need no rounding
            rows = _SomeRows(self.weights, name, ids)
            spec = rows.program.tensors[name]
            part = Part("model", rows.program, rows)
        else:
            part = Part("model", self.weights.program, self.weights)
        made = encode(part, name, fmt, self.algorithm, inputs, self.options)
        values = fmt.decode(made.planes, spec.rows, spec.cols)
        return values if ids is None or alone else np.asarray(values[ids])


class _SomeRows:
    """A tensor of which only some rows exist."""

    def __init__(self, weights: Weights, name: str, ids: Array) -> None:
        spec = weights.program.tensors[name]
        small = TensorSpec(len(ids), spec.cols, spec.role)
        program = weights.program
        self.program = Program(
            ops=program.ops,
            tensors={**program.tensors, name: small},
            buffers=program.buffers,
            cache=program.cache,
            vocab_size=program.vocab_size,
            max_context=program.max_context,
        )
        self._values = weights.rows(name, ids)

    def block(self, name: str, start: int, stop: int) -> Array:
        return np.asarray(self._values[start:stop])

    def stored(self, name: str, fmt: str) -> None:
        return None


def sampled_rows(rows: int) -> Array:
    """At most SAMPLED_ROWS row numbers, evenly spaced."""
    return np.unique(np.linspace(0, rows - 1, min(rows, SAMPLED_ROWS)).astype(np.int64))


def weighted_square(values: Array, hessian: Array) -> float:
    """tr(V H V^T) of f32 values (rows, n): the product in f32, the sum in f64."""
    v = torch.from_numpy(np.ascontiguousarray(values)).clone()
    return max(float(((v @ torch.from_numpy(hessian).clone()).double() * v.double()).sum()), 0.0)


def occurrences(values: Array, counts: Array) -> float:
    """Sum of squares of rows (k, n), each as often as its token occurs (k,)."""
    return float((np.square(values, dtype=np.float64).sum(axis=1) * counts).sum())
