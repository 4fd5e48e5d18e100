"""Hugging Face model folders: config.json, (sharded) safetensors, tokenizer.json, chat template.

Nothing of a folder is ever executed: no pickle, no `auto_map` code, no template. Names that come from inside
a JSON file may not leave the folder. Spec: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from edge_runtime.engine.folder import (
    MAX_CONFIG,
    MAX_INDEX,
    MAX_TOKENIZER,
    contained,
    open_regular,
    parse_object,
    read_capped,
    sha256_of,
)
from edge_runtime.engine.shard import Array, Entry, Shard, sniff
from edge_runtime.errors import BadCheckpoint, Unsupported, nearest

_SHARD_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\.safetensors$")
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".msgpack", ".h5")
_MAX_TEMPLATE = 1 << 20


class Source:
    """An open model folder. Tensors are read on demand, in f32, whole or by rows; `close` when done.

    config, generation_config, tokenizer_config: dicts ({} when the file is absent); tokenizer_json: bytes;
    chat_template: text or None; notices: what the user should know (code in the folder that was not run, …).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = model_name(self.folder)
        self.notices: list[str] = []
        self._files: list[str] = []
        self._digests: dict[str, str] = {}
        self._shards: dict[str, Shard] = {}
        self._where: dict[str, Shard] = {}
        if not self.folder.is_dir():
            raise BadCheckpoint(
                f"{folder} is not a folder; give a Hugging Face model folder (with config.json)"
            )
        self.config = check_config(self._json("config.json", required=True), self.notices)
        self.generation_config = self._json("generation_config.json")
        self.tokenizer_config = self._json("tokenizer_config.json")
        self.tokenizer_json = self._tokenizer()
        self.chat_template = self._template()
        try:
            self._open_weights()
        except BaseException:
            self.close()
            raise

    def keys(self) -> list[str]:
        return sorted(self._where)

    def entry(self, key: str) -> Entry:
        """dtype and shape of a tensor. Raises BadCheckpoint naming the nearest key."""
        return self._shard(key).entries[key]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {key: shard.entries[key].shape for key, shard in self._where.items()}

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        """f32 values of a tensor (or rows [start, stop) of it), freshly read. Raises BadCheckpoint."""
        return self._shard(key).read(key, rows)

    def sha256(self) -> dict[str, str]:
        """Hex digest of every file that the build reads, by file name."""
        if not self._digests:
            self._digests = {name: sha256_of(contained(self.folder, name)) for name in sorted(self._files)}
        return dict(self._digests)

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _shard(self, key: str) -> Shard:
        try:
            return self._where[key]
        except KeyError:
            raise BadCheckpoint(
                f"tensor {key!r} is missing from {self.name!r}; {nearest(key, self._where)}"
            ) from None

    def _read(self, name: str, limit: int) -> bytes | None:
        path = contained(self.folder, name)
        if not path.exists():
            return None
        self._files.append(name)
        return read_capped(path, limit)

    def _json(self, name: str, *, required: bool = False) -> dict[str, Any]:
        data = self._read(name, MAX_CONFIG)
        if data is None:
            if required:
                raise BadCheckpoint(f"{self.folder} has no {name}; give the folder that holds it")
            return {}
        return parse_object(data, name)

    def _tokenizer(self) -> bytes:
        data = self._read("tokenizer.json", MAX_TOKENIZER)
        if data is None:
            raise BadCheckpoint(
                f'{self.folder} has no tokenizer.json; make one with: python -c "from transformers import '
                "AutoTokenizer as T; T.from_pretrained('IN').save_pretrained('IN')\""
            )
        parse_object(data, "tokenizer.json")
        return data

    def _template(self) -> str | None:
        data = self._read("chat_template.jinja", _MAX_TEMPLATE)
        if data is not None:
            try:
                return data.decode("utf-8")
            except UnicodeDecodeError:
                raise BadCheckpoint("chat_template.jinja is not UTF-8 text") from None
        found = self._json("chat_template.json").get(
            "chat_template", self.tokenizer_config.get("chat_template")
        )
        if isinstance(found, list):  # several named templates; "default" is the one for plain chat
            named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
            found = named.get("default", next(iter(named.values()), None))
        if found is not None and not isinstance(found, str):
            raise BadCheckpoint(f"chat_template is a JSON {type(found).__name__}, expected text")
        return found

    def _open_weights(self) -> None:
        if (self.folder / "model.safetensors").exists():
            shard = self._open_shard("model.safetensors")
            self._where = dict.fromkeys(shard.entries, shard)
            return
        data = self._read("model.safetensors.index.json", MAX_INDEX)
        if data is None:
            raise BadCheckpoint(self._no_weights())
        index = parse_object(data, "model.safetensors.index.json")
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadCheckpoint("model.safetensors.index.json has no weight_map (an object: tensor -> file)")
        for key, name in weight_map.items():
            if not isinstance(name, str) or not _SHARD_NAME.match(name):
                raise BadCheckpoint(
                    f"model.safetensors.index.json: {key!r} names the file {name!r}; "
                    "expected a plain *.safetensors file name of the same folder"
                )
        absent = sorted(n for n in set(weight_map.values()) if not (self.folder / n).exists())
        if absent:
            raise BadCheckpoint(
                f"{self.name!r} lacks {', '.join(absent)}, named by its index; download it again"
            )
        for key, name in weight_map.items():
            shard = self._shards.get(name) or self._open_shard(name)
            if key not in shard.entries:
                raise BadCheckpoint(f"{name} lacks tensor {key!r}, which the index places there")
            self._where[key] = shard

    def _open_shard(self, name: str) -> Shard:
        self._shards[name] = shard = Shard(contained(self.folder, name), name)
        self._files.append(name)
        return shard

    def _no_weights(self) -> str:
        names = sorted(p.name for p in self.folder.iterdir())
        for name in names:
            if name.endswith(_PICKLES):
                return (
                    f"{self.name!r} has {name} but no model.safetensors; such files may run code when "
                    "loaded and are never read; save the model with safe_serialization "
                    "(transformers: save_pretrained)"
                )
        return f"{self.name!r} has neither model.safetensors nor model.safetensors.index.json"


