"""QLoRA's NormalFloat (Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs"), without data.

The 16 levels are quantiles of a normal distribution, the scale of a block of 64 is its absmax (section 3),
and in `nf4_g64_dq` the scales are quantized once more, against their mean (double quantization, same part).
Levels, blocks and the second level are the formats' own (edge_runtime/engine/formats: nf4.py, nf4_double.py);
what the algorithm adds is that nothing else is searched, so values are those of bitsandbytes. An observer of
the user's replaces the absmax. Tensors that are planned in other formats are rounded to nearest.
"""

from __future__ import annotations

from builders.quantize import AlgorithmOptions, rtn
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format

ROW_WISE = True
CALIBRATED = False


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols). Raises ValueOutOfRange."""
    if fmt.kind == "table" and options.observer is None:
        return fmt.encode(weights)
    return rtn.quantize(weights, fmt, inputs, options)
