"""FP8 (Micikevicius et al. 2022, "FP8 Formats for Deep Learning"): E4M3 and E5M2 weights, and activations.

Weights are divided by a scale that brings their absmax to the format's greatest number and rounded to nearest
even (E4M3, per row, tensor or 128 columns; E5M2 has no scale). An observer of the user's replaces the absmax.
Activations are rounded in front of the linears by builders/activations.py, with a scale per token or with one
found in calibration. Tensors that are planned in other formats are rounded to nearest.
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
    return rtn.quantize(weights, fmt, inputs, options)
