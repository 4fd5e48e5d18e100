"""Folders that training writes, and what builders.qat puts into its own.

A folder of somebody else is refused before the work, and so is a disk without room. The result is written
beside under another name and takes the folder's place whole; until then an earlier result is what it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from builders.sources import Source
from builders.sources.prequantized.edge_qat import CONFIG, PLANES, SCHEMA, TrainedConfig
from builders.sources.shards import WEIGHTS
from builders.training import STATE
from edge_runtime.cli.output import size
from edge_runtime.engine.formats import Array, Planes, get_format
from edge_runtime.errors import BadConfig, BuildError

_ROOM = 64 << 10  # bytes for headers and small JSON files
Encoded = Mapping[str, tuple[str, Planes]]  # checkpoint name -> format and codec planes


@dataclass(frozen=True, slots=True)
class Kind:
    """What one command writes: all of its file names, and whether a folder of them is a result of it."""

    command: str
    files: tuple[str, ...]
    made: Callable[[Path], bool]


class TrainedFolder:
    """Where the result of a run goes; `state` is its file for an interrupted one. Use as a context manager:
    leaving without a result leaves no empty folder behind.

    Raises BadConfig where the folder is not for this command to replace: `model`, which is only read, or one
    that holds anything but an earlier result.
    """

    def __init__(self, path: Path, kind: Kind, model: Path) -> None:
        self.path = path
        self._kind = kind
        self._at = path.resolve()
        self._refuse(model.resolve())
        self._new = self._at.with_name(f".{self._at.name}.training-new")
        self._old = self._at.with_name(f".{self._at.name}.training-old")
        self._made = False
        self.state = self._at / STATE
        for place in (self._at, self._old, self._new):
            self._refuse_foreign(place)

    def __enter__(self) -> TrainedFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._made:
            with suppress(OSError):  # a state or a result is in it
                self._at.rmdir()

    def prepare(self, result: int, state: int) -> None:
        """Make the folder. Raises BuildError where it, or its new content beside it, cannot be written, or
        where the disk does not hold what will be there at once: these bytes, and a state while it is replaced
        by the next."""
        try:
            self._recover()
            self._made = not self._at.exists()
            self._at.mkdir(parents=True, exist_ok=True)
            self._new.mkdir()
            self._new.rmdir()
            there = self.state.stat().st_size if self.state.exists() else 0
            free = shutil.disk_usage(self._at).free
        except OSError as error:
            raise BuildError(f"{self.path} cannot be written: {error.strerror or error}") from None
        need = max(result + _ROOM, state) + max(state - there, 0)
        if free < need:
            raise BuildError(
                f"{self.path} has {size(free)} free, the training needs {size(need)} ({size(result)} for the "
                "result, the rest for its state); make room or choose another -o"
            )

    @contextmanager
    def replacing(self) -> Iterator[Path]:
        """A folder to write the result into; it takes the place of what was there, the state included, when
        that is done. Raises BuildError where the disk does not take it; all is then as it was."""
        try:
            self._new.mkdir()
            shutil.copymode(self._at, self._new)
            yield self._new
            for file in self._new.iterdir():
                _sync(file)
            _sync(self._new)
            self._swap()
        except (OSError, SafetensorError) as error:
            kept = ", which goes on from its last state" if self.state.exists() else ""
            raise BuildError(
                f"{self.path} could not be written: {getattr(error, 'strerror', None) or error}; what was "
                f"there is as it was; make room and repeat the command{kept}"
            ) from None
        finally:
            shutil.rmtree(self._new, ignore_errors=True)

    def _swap(self) -> None:
        os.rename(self._at, self._old)
        try:
            os.rename(self._new, self._at)
        finally:
            if not self._at.exists():
                os.rename(self._old, self._at)
        shutil.rmtree(self._old, ignore_errors=True)
        _sync(self._at.parent)

    def _recover(self) -> None:
        """Finish what a run left that was killed while it put its result in place."""
        shutil.rmtree(self._new, ignore_errors=True)
        if self._old.exists() and not self._at.exists():
            os.rename(self._old, self._at)
        shutil.rmtree(self._old, ignore_errors=True)

    def _refuse(self, model: Path) -> None:
        if self._at == model:
            raise BadConfig(f"-o {self.path} is the model itself, which is only read; choose another folder")
        if model.is_dir() and self._at.is_relative_to(model):
            raise BadConfig(f"-o {self.path} lies inside the model, which is only read; choose another")
        if self._at.exists() and not self._at.is_dir():
            raise BadConfig(f"-o {self.path} is a file; give a folder")
        if os.path.ismount(self._at) or self._at == Path.cwd():
            why = "the folder this runs in" if self._at == Path.cwd() else "a mount point"
            raise BadConfig(
                f"-o {self.path} is {why}, which cannot be replaced as a whole; give a folder in it, such as "
                f"{self.path / 'trained'}"
            )

    def _refuse_foreign(self, place: Path) -> None:
        """Nothing is written over, or removed with an earlier result, that this command did not write."""
        try:
            found = sorted(p.name for p in place.iterdir()) if place.is_dir() else []
        except OSError as error:
            raise BadConfig(f"-o {self.path} cannot be read: {error.strerror}") from None
        own = {*self._kind.files, STATE}
        halves = {Path(STATE).with_suffix(".part").name, *(f"{name}.part" for name in own)}
        results = [name for name in found if name != STATE and name not in halves]
        strange = [name for name in results if name not in own]
        if not strange and place == self._at and results and not self._kind.made(place):
            strange = results
        if strange:
            raise BadConfig(
                f"-o {place if place != self._at else self.path} holds {strange[0]!r}, and is no earlier "
                f"result of {self._kind.command}; give an empty or a new folder"
            )


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# --- of builders.qat ----------------------------------------------------------------------------------------

_JSON = ("config.json", "generation_config.json", "tokenizer_config.json")
TRAINED = Kind(
    "builders.qat",
    (*_JSON, "tokenizer.json", CONFIG, PLANES, WEIGHTS),
    lambda folder: (folder / CONFIG).exists(),
)


def write_trained(folder: Path, source: Source, encoded: Encoded, plain: Mapping[str, Array]) -> None:
    """A Hugging Face folder, that of `source` with these tensors in place of its own, which every reader
    takes as plain f32 weights; beside them the codec's planes, from which edge-build writes the very codes
    that were trained. `plain`: f32, not quantized."""
    folder.mkdir(parents=True, exist_ok=True)
    config = dict(source.config) | {"dtype": "float32", "torch_dtype": "float32"}
    tokenizer = dict(source.tokenizer_config)
    if source.chat_template is not None:
        tokenizer["chat_template"] = source.chat_template
    (folder / "tokenizer.json").write_bytes(source.tokenizer_json)
    for name, values in zip(_JSON, (config, source.generation_config, tokenizer), strict=True):
        if values:
            (folder / name).write_bytes(_json(values))
    planes = {f"{key}#{p}": data for key, (_, found) in encoded.items() for p, data in found.items()}
    _save(folder / PLANES, planes)
    said = TrainedConfig(schema=SCHEMA, formats={key: name for key, (name, _) in encoded.items()})
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(said), indent=1) + b"\n")
    tensors = {key: np.asarray(values) for key, values in plain.items()}
    for key, (name, found) in encoded.items():
        tensors[key] = get_format(name).decode(found, *source.shape(key))
    _save(folder / WEIGHTS, tensors, {"format": "pt"})


def trained_nbytes(source: Source, formats: Mapping[str, str], tensors: Mapping[str, int]) -> int:
    """Bytes of what `write_trained` writes. formats: of quantized tensors; tensors: how many values each."""
    planes = sum(get_format(name).nbytes(*source.shape(key)) for key, name in formats.items())
    return 4 * sum(tensors.values()) + planes + len(source.tokenizer_json)


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _save(path: Path, tensors: Mapping[str, Array], metadata: dict[str, str] | None = None) -> None:
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata=metadata)
    path.chmod(0o644)  # safetensors writes it for its owner alone
