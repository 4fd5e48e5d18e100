"""A calibration on disk: one file of statistics a segment, and the rows that the next segment begins with.

Every file appears whole or not at all (written beside, synced, renamed), and in an order that lets a run that
was killed at any point go on: rows of segment i, then its statistics, then the rows of i - 1 are removed.
What the statistics are of stands in `calibration.json`; a folder of anything else is refused. Rows that no
later run goes on from lie in folders of known names, which go when the folder is opened again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from edge_runtime.engine.folder import MAX_INDEX, read_capped, sha256_of
from edge_runtime.engine.formats import Array
from edge_runtime.errors import BadCheckpoint, BadConfig, BuildError

MANIFEST, DONE, LOCK = "calibration.json", "complete.json", "lock"
FEEDBACK, IMPORTANCE = "feedback-rows", "importance-rows"  # folders of rows, see passing_rows
SCHEMA = 1
_BEFORE = (LOCK, f"{MANIFEST}.part", FEEDBACK, IMPORTANCE)  # what may be there with no manifest
_DTYPES = {"float16": "F16", "float32": "F32"}


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What statistics depend on. Of the same identity (on one kind of machine) are the same bytes."""

    schema: int
    model_sha256: dict[str, str]  # files of the checkpoint
    program_sha256: str
    weights: str  # what was done to the checkpoint's weights before, "" for nothing
    text: str
    text_sha256: str
    samples: int
    length: int
    seed: int
    device: str  # cpu or cuda
    torch: str


