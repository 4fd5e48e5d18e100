"""Single rows of a stored tensor are those of the whole, for every format and packing."""

from __future__ import annotations

import numpy as np
import pytest
from cpu_programs import packed

from edge_runtime.backends.numpy_weights import decode, decode_rows
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.packing import cpu_packing


@pytest.mark.parametrize("name", FORMATS)
def test_rows_alone_are_rows_of_the_whole(name: str) -> None:
    values = np.random.default_rng(1).standard_normal((50, 150)).astype(np.float32)
    ids = np.array([49, 0, 17, 16, 17, 33])
    for packing in ("rows", cpu_packing(name)):
        tensor = packed(values, name, packing)
        assert np.array_equal(decode_rows(tensor, ids), decode(tensor)[ids]), packing
