"""AWQ (Lin et al. 2023, "Activation-aware Weight Quantization for LLM Compression and Acceleration").

Channels with large inputs matter most, and a weight column that is multiplied by s before rounding has its
error divided by s. s = mean|x|^a, and s = mean|x|^a / mean|w|^(1-a) as in later code of the authors (w
relative to the greatest of its group), centred around 1; the exponent is the one of least output error of all
linears that read the inputs, measured with their second moment. The paper's clip search follows: ranges of
groups are shrunk, to the least output error of the group by itself, e_g H_gg e_g^T.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from builders.channel_scales import best_scale, centred, sampled, tied, weight_error
from builders.grids import affine, grid_for, grouped, has_grid, levels_of, nearest
from builders.observers import get_observer, minmax, mse
from builders.quantize import AlgorithmOptions, int8_outlier
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format

ROW_WISE = True
CALIBRATED = True
GRID = 20  # exponents 0, 1/20, ..., 1, as the paper
_CHUNK = 1 << 20  # weights whose clips are searched together


def scale_inputs(
    weights: Sequence[Array],
    formats: Sequence[Format],
    inputs: InputStatistics,
    options: AlgorithmOptions,
    ties: Array | None = None,
) -> Array:
    """s f32 (cols,), see `ChannelScaler`; ones where no scaling has less error."""
    few = [sampled(w) for w in weights]
    found = list(_candidates(few, formats, inputs, ties))
    return best_scale(found, (weight_error(few, formats, inputs, s) for s in found), few[0].shape[1])


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols), already scaled. Raises ValueOutOfRange.

    Clips are searched with the inputs; without them, or with an observer of the user's, by that one (mse).
    """
    if not has_grid(fmt):
        return int8_outlier.quantize(weights, fmt, inputs, options)
    if inputs is None or options.observer is not None:
        observe = get_observer(options.observer or "mse")
        ends = observe(weights, fmt, None if inputs is None else inputs.importance)
    else:
        ends = clipped(weights, fmt, inputs)
    return fmt.encode_on_grid(weights, grid_for(fmt, *ends))


def clipped(weights: Array, fmt: Format, inputs: InputStatistics) -> tuple[Array, Array]:
    """(low, high) f32 (rows, groups) of least e_g H_gg e_g^T: extremes shrunk by up to a half as in the
    paper, and the range of least error weighted by importance, which also has scales of the other sign."""
    span = fmt.span(weights.shape[1])
    if any(p.whole for p in fmt.planes) or span > 256:  # no groups whose moments are small
        return mse(weights, fmt, inputs.importance)
    blocks = _moments(inputs.hessian, span)
    low, high = mse(weights, fmt, inputs.importance)
    best = _group_errors(weights, fmt, low, high, blocks)
    first, last = minmax(weights, fmt)
    ranges = [(first * f, last * f) for f in np.linspace(1, 0.5, 11, dtype=np.float32)]
    ranges += [(low * f, high * f) for f in np.array([0.96, 0.98, 1.02, 1.04], np.float32)]
    for a, b in ranges:
        error = _group_errors(weights, fmt, a, b, blocks)
        better = error < best
        best = np.where(better, error, best)
        low, high = np.where(better, a, low), np.where(better, b, high)
    return low, high


def _candidates(
    weights: Sequence[Array], formats: Sequence[Format], inputs: InputStatistics, ties: Array | None
) -> Iterator[Array]:
    size = inputs.mean_abs.astype(np.float64)
    x = tied(np.maximum(size, 1e-4 * size.max() + 1e-30), ties)
    w = tied(_relative_size(weights, formats), ties)
    for k in range(GRID + 1):
        yield centred(x ** (k / GRID))
    for k in range(1, GRID + 1):
        yield centred(x ** (k / GRID) / (w ** (1 - k / GRID) + 1e-4))


def _relative_size(weights: Sequence[Array], formats: Sequence[Format]) -> Array:
    """Mean over rows of |w| relative to the greatest of its group, f64 (cols,)."""
    cols, total, rows = weights[0].shape[1], 0.0, 0
    for w, fmt in zip(weights, formats, strict=True):
        g = np.abs(grouped(w, fmt.span(cols)))
        relative = g / np.maximum(g.max(axis=2, keepdims=True), np.float32(1e-30))
        total = total + relative.reshape(len(w), -1)[:, :cols].sum(axis=0, dtype=np.float64)
        rows += len(w)
    found: Array = np.maximum(total / rows, 1e-6)
    return found


def _moments(hessian: Array, span: int) -> Array:
    """The blocks of H on its diagonal, f32 (groups, span, span), padded with 0."""
    groups = -(-len(hessian) // span)
    blocks = np.zeros((groups, span, span), np.float32)
    for g in range(groups):
        part = hessian[g * span : (g + 1) * span, g * span : (g + 1) * span]
        blocks[g, : len(part), : len(part)] = part
    return blocks


def _group_errors(weights: Array, fmt: Format, low: Array, high: Array, blocks: Array) -> Array:
    """e_g H_gg e_g^T, (rows, groups)."""
    rows, cols = weights.shape
    span = blocks.shape[1]
    scale, shift = affine(fmt, grid_for(fmt, low, high))
    found = np.empty(low.shape, np.float32)
    step = max(1, _CHUNK // cols)
    for start in range(0, rows, step):
        r = slice(start, start + step)
        g, s, m = grouped(weights[r], span), scale[r, :, None], shift[r, :, None]
        z = nearest((g - m) / np.where(s == 0, np.float32(np.inf), s), levels_of(fmt))
        e = (z * s + m - g).transpose(1, 0, 2)  # (groups, r, span)
        found[r] = np.einsum("grs,grs->rg", e @ blocks, e)
    return found
