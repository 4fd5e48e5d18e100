"""Reader of engine files: proves the header, then hands out views of the map. Nothing is copied.

The order is: kind and size of the file, digest of the header, manifest, shapes and bounds, the very bytes of
the tensor rows, digests of the planes. No plane is touched before the header is proved, and a refusal takes
little more memory than the header itself.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import msgspec
import numpy as np

from edge_runtime.engine import header as layout
from edge_runtime.engine import packing
from edge_runtime.engine.adapter import Adapter, LowRank
from edge_runtime.engine.header import (
    BETWEEN,
    DIGEST_AT,
    HEADER_LIMIT,
    MANIFEST_AT,
    MANIFEST_END,
    OPENING,
    PAGE,
    padded,
)
from edge_runtime.engine.manifest import SCHEMA, Manifest, Origin
from edge_runtime.engine.packed import PackedTensor
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program
from edge_runtime.engine.proof import BLOB, adapter_plane, check_manifest, plane_name
from edge_runtime.errors import BadEngineFile, nearest

HASH_THREADS = 2  # one core cannot hash as fast as an NVMe drive reads
_DAMAGED = "the file is damaged, copy or build it again"
_WORTH_THREADS = 1 << 20  # bytes of data from which starting threads pays
_SCHEMA = re.compile(rb'\{"schema":(\d{1,9}),')  # read before anything that a later schema may change
_MESSAGE = 400  # characters: a hostile name must not come back whole
_PIECE = 64 * 1024  # bytes of header looked at in one go


@dataclass(frozen=True, slots=True)
class EnginePart:
    """One model of an engine: its program, the plan made for it, and its weights as views of the map.

    origins: tensor -> where it was in the checkpoint, for adapters that are loaded at run time.
    """

    program: Program
    plan: Plan
    origins: Mapping[str, Origin]
    weights: Mapping[str, PackedTensor]


class Engine:
    """An open engine file. Arrays it handed out stay valid after `close`, which only drops this handle."""

    def __init__(
        self, path: Path, manifest: Manifest, sizes: dict[str, int], data: memoryview, file_nbytes: int
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.file_nbytes = file_nbytes
        self._sizes = sizes
        self._offsets = layout.offsets(sizes)
        self._data: memoryview | None = data

    @property
    def nbytes(self) -> int:
        """Bytes of planes and blobs, padding included."""
        return sum(padded(n) for n in self._sizes.values())

    def part(self, name: str) -> EnginePart:
        """Raises BadEngineFile naming the nearest part when there is none of that name."""
        if name not in self.manifest.parts:
            raise BadEngineFile(f"{self.path}: no part {name!r}; {nearest(name, self.manifest.parts)}")
        entry = self.manifest.parts[name]
        weights = {}
        for tensor, chosen in entry.plan.tensors.items():
            spec = entry.program.tensors[tensor]
            items = packing.plane_items(chosen.format, chosen.packing, spec.rows, spec.cols)
            planes = {
                plane: np.frombuffer(self._view(plane_name(name, tensor, plane)), dtype, count)
                for plane, (count, dtype) in items.items()
            }
            weights[tensor] = PackedTensor(spec.rows, spec.cols, chosen.format, chosen.packing, planes)
        return EnginePart(entry.program, entry.plan, entry.origins, weights)

    def adapter(self, name: str) -> Adapter:
        """The adapter's updates as views of the map, for the part `manifest.adapters[name].part`.

        Raises BadEngineFile naming the nearest adapter when there is none of that name.
        """
        if name not in self.manifest.adapters:
            raise BadEngineFile(f"{self.path}: no adapter {name!r}; {nearest(name, self.manifest.adapters)}")
        entry = self.manifest.adapters[name]
        tensors = self.manifest.parts[entry.part].program.tensors
        found = {}
        for tensor, target in entry.targets.items():
            a, b = (np.frombuffer(self._view(adapter_plane(name, tensor, s)), "<f2") for s in ("a", "b"))
            spec, rank = tensors[tensor], target.rank
            found[tensor] = LowRank(a.reshape(rank, spec.cols), b.reshape(spec.rows, rank), target.scale)
        return found

    def blob(self, name: str) -> memoryview:
        """Bytes of a blob without padding. Raises BadEngineFile when there is none of that name."""
        if name not in self.manifest.blobs:
            raise BadEngineFile(f"{self.path}: no blob {name!r}; {nearest(name, self.manifest.blobs)}")
        return self._view(f"{BLOB}/{name}")

    def sizes(self) -> dict[str, int]:
        """True size in bytes of every plane and blob, in file order."""
        return dict(self._sizes)

    def close(self) -> None:
        """Let go of the map; it is unmapped when the last array of it is gone."""
        self._data = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None
    ) -> None:
        self.close()

    def _view(self, plane: str) -> memoryview:
        if self._data is None:
            raise BadEngineFile(f"{self.path}: the engine is closed; open it again")
        at = self._offsets[plane]
        return self._data[at : at + self._sizes[plane]]

    def verify(self) -> None:
        """Digests and zero padding of every plane and blob, in two threads. Raises BadEngineFile."""
        try:
            self._verify()
        except BadEngineFile as error:
            raise BadEngineFile(f"{self.path}: {str(error)[:_MESSAGE]}") from error

    def _verify(self) -> None:
        if self.nbytes < _WORTH_THREADS:
            self._raise(zip(self._sizes, map(self._fault, self._sizes), strict=True))
            return
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            self._raise(zip(self._sizes, pool.map(self._fault, self._sizes), strict=True))

    def _raise(self, faults: Iterable[tuple[str, str]]) -> None:
        for name, fault in faults:
            if fault:
                raise BadEngineFile(f"plane {name!r} {fault}; {_DAMAGED}")

    def _fault(self, name: str) -> str:
        data, at, size = self._data, self._offsets[name], self._sizes[name]
        if data is None:
            return "is closed"
        if any(data[at + size : at + padded(size)]):
            return "has padding that is not zero"
        if hashlib.sha256(data[at : at + padded(size)]).hexdigest() != self.manifest.planes[name]:
            return "does not match its digest"
        return ""


def read_engine(path: str | os.PathLike[str], verify: bool = True) -> Engine:
    """Open an engine file and prove it. `verify=False` skips only the digests of the planes' data.

    Raises BadEngineFile for anything that is not a whole, undamaged engine that this version can read.
    """
    where = Path(path)
    try:
        fd, nbytes = _open(where)
        try:
            at = _header_nbytes(fd, nbytes)
            manifest, sizes = _read_header(fd, at)
            found, wanted = nbytes - at, sum(padded(n) for n in sizes.values())
            if found != wanted:
                state = "truncated" if found < wanted else "longer than it says"
                raise BadEngineFile(f"{found} bytes of data, expected {wanted}; the file is {state}")
            data = memoryview(mmap.mmap(fd, nbytes, access=mmap.ACCESS_READ))
        finally:
            os.close(fd)
        engine = Engine(where, manifest, sizes, data[at:], nbytes)
        if verify:
            engine._verify()
        return engine
    except BadEngineFile as error:
        raise BadEngineFile(f"{where}: {str(error)[:_MESSAGE]}") from error
    except OSError as error:
        raise BadEngineFile(f"{where}: cannot be read: {error.strerror or error}") from error


def _open(path: Path) -> tuple[int, int]:
    """Descriptor and size of a regular file. O_NONBLOCK: a FIFO must not hang us before we see what it is."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise BadEngineFile("no such file; build one with edge-build") from None
    except ValueError as error:  # a NUL in the path
        raise BadEngineFile(f"cannot be opened: {error}") from error
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise BadEngineFile("not a regular file; an engine is one .edge file")
    return fd, status.st_size


