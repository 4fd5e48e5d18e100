"""Writes what builders.qat trained: a Hugging Face folder that every reader takes as plain f32 weights, and
beside them the codec's planes, from which edge-build writes the very codes that were trained.

Each file appears whole or not at all, the weights last, so that a folder with weights is a whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file

from builders.sources import Source
from builders.sources.prequantized.edge_qat import CONFIG, PLANES, SCHEMA, TrainedConfig
from builders.sources.shards import WEIGHTS
from edge_runtime.engine.formats import Array, Planes, get_format

Encoded = Mapping[str, tuple[str, Planes]]  # checkpoint name -> format and codec planes


def write_trained(folder: Path, source: Source, encoded: Encoded, plain: Mapping[str, Array]) -> None:
    """The folder of `source` with these tensors in place of its own. `plain`: f32, not quantized."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(source.config) | {"dtype": "float32", "torch_dtype": "float32"}
    _write(folder / "config.json", _json(config))
    _write(folder / "tokenizer.json", source.tokenizer_json)
    tokenizer = dict(source.tokenizer_config)
    if source.chat_template is not None:
        tokenizer["chat_template"] = source.chat_template
    for name, values in (
        ("generation_config.json", source.generation_config),
        ("tokenizer_config.json", tokenizer),
    ):
        if values:
            _write(folder / name, _json(values))
    planes = {f"{key}#{p}": data for key, (_, found) in encoded.items() for p, data in found.items()}
    _save(folder / PLANES, planes)
    said = TrainedConfig(schema=SCHEMA, formats={key: name for key, (name, _) in encoded.items()})
    _write(folder / CONFIG, msgspec.json.format(msgspec.json.encode(said), indent=1) + b"\n")
    tensors = {key: np.asarray(values) for key, values in plain.items()}
    for key, (name, found) in encoded.items():
        tensors[key] = get_format(name).decode(found, *source.shape(key))
    _save(folder / WEIGHTS, tensors, {"format": "pt"})


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _write(path: Path, data: bytes) -> None:
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def _save(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    part = path.with_name(f"{path.name}.part")
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, part, metadata=metadata)
    part.chmod(0o644)  # safetensors writes it for its owner alone
    os.replace(part, path)
