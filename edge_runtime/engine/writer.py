"""Atomic writer of engine files: a temporary file in the same folder, fsynced, renamed, folder fsynced.

Planes stream to disk as they are made, so a build never holds a whole model. Until `finish` returns, the
target is what it was before; a temporary file that a killed build left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import mmap
import os
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from edge_runtime.engine import header as layout
from edge_runtime.engine.formats import Array
from edge_runtime.engine.header import PAGE, padded
from edge_runtime.engine.manifest import Manifest
from edge_runtime.engine.proof import check_manifest
from edge_runtime.errors import BadEngineFile, BuildError

_COUNT = itertools.count()  # two writers of one process may have one target
_PIECE = 1 << 20  # bytes moved in one go when a header outgrew its reserve


class OsCalls:
    """The operating system as the writer uses it; a test passes its own to fail, cut or kill at any call."""

    def open(self, path: Path, flags: int) -> int:
        return os.open(path, flags | os.O_CLOEXEC, 0o666)

    def lock(self, fd: int, flags: int) -> None:
        fcntl.flock(fd, flags)

    def pwrite(self, fd: int, data: bytes | memoryview, offset: int) -> int:
        return os.pwrite(fd, data, offset)

    def pread(self, fd: int, nbytes: int, offset: int) -> bytes:
        return os.pread(fd, nbytes, offset)

    def fsync(self, fd: int) -> None:
        os.fsync(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.replace(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def close(self, fd: int) -> None:
        os.close(fd)


class EngineWriter:
    """Writes one engine. Use as a context manager: leaving without `finish` leaves nothing behind.

    header_reserve: bytes kept for the header, see `header.header_reserve`; too small a figure costs a copy.
    """

    def __init__(
        self, path: str | os.PathLike[str], header_reserve: int = 64 * 1024, calls: OsCalls | None = None
    ) -> None:
        self.path = Path(path)
        self.digests: dict[str, str] = {}  # in file order: sha256 of each plane as stored
        self._os = calls or OsCalls()
        self._start = padded(max(header_reserve, PAGE), PAGE)
        self._sizes: dict[str, int] = {}  # in file order: true size
        self._at = self._start
        self._fd = -1
        self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}-{next(_COUNT)}.tmp")

    @property
    def nbytes(self) -> int:
        """Bytes of planes and blobs written so far, padding included."""
        return self._at - self._start

    def __enter__(self) -> EngineWriter:
        if self.path.is_dir():
            raise BuildError(f"{self.path} is a folder; name the engine file to write, such as model.edge")
        try:
            self._remove_stale()
            self._fd = self._os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL)
            # Held until the file is closed, by the kernel, however this process ends: it marks a live build.
            self._os.lock(self._fd, fcntl.LOCK_EX)
            if os.fstat(self._fd).st_nlink == 0:  # taken for stale between the two calls above
                raise OSError(0, "another build was starting there; try again")
        except OSError as error:
            self._discard()
            raise self._failed("cannot be written there", error) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self._discard()

    def add(self, name: str, data: Array | bytes | memoryview) -> str:
        """Append a plane or blob; returns the sha256 of its bytes as stored, padding included.

        Raises BuildError for a name given twice, an empty array, or when the disk does not take it.
        """
        view = _bytes_of(data)
        if name in self._sizes:
            raise BuildError(f"plane {name!r} is written twice")
        if not len(view):
            raise BuildError(f"plane {name!r} is empty")
        tail = bytes(padded(len(view)) - len(view))
        sha = hashlib.sha256(view)
        sha.update(tail)
        try:
            self._write(view, self._at)
            self._write(tail, self._at + len(view))
        except OSError as error:
            raise self._failed(f"plane {name!r} could not be written", error) from error
        self._sizes[name] = len(view)
        self._at += len(view) + len(tail)
        self.digests[name] = sha.hexdigest()
        return self.digests[name]

    def planes(self) -> dict[str, Array]:
        """What was written so far: u8 views of the file, for verification before `finish`."""
        if not self._sizes:
            return {}
        mapped = mmap.mmap(self._open_fd(), self._at, access=mmap.ACCESS_READ)
        starts = layout.offsets(self._sizes)
        return {
            n: np.frombuffer(mapped, np.uint8, s, self._start + starts[n]) for n, s in self._sizes.items()
        }

    def finish(self, manifest: Manifest) -> Manifest:
        """Write the header and put the file in its place; returns the manifest as written.

        `planes` of the manifest is filled in from what was added. Raises BuildError when the manifest does
        not describe what was added, or when the disk fails; the target is then what it was before.
        """
        manifest = self._proved(manifest)
        try:
            head = layout.render(manifest, self._sizes, self._start)
        except BadEngineFile as error:
            raise BuildError(f"{self.path}: {error}") from error
        try:
            self._shift(len(head))
            self._write(head, 0)
            self._os.fsync(self._open_fd())
            self._os.rename(self._temporary, self.path)
        except OSError as error:
            self._discard()
            raise self._failed("could not be finished", error) from error
        fd, self._fd = self._fd, -1
        try:
            self._os.close(fd)
            self._sync_folder()
        except OSError as error:
            raise BuildError(
                f"{self.path}: the new engine is in place, but its folder could not be synced "
                f"({error.strerror or error}); it may be gone after a power failure, so build again"
            ) from error
        return manifest

    def _proved(self, manifest: Manifest) -> Manifest:
        """The manifest with digests, read back from its own JSON: what a reader will see."""
        full = msgspec.structs.replace(manifest, planes=dict(self.digests))
        try:
            full = msgspec.json.decode(layout.manifest_json(full), type=Manifest)
            sizes = check_manifest(full)
        except (msgspec.MsgspecError, BadEngineFile) as error:
            raise BuildError(f"{self.path}: the manifest is not valid: {error}") from error
        for name, size in sizes.items():
            if self._sizes[name] != size:
                raise BuildError(
                    f"plane {name!r} was written with {self._sizes[name]} bytes, expected {size}"
                )
        return full

    def _shift(self, start: int) -> None:
        """Move the data to `start` when the header outgrew its reserve: last piece first, so none is lost."""
        by = start - self._start
        end = self._at
        while by and end > self._start:
            begin = max(self._start, end - _PIECE)
            self._write(self._read(begin, end), begin + by)
            end = begin
        self._start, self._at = start, self._at + by

    def _read(self, begin: int, end: int) -> bytes:
        pieces = []
        while begin < end:
            piece = self._os.pread(self._open_fd(), end - begin, begin)
            if not piece:
                raise OSError(0, "the temporary file became shorter")
            pieces.append(piece)
            begin += len(piece)
        return b"".join(pieces)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while len(view):
            done = self._os.pwrite(self._open_fd(), view, at)
            if done <= 0:
                raise OSError(0, "the disk took no bytes")
            view, at = view[done:], at + done

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise BuildError(f"{self.path}: the writer is not open; use it in a with block, and finish once")
        return self._fd

    def _sync_folder(self) -> None:
        fd = self._os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._os.fsync(fd)
        finally:
            self._os.close(fd)

    def _discard(self) -> None:
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        with contextlib.suppress(
            OSError
        ):  # what cannot be removed now is stale, and removed by the next build
            self._os.unlink(self._temporary)
        with contextlib.suppress(OSError):
            self._os.close(fd)

    def _remove_stale(self) -> None:
        """Remove temporary files of this target whose lock nobody holds."""
        for path in self.path.parent.glob(f".{_literal(self.path.name)}.*.tmp"):
            try:
                fd = self._os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                self._os.lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._os.unlink(path)
            except OSError:
                continue  # a live build's
            finally:
                self._os.close(fd)

    def _failed(self, what: str, error: OSError) -> BuildError:
        return BuildError(f"{self.path}: {what}: {error.strerror or error}; nothing was changed at that path")


def _bytes_of(data: Array | bytes | memoryview) -> memoryview:
    if isinstance(data, np.ndarray):
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")


def _literal(name: str) -> str:
    """`name` for a glob pattern."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
