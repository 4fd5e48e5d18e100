"""Which kind of checkpoint a path is: told by what is in the file, not by its name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from builders.sources.gguf import GgufSource, is_gguf, read_gguf_config
from builders.sources.huggingface import QUANTIZATION, HuggingFaceSource, check_config, model_name
from builders.sources.source import Source
from edge_runtime.engine.folder import MAX_CONFIG, contained, open_regular, parse_object, read_capped
from edge_runtime.engine.shard import sniff
from edge_runtime.errors import BadCheckpoint


def open_source(path: str | Path) -> Source:
    """Open a model folder, or a GGUF file whatever its name. Raises BadCheckpoint; Unsupported for a way of
    quantizing that no importer here reads."""
    path = Path(path)
    if not path.is_file():
        return HuggingFaceSource(path)
    if is_gguf(path):
        return GgufSource(path)
    fd = open_regular(path)
    try:
        sniff(os.pread(fd, 64, 0), path.name)
    finally:
        os.close(fd)
    raise BadCheckpoint(f"{path} is a file; give the model folder that holds it")


def read_config(path: str | Path) -> tuple[dict[str, Any], str]:
    """(config, model name) of a folder, a config.json or a GGUF file, without touching weights.

    Raises BadCheckpoint, Unsupported.
    """
    path = Path(path)
    if path.is_file() and is_gguf(path):
        return read_gguf_config(path), path.stem
    if path.is_dir():
        folder = path.resolve()
        file = contained(folder, "config.json")
    else:
        file = path.resolve()
        folder = file.parent
    if not file.exists():
        raise BadCheckpoint(f"{path} has no config.json; give a model folder or a config.json")
    config = check_config(parse_object(read_capped(file, MAX_CONFIG), file.name), [])
    return {key: value for key, value in config.items() if key != QUANTIZATION}, model_name(folder)
