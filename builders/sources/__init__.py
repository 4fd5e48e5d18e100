"""Where checkpoints come from: one file a source. A Source gives f32 rows by tensor name, never code."""

from builders.sources.huggingface import Source, model_name, open_source, read_config
from builders.sources.vocabulary import read_vocabulary

__all__ = ["Source", "model_name", "open_source", "read_config", "read_vocabulary"]
