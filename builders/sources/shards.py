"""The .safetensors files of a model folder: one file, or those that an index names."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from edge_runtime.engine.folder import MAX_INDEX, contained, parse_object, read_capped
from edge_runtime.engine.shard import Array, Entry, Shard
from edge_runtime.errors import BadCheckpoint, nearest

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_SHARD_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")


class Shards:
    """Open weight files of a folder; `files`: the names of all that were read; `taken`: tensors that are
    pieces of quantized ones, or mean nothing here. Close when done.

    Raises BadCheckpoint where one is absent, damaged or of a kind that is never read.
    """

    def __init__(self, folder: Path, model: str) -> None:
        self.model = model
        self.files: list[str] = []
        self.taken: set[str] = set()
        self._folder = folder
        self._open: dict[str, Shard] = {}
        self._where: dict[str, Shard] = {}
        try:
            self._read()
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[str]:
        """Names of all tensors, sorted."""
        return iter(sorted(self._where))

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def entry(self, key: str) -> Entry:
        """dtype and shape of a tensor. Raises BadCheckpoint naming the nearest key."""
        return self._shard(key).entries[key]

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        """f32 values of a float tensor, or of its rows [start, stop)."""
        return self._shard(key).read(key, rows)

    def raw(self, key: str) -> Array:
        """A tensor in its stored type: packed words, codes."""
        return self._shard(key).raw(key)

    def include(self, name: str) -> list[str]:
        """Open one more file of the folder; the names of its tensors. Raises BadCheckpoint where it is absent
        or names one that another file has."""
        if not (self._folder / name).exists():
            raise BadCheckpoint(f"{self.model!r} lacks {name}; make the folder again")
        shard = self._open_shard(name)
        twice = sorted(shard.entries.keys() & self._where.keys())
        if twice:
            raise BadCheckpoint(f"{name} holds tensor {twice[0]!r}, which {WEIGHTS} has too")
        self._where |= dict.fromkeys(shard.entries, shard)
        return list(shard.entries)

    def close(self) -> None:
        for shard in self._open.values():
            shard.close()

    def _shard(self, key: str) -> Shard:
        try:
            return self._where[key]
        except KeyError:
            raise BadCheckpoint(
                f"tensor {key!r} is missing from {self.model!r}; {nearest(key, self._where)}"
            ) from None

    def _read(self) -> None:
        if (self._folder / WEIGHTS).exists():
            shard = self._open_shard(WEIGHTS)
            self._where = dict.fromkeys(shard.entries, shard)
            return
        path = contained(self._folder, INDEX)
        if not path.exists():
            raise BadCheckpoint(self._no_weights())
        self.files.append(INDEX)
        weight_map = parse_object(read_capped(path, MAX_INDEX), INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint(f"{INDEX} has no weight_map (an object: tensor -> file)")
        for key, name in weight_map.items():
            if not isinstance(name, str) or not _SHARD_NAME.match(name):
                raise BadCheckpoint(
                    f"{INDEX}: {key!r} names the file {name!r}; "
                    "expected a plain *.safetensors file name of the same folder"
                )
        absent = sorted(n for n in set(weight_map.values()) if not (self._folder / n).exists())
        if absent:
            raise BadCheckpoint(
                f"{self.model!r} lacks {', '.join(absent)}, named by its index; download it again"
            )
        for key, name in weight_map.items():
            shard = self._open.get(name) or self._open_shard(name)
            if key not in shard.entries:
                raise BadCheckpoint(f"{name} lacks tensor {key!r}, which the index places there")
            self._where[key] = shard

    def _open_shard(self, name: str) -> Shard:
        self._open[name] = shard = Shard(contained(self._folder, name), name)
        self.files.append(name)
        return shard

    def _no_weights(self) -> str:
        names = sorted(p.name for p in self._folder.iterdir())
        for name in names:
            if name.endswith(_PICKLES):
                return (
                    f"{self.model!r} has {name} but no {WEIGHTS}; such files may run code when "
                    "loaded and are never read; save the model with safe_serialization "
                    "(transformers: save_pretrained)"
                )
        return f"{self.model!r} has neither {WEIGHTS} nor {INDEX}"
