"""Hugging Face model folders: config.json, (sharded) safetensors, tokenizer.json, chat template.

Nothing of a folder is ever executed: no pickle, no `auto_map` code, no template. Names that come from inside
a JSON file may not leave the folder. Spec: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builders.sources.prequantized import check_method, read_matrices
from builders.sources.shards import Shards
from builders.sources.source import Source
from edge_runtime.engine.folder import (
    MAX_CONFIG,
    MAX_TOKENIZER,
    contained,
    parse_object,
    read_capped,
)
from edge_runtime.engine.shard import Array
from edge_runtime.errors import BadCheckpoint

QUANTIZATION = "quantization_config"
# Files of their own beside the config, and what shows that they are obeyed: a tensor whose name ends so
SIDE_FILES = {
    "edge_qat.json": ("edge-qat", ""),
    "quantize_config.json": ("gptq", ".qweight"),
    "quant_config.json": ("awq", ".qweight"),
}
_MAX_TEMPLATE = 1 << 20


class HuggingFaceSource(Source):
    """An open model folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.name = model_name(self.folder)
        self.notices: list[str] = []
        self._files: list[str] = []
        if not self.folder.is_dir():
            raise BadCheckpoint(
                f"{folder} is not a folder; give a Hugging Face model folder (with config.json)"
            )
        config = check_config(self._json("config.json", required=True), self.notices)
        self.config = {key: value for key, value in config.items() if key != QUANTIZATION}
        self.generation_config = self._json("generation_config.json")
        self.tokenizer_config = self._json("tokenizer_config.json")
        self.tokenizer_json = self._tokenizer()
        self.chat_template = self._template()
        self._shards = Shards(self.folder, self.name)
        try:
            self.matrices = read_matrices(self._quantization(config), self._shards, self.notices)
        except BaseException:
            self.close()
            raise
        free = (key for key in self._shards if key not in self._shards.taken)
        self._shapes = {key: self._shards.entry(key).shape for key in free}
        self._shapes |= {key: matrix.shape for key, matrix in self.matrices.items()}

    def _quantization(self, config: dict[str, Any]) -> dict[str, Any] | None:
        """`quantization_config`, or the file of its own that builders.qat and older tools write."""
        if config.get(QUANTIZATION) is not None:
            return config[QUANTIZATION]
        for name, (method, ending) in SIDE_FILES.items():
            found = self._json(name)
            if found and any(key.endswith(ending) for key in self._shards):
                return {"quant_method": method} | found
        return None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def floats(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        return self._shards.tensor(key, rows)

    def float_format(self, key: str) -> str:
        return {"F16": "f16", "BF16": "bf16"}.get(self._shards.entry(key).dtype, "f32")

    def files(self) -> dict[str, Path]:
        return {name: contained(self.folder, name) for name in sorted({*self._files, *self._shards.files})}

    def close(self) -> None:
        self._shards.close()

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


def model_name(folder: Path) -> str:
    """The folder's name; for a Hugging Face cache (models--org--name/snapshots/<hash>) ``org--name``. For a
    file its name without the ending."""
    folder = folder.resolve()
    if folder.is_file():
        return folder.stem
    if folder.parent.name == "snapshots":
        return folder.parent.parent.name.removeprefix("models--")
    return folder.name


def check_config(config: dict[str, Any], notices: list[str]) -> dict[str, Any]:
    """Refuse what cannot be read rightly; note what is not obeyed. Returns `config`."""
    check_method(config.get(QUANTIZATION))
    if "auto_map" in config or config.get("trust_remote_code"):
        notices.append(
            "config.json names code (auto_map); it was not run, the model is read by its model_type"
        )
    return config
