"""Model architectures: `archs/<model_type>.py` is all it takes to add one.

Such a module has `read(config: ModelConfig, context: int) -> Architecture`; `context` is the longest
sequence, in tokens, that the engine is planned for.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from builders.architecture import Architecture, TensorSource
from builders.model_config import ModelConfig
from edge_runtime.errors import BadConfig, Unsupported, nearest

__all__ = ["Architecture", "TensorSource", "known_architectures", "read_program"]


def known_architectures() -> list[str]:
    """Every model_type that can be built: the file names of this folder."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def read_program(config: dict[str, Any], *, context: int | None = None) -> Architecture:
    """The Program of a Hugging Face config, and where each of its tensors comes from.

    `context` (tokens planned for, default the model's longest) matters where a model computes otherwise
    beyond a length (longrope). Raises BadConfig by key, Unsupported for an unknown model_type or trait.
    """
    reader = ModelConfig(config)
    model_type = reader.read(str, "model_type")
    longest = reader.size("max_position_embeddings") if "max_position_embeddings" in config else None
    known = known_architectures()
    if model_type not in known:  # so only the name of a file that is there reaches the import system
        raise Unsupported(
            f"architecture {model_type!r} is not supported; {nearest(model_type, known)} "
            f"(known: {', '.join(known)}; add one as builders/archs/<model_type>.py)"
        )
    if context is not None and not 1 <= context <= (longest or context):
        raise BadConfig(f"a context of {context} tokens is planned, the model allows 1 to {longest}")
    module = importlib.import_module(f"{__name__}.{model_type}")
    architecture: Architecture = module.read(reader, context or longest or 0)
    reader.finish()
    return architecture
