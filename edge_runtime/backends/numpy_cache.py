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
    """Arrays (pages, kv_heads, rows, items) for each layer, K or V, and plane; rows as in CacheArray.

    Where K is per channel, every page's keys are also kept as they came, f32 (pages, kv_heads, page_tokens,
    head_dim) a layer: the simplest way to have those of open pages, and so slots are of no use here.
    """

    def __init__(self, program: Program, kv: KvPlan) -> None:
        self._kv = kv
        self._formats = {"k": kv_format(kv.k), "v": kv_format(kv.v)}
        self._arrays: dict[tuple[int, str], dict[str, Array]] = {}
        for a in cache_arrays(program, kv):
            self._arrays.setdefault((a.layer, a.which), {})[a.plane] = np.zeros(a.shape, a.dtype)
        self._exact: list[Array] = []
        if kv.per_channel:
            shapes = ((kv.pages, slot.kv_heads, kv.page_tokens, slot.head_dim) for slot in program.cache)
            self._exact = [np.zeros(shape, np.float32) for shape in shapes]

    def append(self, layer: int, which: str, rows: Array, pages: Array, slots: Array) -> None:
        """Store rows (tokens, kv_heads, head_dim) at slot `slots[t]` of page `pages[t]`.

        Raises NumericError on values that the cache format cannot hold.
        """
        if which == "k" and self._exact:
            if not np.isfinite(rows).all():
                raise NumericError(f"k of layer {layer} holds NaN or Inf; no token was emitted")
            self._exact[layer][pages, :, slots] = rows
            self._close(layer, np.unique(pages[slots == self._kv.page_tokens - 1]))
            return
        tokens, heads, head_dim = rows.shape
        planes = self._encode(layer, which, rows.reshape(tokens * heads, head_dim))
        for name, array in self._arrays[layer, which].items():
            array[pages, :, slots] = planes[name].reshape(tokens, heads, -1)

    def read(self, layer: int, which: str, table: Array, places: Array, head_dim: int) -> Array:
        """Rows at `places` of the sequence with that page table, f32 (len(places), kv_heads, head_dim).

        Whole pages are decoded, because some formats share scales among the tokens of a page.
        """
        size = self._kv.page_tokens
        pages, at = np.unique(table[places // size], return_inverse=True)
        by_channel = which == "k" and bool(self._exact)
        planes: dict[str, Array] = {}
        for name, array in self._arrays[layer, which].items():
            # (pages, kv_heads, rows, items) -> one row for each (head, channel), or for each (token, head)
            stored = array[pages] if by_channel else array[pages].transpose(0, 2, 1, 3)
            planes[name] = np.ascontiguousarray(stored).reshape(-1, array.shape[3])
        heads = array.shape[1]
        if by_channel:
            rows = self._formats[which].decode(planes, len(pages) * heads * head_dim, size)
            rows = rows.reshape(len(pages), heads, head_dim, size).transpose(0, 3, 1, 2)
        else:
            rows = self._formats[which].decode(planes, len(pages) * size * heads, head_dim)
        found: Array = rows.reshape(-1, heads, head_dim)[at.reshape(-1) * size + places % size]
        return found

    def read_exact(self, layer: int, table: Array, places: Array) -> Array:
        """Keys at `places` as they came, f32 (len(places), kv_heads, head_dim); K must be per channel."""
        size = self._kv.page_tokens
        rows: Array = self._exact[layer][table[places // size], :, places % size]
        return rows

    def copy_page(self, source: int, target: int) -> None:
        for page in (source, target):
            check_page(page, self._kv)
        for array in (*self.arrays, *self._exact):
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
        """All arrays of stored pages in arena order (layer, k then v, plane order)."""
        return [array for planes in self._arrays.values() for array in planes.values()]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in (*self.arrays, *self._exact))

    def _close(self, layer: int, pages: Array) -> None:
        """Quantize the keys of full pages, a scale for each channel and page."""
        if not len(pages):
            return
        exact = self._exact[layer][pages].transpose(0, 1, 3, 2)  # (pages, kv_heads, head_dim, page_tokens)
        planes = self._encode(layer, "k", exact.reshape(-1, self._kv.page_tokens))
        for name, array in self._arrays[layer, "k"].items():
            array[pages] = planes[name].reshape(len(pages), *array.shape[1:])

    def _encode(self, layer: int, which: str, matrix: Array) -> dict[str, Array]:
        try:
            return self._formats[which].encode(matrix)
        except ValueOutOfRange as error:
            raise NumericError(f"{which} of layer {layer} does not fit the cache: {error}") from error