def open_source(path: str | Path) -> Source:
    """Open a model folder. Raises BadCheckpoint, or Unsupported for one that is already quantized."""
    path = Path(path)
    if path.is_file():
        fd = open_regular(path)
        try:
            sniff(os.pread(fd, 64, 0), path.name)
        finally:
            os.close(fd)
        raise BadCheckpoint(f"{path} is a file; give the model folder that holds it")
    return Source(path)


def read_config(path: str | Path) -> tuple[dict[str, Any], str]:
    """(config, model name) of a folder or a config.json, without touching weights. Raises BadCheckpoint."""
    path = Path(path)
    if path.is_dir():
        folder = path.resolve()
        file = contained(folder, "config.json")
    else:
        file = path.resolve()
        folder = file.parent
    if not file.exists():
        raise BadCheckpoint(f"{path} has no config.json; give a model folder or a config.json")
    return check_config(parse_object(read_capped(file, MAX_CONFIG), file.name), []), model_name(folder)


def model_name(folder: Path) -> str:
    """The folder's name; for a Hugging Face cache (models--org--name/snapshots/<hash>) ``org--name``."""
    folder = folder.resolve()
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--")
    return folder.name


def check_config(config: dict[str, Any], notices: list[str]) -> dict[str, Any]:
    """Refuse what cannot be read rightly; note what is not obeyed. Returns `config`."""
    if "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        raise Unsupported(
            f"the checkpoint is already quantized ({method}); give the original f16/bf16/f32 folder"
        )
    if "auto_map" in config or config.get("trust_remote_code"):
        notices.append(
            "config.json names code (auto_map); it was not run, the model is read by its model_type"
        )
    return config
