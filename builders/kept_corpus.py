"""Windows that a model wrote itself, kept in a file for a build that goes on and for others of that model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from edge_runtime.engine.formats import Array
from edge_runtime.errors import BuildError

OWN_TEXT = "own-text.safetensors"


def kept(path: Path | None, subject: Mapping[str, Any], make: Callable[[], Array]) -> Array:
    """The windows of the file, if it is of the same subject and whole; else made, and written there.

    A file of another subject is replaced. Raises BuildError where the disk does not take it.
    """
    if path is None:
        return make()
    said = json.dumps(subject, sort_keys=True)
    found = _read(path, said)
    if found is not None:
        return found
    windows = make()
    part = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"windows": np.ascontiguousarray(windows, np.int32)}, part, metadata={"subject": said})
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise BuildError(f"{path} could not be written: {error}") from None
    return windows


def _read(path: Path, said: str) -> Array | None:
    """None for a file that is absent, damaged, or of something else."""
    try:
        with safe_open(path, "numpy") as file:
            if (file.metadata() or {}).get("subject") != said or list(file.keys()) != ["windows"]:
                return None
            windows: Array = file.get_tensor("windows")
    except (OSError, SafetensorError):
        return None
    return windows if windows.dtype == np.int32 and windows.ndim == 2 else None
