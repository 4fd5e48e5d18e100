"""The KV cache of the reference backend: pages in their real storage formats, through the formats' codecs."""

from __future__ import annotations

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import cache_arrays, kv_format
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadRequest, NumericError, ValueOutOfRange


class KvArena:
    """Arrays (pages, kv_heads, page_tokens, items) for each layer, K or V, and plane."""

    def __init__(self, program: Program, kv: KvPlan) -> None:
        self._kv = kv
        self._formats = {"k": kv_format(kv.k), "v": kv_format(kv.v)}
        self._arrays: dict[tuple[int, str], dict[str, Array]] = {}
        for a in cache_arrays(program, kv):
            self._arrays.setdefault((a.layer, a.which), {})[a.plane] = np.zeros(a.shape, a.dtype)

    def append(self, layer: int, which: str, rows: Array, pages: Array, slots: Array) -> None:
        """Store rows (tokens, kv_heads, head_dim) at slot `slots[t]` of page `pages[t]`.

        Raises NumericError on values that the cache format cannot hold.
        """
        tokens, heads, head_dim = rows.shape
        try:
            planes = self._formats[which].encode(rows.reshape(tokens * heads, head_dim))
        except ValueOutOfRange as error:
            raise NumericError(f"{which} of layer {layer} does not fit the cache: {error}") from error
        for name, array in self._arrays[layer, which].items():
            array[pages, :, slots] = planes[name].reshape(tokens, heads, -1)

    def read(self, layer: int, which: str, pages: Array, head_dim: int) -> Array:
        """All rows of those pages in order, f32 (len(pages) * page_tokens, kv_heads, head_dim)."""
        planes: dict[str, Array] = {}
        for name, array in self._arrays[layer, which].items():
            # (pages, kv_heads, page_tokens, items) -> one row for each (token, head)
            by_token = array[pages].transpose(0, 2, 1, 3)
            planes[name] = np.ascontiguousarray(by_token).reshape(-1, array.shape[3])
        heads = array.shape[1]
        count = len(pages) * self._kv.page_tokens
        rows = self._formats[which].decode(planes, count * heads, head_dim)
        return rows.reshape(count, heads, head_dim)

    def copy_page(self, source: int, target: int) -> None:
        for page in (source, target):
            if not 0 <= page < self._kv.pages:
                raise BadRequest(f"page {page} does not exist, the cache has {self._kv.pages}")
        for planes in self._arrays.values():
            for array in planes.values():
                array[target] = array[source]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for planes in self._arrays.values() for a in planes.values())