class FolderLock:
    """A folder, made where it is absent, that no other process has until `close`. Raises BuildError where
    another has it, or it cannot be made."""

    def __init__(self, path: Path) -> None:
        self._fd = -1
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(self._fd).st_nlink == 0:  # whoever had it removed it between the two calls above
                raise BlockingIOError
        except BlockingIOError:
            self.close()
            raise BuildError(f"{path} is being calibrated in by another process; wait for it") from None
        except OSError as error:
            self.close()
            raise _unusable(path, error) from None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class CalibrationFolder:
    """An open folder, held by this process alone until `close`. Raises BadConfig where it is of another
    identity, naming the difference, and BuildError where it cannot be written or another process has it."""

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        self.identity = identity
        refuse_other(path, {})
        self._lock = FolderLock(path)
        try:
            _wipe(path)
            self._claim()
        except OSError as error:
            self.close()
            raise _unusable(path, error) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._lock.close()

    def __enter__(self) -> CalibrationFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def segment(self, i: int) -> Path:
        return self.path / f"segment-{i:04d}.safetensors"

    def rows(self, i: int) -> Path:
        """f32 rows of every token after segment i, (samples, length, width)."""
        return self.path / f"rows-{i:04d}.f32"

    def finished(self, segments: int) -> int:
        """How many of the first segments have their statistics."""
        return next((i for i in range(segments) if not self.segment(i).exists()), segments)

    def save(self, i: int, arrays: Mapping[str, Array]) -> None:
        """Statistics of segment i. The rows before it are then needed no more."""
        with self.replacing(self.segment(i)) as file:
            write_safetensors(file, arrays)
        self.rows(i - 1).unlink(missing_ok=True)

    @contextmanager
    def replacing(self, path: Path) -> Iterator[BinaryIO]:
        """A file that takes its name once all of it is on the disk. Raises BuildError naming the reason."""
        part = path.with_name(f"{path.name}.part")
        try:
            with open(part, "wb", buffering=1 << 20) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
            self._sync()
        except OSError as error:
            part.unlink(missing_ok=True)
            raise BuildError(f"{path} could not be written: {error.strerror or error}") from None

    def finish(self, segments: int) -> str:
        """Remove what only a resumed run needs; the digest of all statistics. Also of a folder that was whole
        before: a file changed since then is a BadConfig."""
        digests = {self.segment(i).name: sha256_of(self.segment(i)) for i in range(segments)}
        data = json.dumps(digests, indent=1).encode()
        done = self.path / DONE
        if not done.exists():
            with self.replacing(done) as file:
                file.write(data)
        elif done.read_bytes() != data:
            raise BadConfig(
                f"{self.path}: a file of statistics has changed since it was written; "
                "remove the folder and calibrate again"
            )
        for path in (*self.path.glob("rows-*.f32"), *self.path.glob("*.part")):
            path.unlink(missing_ok=True)
        return hashlib.sha256(msgspec.json.encode(self.identity) + data).hexdigest()

    def remove(self) -> None:
        """Delete everything that a calibration writes, and the folder if nothing else is in it."""
        forget(self.path)
        self.close()

    def _claim(self) -> None:
        """Write the identity, or compare it with the one that is there."""
        path = self.path / MANIFEST
        if not path.exists():
            with self.replacing(path) as file:
                file.write(msgspec.json.format(msgspec.json.encode(self.identity), indent=1))
            return
        refuse_other(self.path, msgspec.structs.asdict(self.identity))

    def _sync(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def refuse_other(path: Path, known: Mapping[str, object]) -> None:
    """Raise BadConfig where a folder is of something else, so that nothing is written there: of no
    calibration, or of one that differs in what is `known` of the Identity, by field."""
    try:
        names = sorted(p.name for p in path.iterdir() if p.name not in _BEFORE)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _unusable(path, error) from None
    if MANIFEST not in names:
        if names:
            raise BadConfig(f"{path} holds {names[0]!r} and no {MANIFEST}; give an empty or a new folder")
        return
    try:
        found = msgspec.json.decode(read_capped(path / MANIFEST, MAX_INDEX), type=Identity)
    except (msgspec.MsgspecError, BadCheckpoint) as error:
        raise BadConfig(f"{path / MANIFEST} is no manifest of a calibration: {error}") from None
    for name in (field for field in Identity.__struct_fields__ if field in known):
        have, want = getattr(found, name), known[name]
        if have != want:
            raise BadConfig(
                f"{path} was made for another {name.replace('_', ' ')}: {_short(have, want)}; "
                "give another --calibration-folder, or remove this one"
            )


def _unusable(path: Path, error: OSError) -> BuildError:
    return BuildError(f"{path} cannot be used for a calibration: {error.strerror}")


def _short(have: object, want: object) -> str:
    """The two values, of dicts only what differs."""
    if isinstance(have, dict) and isinstance(want, dict):
        names = sorted(k for k in have.keys() | want.keys() if have.get(k) != want.get(k))
        return f"{', '.join(names[:3])} differ"
    return f"{str(have)[:60]!r}, and this is {str(want)[:60]!r}"


def write_safetensors(file: BinaryIO, arrays: Mapping[str, Array]) -> None:
    """Array by array, for the library's writer would hold all of them once more."""
    header: dict[str, object] = {}
    at = 0
    for name, array in arrays.items():
        header[name] = {
            "dtype": _DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for array in arrays.values():
        file.write(memoryview(np.ascontiguousarray(array).data).cast("B"))


@contextmanager
def passing_rows(folder: Path, name: str) -> Iterator[Path]:
    """A new folder, FEEDBACK or IMPORTANCE, in a calibration's, and gone afterwards: whoever opens the
    calibration next removes what a killed process left of it."""
    path = folder / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _wipe(path: Path) -> None:
    for name in (FEEDBACK, IMPORTANCE):
        if (path / name).exists():
            shutil.rmtree(path / name)


def forget(path: Path) -> None:
    """Delete everything that a calibration writes in a folder that nobody else holds, and the folder if
    nothing else is in it."""
    _wipe(path)
    for pattern in (
        DONE,
        "segment-*.safetensors",
        "rows-*.f32",
        "sensitivity-*",
        "tuning.*",
        "row-importance.*",
        "*.part",
        MANIFEST,
        LOCK,
    ):
        for file in path.glob(pattern):
            file.unlink(missing_ok=True)
    with suppress(OSError):
        path.rmdir()
