"""What algorithms that scale channels share: the output error of scaled and rounded weights, without text.

Columns of W are multiplied by s and rounded, and the inputs divided by s: the error of the outputs is
tr(E H E^T) with E = Q(W s) / s - W and H the second moment of the unscaled inputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from builders.grids import affine, grid_for, grouped, has_grid, levels_of, nearest
from builders.observers import minmax
from builders.statistics import InputStatistics, output_error
from edge_runtime.engine.formats import Array, Format, get_format
from edge_runtime.engine.formats.trellis import GROUP, trellis_of

SAMPLED_ROWS = 256  # of each matrix: outputs whose error is measured


def sampled(weights: Array, rows: int = SAMPLED_ROWS) -> Array:
    """At most `rows` rows, evenly spaced."""
    return weights[:: -(-len(weights) // rows)]


def rounded(weights: Array, fmt: Format) -> Array:
    """Weights (rows, cols) on the format's grid of their extremes, f32.

    For a trellis format on that of the integers of as many bits: which columns gain by a scale is the same,
    and it is asked dozens of times.
    """
    code = trellis_of(fmt)
    if code is not None:
        fmt = get_format(f"int{code.bits}_g{GROUP}")
    if not has_grid(fmt):
        return fmt.decode(fmt.encode(weights), *weights.shape)
    span = fmt.span(weights.shape[1])
    scale, shift = (a[..., None] for a in affine(fmt, grid_for(fmt, *minmax(weights, fmt))))
    y = (grouped(weights, span) - shift) / np.where(scale == 0, np.float32(np.inf), scale)
    values = nearest(y, levels_of(fmt)) * scale + shift
    found: Array = values.reshape(len(weights), -1)[:, : weights.shape[1]]
    return found


def weight_error(
    weights: Sequence[Array], formats: Sequence[Format], inputs: InputStatistics, scale: Array
) -> float:
    """Mean squared output error of all linears together when their columns are scaled by s (cols,)."""
    return sum(
        output_error(rounded(w * scale, fmt) / scale - w, inputs)
        for w, fmt in zip(weights, formats, strict=True)
    )


def tied(values: Array, ties: Array | None) -> Array:
    """Values (cols,) with their geometric mean in every set of tied columns."""
    if ties is None:
        return values
    count = np.bincount(ties)
    mean = np.bincount(ties, np.log(np.maximum(values, 1e-30))) / np.maximum(count, 1)
    found: Array = np.exp(mean)[ties]
    return found


def centred(scale: Array) -> Array:
    """s / sqrt(max * min), f32: as the paper's code of AWQ keeps scales around 1."""
    scale = np.maximum(np.asarray(scale, np.float64), 1e-4 * np.max(scale))
    found: Array = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
    return found


def best_scale(candidates: Iterable[Array], losses: Iterable[float], cols: int) -> Array:
    """The candidate of least loss; the first of equals."""
    best, found = np.inf, np.ones(cols, np.float32)
    for candidate, loss in zip(candidates, losses, strict=True):
        if loss < best:
            best, found = loss, candidate
    return found
