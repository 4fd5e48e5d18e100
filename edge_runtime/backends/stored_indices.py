"""Numbers of an engine that address memory: checked when a backend loads it, before anything is computed."""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.packed import PackedTensor
from edge_runtime.errors import BadEngineFile, ValueOutOfRange


def check_order(name: str, values: Array, width: int) -> None:
    """A gather op's f32 `values`, (n,) or (1, n), name columns below `width`.

    Raises BadEngineFile on one that is no whole number or out of range.
    """
    row = values.reshape(-1)
    bad = ~((row >= 0) & (row < width) & (row == np.floor(row)))  # true of a NaN
    if bad.any():
        at = int(np.argmax(bad))
        raise BadEngineFile(
            f"tensor {name!r} names column {row[at]} at place {at}, expected whole numbers below {width}"
        )


def check_indices(name: str, tensor: PackedTensor) -> None:
    """Raises BadEngineFile where a format's own numbers of columns are out of range or come twice."""
    check = get_format(tensor.format).check_values
    if check is not None:
        try:
            check(tensor.planes, tensor.cols)
        except ValueOutOfRange as error:
            raise BadEngineFile(f"tensor {name!r}: {error}") from error
