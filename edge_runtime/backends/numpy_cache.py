"""The KV cache of the reference backend: pages in their real storage formats, through the formats' codecs."""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.batch import check_move, check_page
from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import cache_arrays, kv_format
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import Program
from edge_runtime.errors import NumericError, ValueOutOfRange


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

    def read(self, layer: int, which: str, table: Array, places: Array, head_dim: int) -> Array:
        """Rows at `places` of the sequence with that page table, f32 (len(places), kv_heads, head_dim).

        Whole pages are decoded, because some formats share scales among the tokens of a page.
        """
        size = self._kv.page_tokens
        pages, at = np.unique(table[places // size], return_inverse=True)
        planes: dict[str, Array] = {}
        for name, array in self._arrays[layer, which].items():
            # (pages, kv_heads, page_tokens, items) -> one row for each (token, head)
            by_token = array[pages].transpose(0, 2, 1, 3)
            planes[name] = np.ascontiguousarray(by_token).reshape(-1, array.shape[3])
        heads = array.shape[1]
        rows = self._formats[which].decode(planes, len(pages) * size * heads, head_dim)
        found: Array = rows.reshape(-1, heads, head_dim)[at.reshape(-1) * size + places % size]
        return found

    def copy_page(self, source: int, target: int) -> None:
        for page in (source, target):
            check_page(page, self._kv)
        for array in self.arrays:
            array[target] = array[source]

    def move(self, pages: Array, sources: Array, targets: Array) -> None:
        """Copy rows of one sequence from places to places, see `Executor.move`."""
        check_move(pages, sources, targets, self._kv)
        size = self._kv.page_tokens
        for array in self.arrays:
            moved = array[pages[sources // size], :, sources % size]
            array[pages[targets // size], :, targets % size] = moved

    @property
    def arrays(self) -> list[Array]:
        """All arrays in arena order (layer, k then v, plane order)."""
        return [array for planes in self._arrays.values() for array in planes.values()]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)
