"""Files of a foreign folder, read strictly: they lie inside it, are regular, capped, and plain JSON.

Builders read checkpoints with it, the runtime PEFT folders.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from edge_runtime.errors import BadCheckpoint

MAX_CONFIG = 4 << 20
MAX_INDEX = 64 << 20
MAX_TOKENIZER = 128 << 20


def contained(folder: Path, name: str) -> Path:
    """`folder/name`, proved to stay inside the model.

    `folder` is resolved. A symlink may lead to another file of the folder or, in a Hugging Face cache
    (`<repo>/snapshots/<revision>`), to that repository's `blobs`; anything else is refused.
    """
    path = folder / name
    real = path.resolve()
    inside = real.is_relative_to(folder)
    if not inside and folder.parent.name == "snapshots":
        inside = real.is_relative_to(folder.parent.parent / "blobs")
    if not inside:
        raise BadCheckpoint(
            f"{name} in {folder.name!r} is a link out of the model folder; "
            "copy the file it leads to into the folder"
        )
    return path


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file; a FIFO, device or folder is a BadCheckpoint."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadCheckpoint(f"cannot read {path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise BadCheckpoint(f"{path} is not a regular file")
    return fd


def read_capped(path: Path, limit: int) -> bytes:
    """The whole file, at most `limit` bytes; a longer one is a BadCheckpoint."""
    with os.fdopen(open_regular(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise BadCheckpoint(f"{path.name} is larger than {limit >> 20} MiB, which no model needs")
    return data


def sha256_of(path: Path) -> str:
    """Hex digest of a regular file of any size."""
    sha = hashlib.sha256()
    with os.fdopen(open_regular(path), "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """A JSON object; `what` names it in errors. Raises BadCheckpoint."""
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
    except RecursionError:
        raise BadCheckpoint(f"{what} is nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise BadCheckpoint(f"{what} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise BadCheckpoint(f"{what} is a JSON {type(value).__name__}, expected an object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        twice = next(k for k, _ in pairs if k in seen or seen.add(k))  # type: ignore[func-returns-value]
        raise ValueError(f"key {twice!r} appears twice")
    return out


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")
