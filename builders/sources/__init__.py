"""Where checkpoints come from: one file a source. A Source gives tensors by name, never code."""

from builders.sources.huggingface import model_name
from builders.sources.opening import open_source, read_config
from builders.sources.source import Source
from builders.sources.vocabulary import read_vocabulary

__all__ = ["Source", "model_name", "open_source", "read_config", "read_vocabulary"]
