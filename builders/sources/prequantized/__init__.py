"""Checkpoints that are already quantized: `prequantized/<quant_method>.py` reads one way of storing them.

Such a module has `read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]`: the
tensors, by the names that they would have unquantized. Values are those of the method's own library.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from builders.model_config import ModelConfig
from builders.sources.matrix import Matrix
from builders.sources.shards import Shards
from edge_runtime.errors import BadCheckpoint, BadConfig, Unsupported, nearest

_PATH = "config.json: quantization_config"


def known_methods() -> list[str]:
    """Every quant_method that can be read: the file names of this folder, with dashes."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__))


def check_method(config: Any) -> str | None:
    """The quant_method of a `quantization_config`, None without one. Raises BadConfig, or Unsupported naming
    the known methods."""
    if config is None:
        return None
    if not isinstance(config, dict):
        raise BadConfig(f"{_PATH} is a JSON {type(config).__name__}, expected an object")
    method = config.get("quant_method")
    if method is None and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers reads configs older than quant_method
    known = known_methods()
    if method not in known:
        raise Unsupported(
            f"the checkpoint is quantized by {method!r}; {nearest(str(method), known)} "
            f"(known: {', '.join(known)}); give the original f16/bf16/f32 folder"
        )
    return str(method)


def read_matrices(config: dict[str, Any] | None, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """The quantized tensors of a folder. Raises BadCheckpoint naming the tensor, BadConfig the key."""
    method = check_method(config)
    if config is None or method is None:
        return {}
    reader = ModelConfig(config, _PATH)
    reader.ignore("quant_method")
    module = importlib.import_module(f"{__name__}.{method.replace('-', '_')}")
    matrices: dict[str, Matrix] = module.read(reader, shards, notices)
    if not matrices:
        raise BadCheckpoint(f"{_PATH} says {method}, but {shards.model!r} holds no tensor quantized so")
    strangers = sorted(set(config) - reader.known)
    if strangers:  # tools keep adding how a checkpoint was made; shapes and types say what it holds
        notices.append(f"{_PATH}: not known here and not obeyed: {', '.join(strangers)}")
    return matrices
