"""KV pages as bytes: what a saved prefix holds of them.

The order is that of `cache_arrays` (layer, k then v, plane), so every backend that keeps those arrays reads
and writes the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_runtime.backends.batch import check_page
from edge_runtime.engine.formats import Array
from edge_runtime.engine.plan import KvPlan
from edge_runtime.errors import BadRequest


def page_nbytes(arrays: Sequence[Array]) -> int:
    """Bytes of one page in all arrays (pages, ...)."""
    return sum(a.nbytes // len(a) for a in arrays)


def read_page(arrays: Sequence[Array], page: int, kv: KvPlan) -> Array:
    """The bytes of a page in arrays (pages, ...), u8, a copy. Raises BadRequest on a page that is none."""
    check_page(page, kv)
    parts = [np.ascontiguousarray(a[page]).reshape(-1).view(np.uint8) for a in arrays]
    return np.concatenate(parts) if parts else np.empty(0, np.uint8)


def write_page(arrays: Sequence[Array], page: int, data: Array, kv: KvPlan) -> None:
    """What `read_page` gave. Raises BadRequest on a page that does not exist or a wrong size."""
    check_page(page, kv)
    size = page_nbytes(arrays)
    if data.dtype != np.uint8 or data.shape != (size,):
        raise BadRequest(f"a page is uint8 ({size},) in this cache, not {data.dtype} {data.shape}")
    at = 0
    for array in arrays:
        end = at + array[page].nbytes
        array[page] = np.ascontiguousarray(data[at:end]).view(array.dtype).reshape(array.shape[1:])
        at = end
