"""Round to nearest. Symmetric int4 tries two grids a group and keeps the one with the smaller squared error:

the format's own, scale = absmax / 7 (codes -7..7), and the signed one, scale = m / -8 with m the value of
greatest magnitude, so that m takes the spare code -8 exactly (llama.cpp's Q4_0). Ties keep the first.
"""

from __future__ import annotations

import numpy as np

from builders.coder import coder_of
from builders.quantize import AlgorithmOptions
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format

ROW_WISE = True  # per-tensor scales are the one exception, which the caller knows from the format
CALIBRATED = False


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols). Raises ValueOutOfRange on NaN, Inf or too large a scale.

    With an observer, the nearest levels on the grid of its ranges, columns weighted by the inputs if known.
    """
    coder = coder_of(fmt, options.observer)
    if coder is not None:
        return coder.quantize(weights, None if inputs is None else inputs.importance)
    planes = fmt.encode(weights)
    q = fmt.plane("q")
    if q is None or q.encoding != "u4o8" or fmt.group is None:
        return planes
    rows, cols = weights.shape
    signed = fmt.encode_on_grid(weights, {"scale": _signed_scale(weights, fmt.group)})
    first = _group_error(weights, fmt.decode(planes, rows, cols), fmt.group)
    second = _group_error(weights, fmt.decode(signed, rows, cols), fmt.group)
    scale = np.where(second < first, signed["scale"], planes["scale"])
    return fmt.encode_on_grid(weights, {"scale": scale})


def _grouped(x: Array, group: int) -> Array:
    """(rows, cols) as (rows, groups, group), the last group filled with zeros."""
    rows, cols = x.shape
    return np.pad(x, ((0, 0), (0, -cols % group))).reshape(rows, -1, group)


def _signed_scale(x: Array, group: int) -> Array:
    grouped = _grouped(x, group)
    at = np.abs(grouped).argmax(axis=2)[..., None]
    scale: Array = (np.take_along_axis(grouped, at, axis=2)[..., 0] / np.float32(-8)).astype(np.float16)
    return scale


def _group_error(x: Array, decoded: Array, group: int) -> Array:
    """Sum of squared errors of each group, f64 (rows, groups)."""
    error: Array = np.square(_grouped(x - decoded, group), dtype=np.float64).sum(axis=2)
    return error
