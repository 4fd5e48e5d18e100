"""The low-rank adapters that a session has loaded, by name."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.backends.protocol import Executor
from edge_runtime.engine.adapter import Adapter
from edge_runtime.errors import BadRequest, nearest

ReadAdapter = Callable[[str | os.PathLike[str]], Adapter]


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """Its number in the executor, and the sha256 of its numbers."""

    number: int
    digest: str


class Adapters:
    """read: makes an Adapter of a PEFT folder for the session's model."""

    def __init__(self, executor: Executor, read: ReadAdapter | None) -> None:
        self._executor = executor
        self._read = read
        self._loaded: dict[str, LoadedAdapter] = {}

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def get(self, name: str) -> LoadedAdapter:
        """Raises BadRequest naming the nearest one."""
        if name not in self._loaded:
            raise BadRequest(f"no adapter {name!r:.60} is loaded; {nearest(name, self._loaded)}")
        return self._loaded[name]

    def read(self, adapter: str | os.PathLike[str] | Adapter) -> Adapter:
        """An Adapter as it is, or out of a PEFT folder."""
        if not isinstance(adapter, str | os.PathLike):
            return adapter
        if self._read is None:
            raise BadRequest("this session cannot read adapters from folders; use open_engine")
        return self._read(adapter)

    def load(self, name: str, adapter: Adapter) -> None:
        """Raises BadRequest for a name that is taken or an adapter that does not suit the model."""
        if name in self._loaded:
            raise BadRequest(f"an adapter {name!r:.60} is loaded already; drop it first")
        digest = _digest(adapter)
        self._loaded[name] = LoadedAdapter(self._executor.add_adapter(adapter), digest)

    def drop(self, name: str) -> None:
        self._executor.drop_adapter(self.get(name).number)
        del self._loaded[name]


def _digest(adapter: Adapter) -> str:
    sha = hashlib.sha256()
    for name in sorted(adapter):
        update = adapter[name]
        sha.update(f"{name} {update.a.shape} {update.b.shape} {float(update.scale).hex()}".encode())
        sha.update(np.ascontiguousarray(update.a).tobytes())
        sha.update(np.ascontiguousarray(update.b).tobytes())
    return sha.hexdigest()
