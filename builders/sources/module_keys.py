"""The tensors of a quantized module (`….qweight`, `….scales`), found by suffix and proved by shape."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from builders.sources.shards import Shards
from edge_runtime.engine.formats import Array
from edge_runtime.engine.program import MAX_DIM
from edge_runtime.errors import BadCheckpoint

FLOATS = ("F16", "BF16", "F32")


class Module:
    """One module's tensors by suffix; those that were read or set aside are taken from the shards."""

    def __init__(self, shards: Shards, name: str) -> None:
        self.shards, self.name = shards, name

    def key(self, suffix: str) -> str:
        return f"{self.name}.{suffix}"

    def has(self, suffix: str) -> bool:
        return self.key(suffix) in self.shards

    def set_aside(self, *suffixes: str) -> bool:
        """Leave out tensors that mean nothing here; whether there were any."""
        found = [self.key(s) for s in suffixes if self.has(s)]
        self.shards.taken.update(found)
        return bool(found)

    def shape(self, suffix: str, ndim: int, *dtypes: str) -> tuple[int, ...]:
        """Shape of a tensor that must be there, of one of those types. Raises BadCheckpoint."""
        key = self.key(suffix)
        if key not in self.shards:
            raise BadCheckpoint(f"{self.name!r} lacks its tensor {key!r}; the checkpoint is incomplete")
        entry = self.shards.entry(key)
        if entry.dtype not in dtypes or len(entry.shape) != ndim:
            wanted = f"{' or '.join(dtypes)} with {ndim} dimensions"
            raise BadCheckpoint(f"tensor {key!r} is {entry.dtype} of shape {entry.shape}, expected {wanted}")
        if any(not 1 <= n <= MAX_DIM for n in entry.shape):
            raise BadCheckpoint(
                f"tensor {key!r} has shape {entry.shape}, expected 1 to {MAX_DIM} a dimension"
            )
        self.shards.taken.add(key)
        return entry.shape

    def expect(self, suffix: str, found: tuple[int, ...], *wanted: tuple[int, ...]) -> None:
        """Raises BadCheckpoint naming the shapes where `found` is none of `wanted`."""
        if found not in wanted:
            texts = " or ".join(map(str, wanted))
            raise BadCheckpoint(f"tensor {self.key(suffix)!r} has shape {found}, expected {texts}")

    def raw(self, suffix: str) -> Array:
        return self.shards.raw(self.key(suffix))

    def scales(self, suffix: str) -> Array:
        """f32 scales. Raises BadCheckpoint on one that is not finite."""
        values = self.shards.tensor(self.key(suffix))
        if not np.isfinite(values).all():
            raise BadCheckpoint(f"tensor {self.key(suffix)!r} holds NaN or Inf; the checkpoint is damaged")
        return values


def modules(shards: Shards, suffix: str) -> Iterator[Module]:
    """Every module that has a tensor of that suffix."""
    ending = f".{suffix}"
    for key in shards:
        if key.endswith(ending):
            yield Module(shards, key.removesuffix(ending))
