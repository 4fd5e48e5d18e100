"""LLM.int8() (Dettmers et al. 2022, "8-bit Matrix Multiplication for Transformers at Scale").

Inputs whose magnitude reaches 6 somewhere are outlier features: their weight columns stay in f16 and are
multiplied apart, so that the other inputs get a finer int8 step. Format `int8_row_o128` has a fixed number of
such columns, one for every 128: those of the largest inputs, outliers first; where fewer reach 6 the next
largest fill the slots, which costs nothing and helps as far as it goes. The row's scale is the absmax of its
other columns (or the range of the user's observer). Other formats are rounded to nearest.
"""

from __future__ import annotations

import numpy as np

from builders.grids import grid_for
from builders.observers import get_observer
from builders.quantize import AlgorithmOptions, rtn
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format, get_format

ROW_WISE = True
CALIBRATED = True
THRESHOLD = 6.0  # the paper's


def quantize(
    weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
) -> dict[str, Array]:
    """Planes of f32 weights (rows, cols). Without inputs: the columns of the largest weights. Raises
    ValueOutOfRange."""
    index = fmt.plane("index")
    if index is None or inputs is None:
        return rtn.quantize(weights, fmt, inputs, options)
    chosen = outlier_columns(inputs.absmax, index.shape(*weights.shape)[1])
    others = weights.copy()
    others[:, chosen[chosen >= 0]] = 0
    observe = get_observer(options.observer or "minmax")
    grid = grid_for(get_format("int8_row"), *observe(others, get_format("int8_row"), inputs.importance))
    return fmt.encode_on_grid(weights, grid | {"index": chosen[None]})


def outlier_columns(absmax: Array, slots: int) -> Array:
    """Numbers i32 (slots,), ascending, of the columns with the largest inputs; -1 for slots without use.

    Inputs at or above THRESHOLD are the largest, so they come first by themselves; channels that never fired
    get no slot.
    """
    first = np.argsort(-absmax, kind="stable")[:slots]
    chosen = np.full(slots, -1, np.int32)
    used = np.sort(first[absmax[first] > 0])
    chosen[: len(used)] = used
    return chosen


def outliers(inputs: InputStatistics) -> int:
    """How many inputs reach the paper's threshold: more than the format's slots means error beyond int8's."""
    return int((inputs.absmax >= THRESHOLD).sum())
