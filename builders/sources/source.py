"""Source: what every kind of checkpoint gives to a build, whatever its files look like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from builders.sources.matrix import Home, Matrix, Stored
from edge_runtime.engine.folder import sha256_of
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, nearest


class Source(ABC):
    """An open checkpoint. Tensors are read on demand, in f32, whole or by rows; `close` when done.

    config, generation_config, tokenizer_config: dicts ({} when there is none), in Hugging Face's words;
    tokenizer_json: bytes; chat_template: text or None; notices: what the user should know (code in the folder
    that was not run, …). matrices: the tensors that are already quantized.
    """

    name: str
    notices: list[str]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    tokenizer_json: bytes
    chat_template: str | None
    matrices: Mapping[str, Matrix]
    _last: Matrix | None = None

    @property
    def quantized(self) -> bool:
        """Whether the checkpoint holds tensors that are already quantized."""
        return bool(self.matrices)

    def keys(self) -> list[str]:
        return sorted(self.shapes())

    def shape(self, key: str) -> tuple[int, ...]:
        """Raises BadCheckpoint naming the nearest key."""
        try:
            return self.shapes()[key]
        except KeyError:
            raise BadCheckpoint(
                f"tensor {key!r} is missing from {self.name!r}; {nearest(key, self.shapes())}"
            ) from None

    def tensor(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        """f32 values of a tensor (or rows [start, stop) of it), freshly read. Raises BadCheckpoint."""
        if key not in self.matrices:
            return self.floats(key, rows)
        matrix = self._matrix(key)
        start, stop = rows or (0, matrix.shape[0])
        if not 0 <= start <= stop <= matrix.shape[0]:
            raise BadCheckpoint(
                f"tensor {key!r} has shape {matrix.shape}; rows {start} to {stop} do not exist"
            )
        return matrix.values(start, stop)

    def stored(self, key: str) -> Stored | None:
        """A quantized tensor's planes, columns in the order of its `matrix.order`; None for other tensors."""
        return self._matrix(key).stored() if key in self.matrices else None

    def home(self, key: str) -> Home:
        """The format that `stored` gives a quantized tensor in."""
        return self._matrix(key).home()

    def orders(self) -> dict[str, Array]:
        """Quantized tensor -> input of each column, of those that are in another order than their inputs."""
        return {key: m.order for key, m in self.matrices.items() if m.order is not None}

    @abstractmethod
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Tensor -> shape, (outputs, inputs) for matrices."""

    @abstractmethod
    def floats(self, key: str, rows: tuple[int, int] | None = None) -> Array:
        """f32 values of a tensor that is not quantized."""

    @abstractmethod
    def float_format(self, key: str) -> str:
        """f32, f16 or bf16: the format that holds a tensor that is not quantized exactly."""

    @abstractmethod
    def files(self) -> dict[str, Path]:
        """Every file that the build reads, by file name."""

    def sha256(self) -> dict[str, str]:
        """Hex digest of every one of `files`, by file name."""
        return dict(self._digests)

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Several phases of a build ask, and a checkpoint of gigabytes is to be read for it once."""
        return {name: sha256_of(path) for name, path in self.files().items()}

    @abstractmethod
    def close(self) -> None: ...

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _matrix(self, key: str) -> Matrix:
        """Only the last one asked for keeps its codes and scales."""
        matrix = self.matrices[key]
        if self._last is not matrix:
            if self._last is not None:
                self._last.forget()
            self._last = matrix
        return matrix