def _read(fd: int, at: int, nbytes: int) -> bytes:
    """Exactly these bytes. Not through a map, so that what was looked at does not stay resident."""
    data = os.pread(fd, nbytes, at)
    while len(data) < nbytes:
        more = os.pread(fd, nbytes - len(data), at + len(data))
        if not more:
            raise BadEngineFile(f"truncated at byte {at + len(data)}; {_DAMAGED}")
        data += more
    return data


def _pieces(fd: int, at: int, end: int) -> Iterator[bytes]:
    return (_read(fd, i, min(_PIECE, end - i)) for i in range(at, end, _PIECE))


def _header_nbytes(fd: int, nbytes: int) -> int:
    if nbytes < PAGE:
        raise BadEngineFile(f"truncated: {nbytes} bytes, an engine has at least {PAGE}")
    if _read(fd, 8, len(OPENING)) != OPENING:
        raise BadEngineFile("not an engine file (it does not begin as one); build one with edge-build")
    total = 8 + int.from_bytes(_read(fd, 0, 8), "little")
    if total > HEADER_LIMIT or total % PAGE or total > nbytes:
        raise BadEngineFile(
            f"header of {total} bytes in a file of {nbytes}; expected whole pages of {PAGE}, "
            f"at most {HEADER_LIMIT}"
        )
    return total


