"""SmoothQuant (Xiao et al. 2022, "Accurate and Efficient Post-Training Quantization for LLMs").

For 8-bit activations: outlier channels of the inputs are divided by s and the weights multiplied by it, with
s_j = max|x_j|^a / max|w_j|^(1-a) (equation 4). The paper takes a = 0.5 for most models; here a is searched
for every group of linears, for the least squared output error on sampled inputs, with the inputs rounded to
int8 per token and the weights on the grids of their extremes. Scaled weights are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from builders.channel_scales import best_scale, centred, rounded, sampled, tied
from builders.quantize import AlgorithmOptions, rtn
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format, get_format

ROW_WISE = True
CALIBRATED = True
STEPS = 20  # strengths a = 0, 1/20, ..., 1


def scale_inputs(
    weights: Sequence[Array],
    formats: Sequence[Format],
    inputs: InputStatistics,
    options: AlgorithmOptions,
    ties: Array | None = None,
) -> Array:
    """s f32 (cols,), see `ChannelScaler`; ones where no scaling has less error."""
    few = [sampled(w) for w in weights]
    x_max = inputs.absmax.astype(np.float64)
    x_max = tied(np.maximum(x_max, 1e-5 * x_max.max() + 1e-30), ties)
    w_max = np.max([np.abs(w).max(axis=0) for w in weights], axis=0).astype(np.float64)
    w_max = tied(np.maximum(w_max, 1e-5 * w_max.max() + 1e-30), ties)
    found = [np.ones(len(x_max), np.float32)]
    found += [centred(x_max ** (k / STEPS) / w_max ** (1 - k / STEPS)) for k in range(STEPS + 1)]
    rows = inputs.rows.astype(np.float32)
    return best_scale(found, (output_loss(few, formats, rows, s) for s in found), len(x_max))


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols), already scaled, as `rtn` chooses them. Raises ValueOutOfRange."""
    return rtn.quantize(weights, fmt, inputs, options)


def output_loss(weights: Sequence[Array], formats: Sequence[Format], rows: Array, scale: Array) -> float:
    """Sum of squared output errors for inputs (k, cols), divided by s and rounded to int8 per token."""
    small = rows / scale
    int8 = get_format("int8_row")  # a scale for each row: per token
    x = int8.decode(int8.encode(small), *small.shape)
    total = 0.0
    for w, fmt in zip(weights, formats, strict=True):
        error = x @ rounded(w * scale, fmt).T - rows @ w.T
        total += float(np.square(error, dtype=np.float64).sum())
    return total
