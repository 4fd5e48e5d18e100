"""Pages of keys and values in their storage formats, and steps over them, as the cuda kernels find them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from emulation import Guarded

from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.kv import KV_FORMATS

CLASSES = {"f16": "edge::KvF16", "int8": "edge::KvInt8", "int4": "edge::KvInt4", "fp8": "edge::KvFp8"}
STRAIGHT = np.iinfo(np.int32).max
FIELDS = {"w": "codes", "q": "codes", "scale": "scale", "zero": "zero"}


class Side:
    """Keys or values of one cache slot: `planes` (pages, kv_heads, page_tokens, items) in guarded memory."""

    def __init__(self, name: str, pages: int, kv_heads: int, page_tokens: int, head_dim: int) -> None:
        self.name, self.shape = name, (pages, kv_heads, page_tokens, head_dim)
        self._format = get_format(KV_FORMATS[name])
        rows = pages * kv_heads * page_tokens
        planes = self._format.encode(np.zeros((rows, head_dim), np.float32))
        self._memory = {}
        self.planes: dict[str, Array] = {}
        for key, plane in planes.items():
            memory = Guarded.of(plane)
            memory.data[:] = 0xFF  # what no one wrote: NaN in every float
            self._memory[key] = memory
            self.planes[key] = memory.view(plane.dtype, (pages, kv_heads, page_tokens, -1))

    def write(self, pages: Array, slots: Array, rows: Array) -> None:
        """rows f32 (n, kv_heads, head_dim) at slots[i] of pages[i], by the format's codec."""
        n, heads, head_dim = rows.shape
        encoded = self._format.encode(np.ascontiguousarray(rows, np.float32).reshape(n * heads, head_dim))
        for key, plane in self.planes.items():
            plane[pages, :, slots] = encoded[key].reshape(n, heads, -1)

    def read(self, pages: Array, slots: Array) -> Array:
        """f32 (n, kv_heads, head_dim)."""
        n, (_, heads, _, head_dim) = len(pages), self.shape
        planes = {
            k: np.ascontiguousarray(p[pages, :, slots]).reshape(n * heads, -1) for k, p in self.planes.items()
        }
        return self._format.decode(planes, n * heads, head_dim).reshape(n, heads, head_dim)

    def steps(self, pages: Array, slots: Array) -> Array:
        """Distance of neighbours of int4 around each value that `read` gives, 0 for the other formats."""
        head_dim = self.shape[-1]
        if self.name != "int4":
            return np.zeros((len(pages), self.shape[1], head_dim), np.float32)
        return np.repeat(self.planes["scale"][pages, :, slots].astype(np.float32), 32, -1)[..., :head_dim]

    @property
    def record(self) -> rec.Kv:
        return rec.Kv(**{FIELDS[key]: memory.address for key, memory in self._memory.items()})

    def check(self) -> None:
        for memory in self._memory.values():
            memory.check()


@dataclass
class Tokens:
    """A step's arrays, each (T,), and page_tables (S, P); places and parents as in StepBatch."""

    positions: Array
    sequence: Array
    page_tables: Array
    parents: Array | None = None
    places: Array | None = None
    bends: Array = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.positions)
        self.positions, self.sequence, self.page_tables = (
            np.asarray(a, np.int32) for a in (self.positions, self.sequence, self.page_tables)
        )
        self.parents = np.asarray(np.full(count, -1) if self.parents is None else self.parents, np.int32)
        self.places = np.asarray(self.positions if self.places is None else self.places, np.int32)
        self.bends = np.where(self.places == self.positions, STRAIGHT, self.positions).astype(np.int32)
        for t, parent in enumerate(self.parents.tolist()):
            if parent >= 0:
                self.bends[t] = min(self.bends[t], self.bends[parent])

    def seen(self, t: int, window: int) -> Array:
        """Places of the keys that token t sees, in order of position."""
        position = int(self.positions[t])
        first = max(position - window + 1, 0) if window else 0
        places = np.arange(first, position + 1)
        while t >= 0 and position >= first:
            places[position - first] = self.places[t]
            t, position = int(self.parents[t]), position - 1
        return places

    def only(self, rows: Array | list[int]) -> Tokens:
        """Some of the tokens as a step of their own; their ancestors must be among them."""
        rows = np.asarray(rows)
        new = {int(old): i for i, old in enumerate(rows.tolist())}
        parents = [new[p] if (p := int(self.parents[t])) >= 0 else -1 for t in rows]
        return Tokens(
            self.positions[rows], self.sequence[rows], self.page_tables, np.array(parents), self.places[rows]
        )


class Step:
    """Guarded memory of a step, for a bucket of at least its tokens."""

    def __init__(self, tokens: Tokens, bucket: int = 0) -> None:
        self.tokens, self.count = tokens, len(tokens.positions)
        bucket = max(bucket, self.count)
        counts = np.zeros(rec.COUNTS, np.int32)
        counts[rec.TOKENS] = self.count
        counts[rec.TABLE_STRIDE] = tokens.page_tables.shape[1]
        arrays = {
            "counts": counts,
            "page_tables": tokens.page_tables,
            "status": np.zeros(1, np.uint32),
            **{
                name: np.append(getattr(tokens, name), np.full(bucket - self.count, -7, np.int32))
                for name in ("positions", "sequence", "places", "parents", "bends")
            },
        }
        self._memory = {name: Guarded.of(array) for name, array in arrays.items()}
        self.record = rec.Step(**{name: memory.address for name, memory in self._memory.items()})

    @property
    def status(self) -> int:
        return int(self._memory["status"].view(np.uint32)[0])

    def check(self) -> None:
        for memory in self._memory.values():
            memory.check()


def scattered(rng: np.random.Generator, lengths: list[int], page_tokens: int, spare: int = 2) -> Array:
    """Page tables (S, P) of sequences of these lengths over pages in random order; -1 beyond them."""
    counts = [-(-n // page_tokens) for n in lengths]
    order = iter(rng.permutation(sum(counts)).tolist())
    table = np.full((len(lengths), max(counts) + spare), -1, np.int32)
    for row, count in zip(table, counts, strict=True):
        row[:count] = [next(order) for _ in range(count)]
    return table
