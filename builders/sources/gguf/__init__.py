"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), versions 2 and 3, little-endian.

A file of this kind is read by a reader of our own: the `gguf` package maps the whole file and believes its
counts, offsets and sizes (llama.cpp issue 25378), ours proves each against the file before it is used. The
package is what the tests compare with, value by value.
"""

from builders.sources.gguf.header import is_gguf
from builders.sources.gguf.source import GgufSource, read_gguf_config

__all__ = ["GgufSource", "is_gguf", "read_gguf_config"]
