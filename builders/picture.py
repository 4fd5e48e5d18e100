"""Pictures as files: what can be known before the work is said before it; a file is whole, or as it was."""

from __future__ import annotations

import importlib.util
import io
import os
from pathlib import Path
from typing import Any

from edge_runtime.cli.output import progress
from edge_runtime.errors import BadConfig, BuildError, Unsupported

_SUFFIXES = (".svg", ".png")
_ROOM = 64 << 10  # bytes that a disk must take before the work; pictures of plans are about as large


def check_picture(path: Path) -> None:
    """Raise Unsupported without matplotlib, BadConfig for a name that is no picture's, or that cannot be
    written: the folder takes a file of a picture's size, which is removed again."""
    if path.suffix not in _SUFFIXES:
        raise BadConfig(f"picture {path.name!r:.60}: expected a file ending in {' or '.join(_SUFFIXES)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise Unsupported("drawing needs matplotlib: pip install 'edge-runtime[plot]'")
    try:
        if not path.parent.is_dir():
            raise BadConfig(f"picture {path}: {path.parent} is not a folder; make it first, or name another")
        if path.is_dir():
            raise BadConfig(f"picture {path}: this is a folder; name the file to draw")
        try:
            _temporary(path).write_bytes(bytes(_ROOM))
        finally:
            _temporary(path).unlink(missing_ok=True)
    except OSError as error:
        raise BadConfig(f"picture {path}: cannot be written there: {error.strerror}; name another") from None


def save_picture(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib. Raises BuildError; the file at `path` is then what it was before."""
    kind = path.suffix[1:]
    drawn = io.BytesIO()
    figure.savefig(drawn, format=kind, metadata={"Date": None} if kind == "svg" else None)
    try:
        try:
            _temporary(path).write_bytes(drawn.getbuffer())
            os.replace(_temporary(path), path)
        finally:
            _temporary(path).unlink(missing_ok=True)
    except OSError as error:
        raise BuildError(f"picture {path} cannot be written: {error.strerror}") from None


def save_beside(figure: Any, path: Path) -> None:
    """Write a figure in the middle of a build: where the disk no longer takes it, stderr says so, and the
    work of hours goes on."""
    try:
        save_picture(figure, path)
    except BuildError as error:
        progress(f"note: {error}; the build goes on without it")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")
