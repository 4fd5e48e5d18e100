"""One tensor quantized: its planes in a format, and how far they are from the values."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from builders.parts import Part
from builders.quantize import Algorithm, AlgorithmOptions
from builders.sources.matrix import Stored
from builders.statistics import InputStatistics
from builders.weights import row_blocks
from edge_runtime.engine.formats import Array, Format, get_format
from edge_runtime.errors import ValueOutOfRange

_PIECE = 1 << 18  # values of one f64 sum: it needs little memory


@dataclass(frozen=True, slots=True)
class Encoded:
    """Codec planes of a tensor; energies are sums of squares."""

    planes: dict[str, Array]
    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float | None:
        """Signal to quantization noise, or None where the numbers are exact (or all zero)."""
        if self.noise > 0.0 and self.signal > 0.0:
            return round(10.0 * math.log10(self.signal / self.noise), 3)
        return None


def encode(
    part: Part,
    name: str,
    fmt: Format,
    algorithm: Algorithm,
    inputs: InputStatistics | None = None,
    options: AlgorithmOptions = AlgorithmOptions(),  # noqa: B008  (frozen)
) -> Encoded:
    """Quantize a tensor, in blocks of rows where algorithm and format allow. Raises ValueOutOfRange."""
    options = replace(options, rows=options.row_importance.get(name))
    try:
        return _encode(part, name, fmt, algorithm, inputs, options)
    except ValueOutOfRange as error:
        raise ValueOutOfRange(f"tensor {name!r} of {part.name}: {error}") from error


def _encode(
    part: Part,
    name: str,
    fmt: Format,
    algorithm: Algorithm,
    inputs: InputStatistics | None,
    options: AlgorithmOptions,
) -> Encoded:
    spec = part.program.tensors[name]
    stored = part.weights.stored(name, fmt.name)
    if stored is not None:
        return measured(part, name, stored) if stored.error else Encoded(stored.planes, 0.0, 0.0)
    whole = not algorithm.ROW_WISE or any(p.whole for p in fmt.planes)
    blocks = [(0, spec.rows)] if whole else row_blocks(spec.rows, spec.cols)
    planes: dict[str, Array] = {}
    signal = noise = 0.0
    for start, stop in blocks:
        values = part.weights.block(name, start, stop)
        made = algorithm.quantize(values, fmt, inputs, options)
        if not planes:
            shapes = fmt.shapes(spec.rows, spec.cols)
            planes = {p: np.empty(shapes[p], made[p].dtype) for p in shapes}
        for p, data in made.items():
            planes[p][start:stop] = data
        one = _energies(fmt, made, values)
        signal, noise = signal + one[0], noise + one[1]
    return Encoded(planes, signal, noise)


def measured(part: Part, name: str, stored: Stored) -> Encoded:
    """Planes of a tensor that are there already, and how far they are from its values."""
    fmt, spec = get_format(stored.format), part.program.tensors[name]
    signal = noise = 0.0
    for start, stop in row_blocks(spec.rows, spec.cols, run=fmt.run):
        values = part.weights.block(name, start, stop)
        one = _energies(fmt, stored.rows(start, stop).planes, values)
        signal, noise = signal + one[0], noise + one[1]
    return Encoded(stored.planes, signal, noise)


def _energies(fmt: Format, planes: dict[str, Array], values: Array) -> tuple[float, float]:
    """Sums of squares of the values (rows, cols) and of what their planes miss of them."""
    made, signal, noise = Stored(fmt.name, planes), 0.0, 0.0
    for a, b in row_blocks(*values.shape, _PIECE, fmt.run):
        error = fmt.decode(made.rows(a, b).planes, b - a, values.shape[1]) - values[a:b]
        signal += float(np.square(values[a:b], dtype=np.float64).sum())
        noise += float(np.square(error, dtype=np.float64).sum())
    return signal, noise
