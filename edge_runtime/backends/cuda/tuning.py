"""Which of a product's kernels a device runs fastest: measured once, kept beside the engine.

All kernels of a matrix format give the same bits (kernels/cuda/linear.cuh), so that a choice changes time
alone. The file ENGINE.tuning.json belongs to one GPU, driver and device code; another's is left aside.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import msgspec

from edge_runtime.backends.cuda.driver import DeviceFacts
from edge_runtime.engine.device_code import SPLIT_BLOCKS, TOKEN_BLOCK
from edge_runtime.engine.launches import LinearLaunch
from edge_runtime.errors import BuildError

Form = Literal["split1", "deep", "split2", "split4", "tile"]
FORMS: tuple[Form, ...] = get_args(Form)
SUFFIX = ".tuning.json"
_LIMIT = 1 << 20  # bytes of a file that is read


class Tuning(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """device: name, sm and driver; code: digest of the device code; forms: `product_key` -> form."""

    device: str
    code: str
    forms: dict[str, Form] = msgspec.field(default_factory=dict)


def default_form(rows: int) -> Form:
    """Without measurements: the weights are read once as far as registers allow, then tiles."""
    blocks = next((n for n in SPLIT_BLOCKS if rows <= n * TOKEN_BLOCK), None)
    return "tile" if blocks is None else _split(blocks)


def candidates(rows: int) -> tuple[Form, ...]:
    """Forms worth a measurement for so many rows."""
    if rows <= TOKEN_BLOCK:
        return "split1", "deep"
    if rows <= 2 * TOKEN_BLOCK:
        return "split2", "split1", "tile"
    return "split4", "split2", "tile"


def product_key(launch: LinearLaunch, formats: Mapping[str, str], sizes: Mapping[str, int], rows: int) -> str:
    """A launch's name in a tuning: its format, the rows of its matrices, columns, and rows of inputs."""
    rows = max(rows, TOKEN_BLOCK)  # fewer run as one block
    matrices = "+".join(str(sizes[p.weight]) for p in launch.products)
    return f"{formats[launch.products[0].weight]} {matrices}x{launch.cols} at {rows}"


def tuning_path(engine: Path) -> Path:
    """Where an engine's tuning lies."""
    return engine.with_suffix(SUFFIX)


def identity(facts: DeviceFacts, image: bytes) -> tuple[str, str]:
    """(device, code) of a tuning that is of use here."""
    return str(facts), hashlib.sha256(image).hexdigest()


def read_tuning(path: Path, device: str, code: str) -> Tuning | None:
    """The tuning in a file, if it is one of this device and code; it only saves time, so none is no error."""
    try:
        if path.stat().st_size > _LIMIT:
            return None
        found = msgspec.json.decode(path.read_bytes(), type=Tuning)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return found if (found.device, found.code) == (device, code) else None


def write_tuning(path: Path, tuning: Tuning) -> None:
    """Put a tuning in place of what is there, whole or not at all. Raises BuildError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(tuning), indent=1))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise BuildError(f"{path} cannot be written: {error.strerror or error}") from error


def _split(blocks: int) -> Form:
    forms: dict[int, Form] = {1: "split1", 2: "split2", 4: "split4"}
    return forms[blocks]