def _read_header(fd: int, nbytes: int) -> tuple[Manifest, dict[str, int]]:
    """Manifest and true plane sizes in file order, proved against every byte of the header."""
    said = _read(fd, DIGEST_AT, 64)
    if layout.digest(_pieces(fd, 8, nbytes)).encode() != said:
        raise BadEngineFile(f"the header does not match its digest; {_DAMAGED}")
    if _read(fd, DIGEST_AT + 64, len(BETWEEN)) != BETWEEN:
        raise BadEngineFile("the header does not go on as an engine's does after its digest")
    manifest = _decode(_manifest_text(fd, nbytes), nbytes)
    sizes = check_manifest(manifest)
    at = MANIFEST_AT
    pieces = _pieces(fd, at, nbytes)
    window, done = b"", 0
    for chunk in layout.body_chunks(manifest, sizes):
        while len(window) - done < len(chunk) and (piece := next(pieces, b"")):
            window, done = window[done:] + piece, 0
        if not window.startswith(chunk, done):
            raise BadEngineFile(
                f"the header at byte {at} is not what its manifest asks for, {chunk[:60].decode()!r}"
            )
        at, done = at + len(chunk), done + len(chunk)
    if window[done:].strip(b" ") or any(piece.strip(b" ") for piece in pieces):
        raise BadEngineFile(f"the header goes on after its end at byte {at}")
    return manifest, sizes


def _manifest_text(fd: int, nbytes: int) -> bytearray:
    """The manifest's JSON, unescaped piece by piece, so that there is one text of its size and no more."""
    text, rest = bytearray(), b""
    for piece in _pieces(fd, MANIFEST_AT, nbytes):
        rest += piece
        end = rest.find(MANIFEST_END)
        if end >= 0:
            text += layout.unescape(rest[: end + 1])
            return text
        keep = len(MANIFEST_END) - 1  # the mark of the end may be cut in two here, or an escape
        keep += (len(rest[:-keep]) - len(rest[:-keep].rstrip(b"\\"))) % 2
        text += layout.unescape(rest[:-keep])
        rest = rest[-keep:]
    raise BadEngineFile("the manifest has no end")


def _decode(text: bytearray, header_nbytes: int) -> Manifest:
    layout.check_text(text, header_nbytes)
    schema = _SCHEMA.match(text)
    if schema is None:
        raise BadEngineFile("the manifest is not valid: it does not begin with its schema")
    if int(schema[1]) > SCHEMA:
        raise BadEngineFile(
            f"made by a newer version (schema {int(schema[1])}, this one reads {SCHEMA}); update edge-runtime"
        )
    if int(schema[1]) < SCHEMA:
        raise BadEngineFile(
            f"made by an older version (schema {int(schema[1])}, this one reads {SCHEMA}); build it again"
        )
    try:
        return msgspec.json.decode(text, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:200]
        raise BadEngineFile(f"the manifest is not valid: {reason}") from error
