"""A whole engine as bytes that can be damaged at will, with its digests mended or not; and what a reader
must do with the result: a typed error, or an engine in which every tensor is in bounds."""

from __future__ import annotations

import hashlib
import os
import random
import re
from pathlib import Path
from types import TracebackType

import numpy as np
from toy_engine import write_toy

from edge_runtime.backends import cpu, reference
from edge_runtime.backends.protocol import Backend, Part, StepBatch
from edge_runtime.engine import packing
from edge_runtime.engine.file import Engine, read_engine
from edge_runtime.engine.header import DIGEST_AT, MANIFEST_AT, MANIFEST_END, OPENING, PAGE, escape, padded
from edge_runtime.engine.layout import lay_out
from edge_runtime.errors import BadEngineFile, NumericError

BACKENDS: tuple[Backend, ...] = (reference.BACKEND, cpu.BACKEND)
BOUNDARY = (-1, 0, 1, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
WRONG_TYPES = ("null", "true", '"7"', "1.5", "[]", "{}", "1e400", "-0")
NUMBER = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?')  # or a string, to be skipped


class Specimen:
    """The good file, cut into what a forger would change: manifest text, rows of the table, data."""

    def __init__(self, folder: Path) -> None:
        self.manifest = write_toy(folder / "specimen.edge", reserve=PAGE)
        self.good = (folder / "specimen.edge").read_bytes()
        self.total = 8 + int.from_bytes(self.good[:8], "little")
        end = self.good.index(MANIFEST_END, MANIFEST_AT) + 1
        self.text = (
            self.good[MANIFEST_AT:end].replace(b"\\\\", b"\0").replace(b'\\"', b'"').replace(b"\0", b"\\")
        )
        self._escaped = escape(self.text)
        self.rows = self.good[end : self.total].rstrip(b" ")
        self.sizes = [int(n) for n in re.findall(rb'"shape":\[(\d+)\]', self.rows)]  # in file order
        self.data = self.good[self.total :]
        assert self.forged() == self.good
        self._fd = os.memfd_create("specimen")  # in memory: a disk would take most of the time
        self.path = Path(f"/proc/self/fd/{self._fd}")
        self.put(self.good)

    def __enter__(self) -> Specimen:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)

    def forged(
        self, text: bytes | None = None, rows: bytes | None = None, data: bytes | None = None
    ) -> bytes:
        """A file of these pieces with a right header digest, not worked out by the code under test."""
        body = OPENING + b"0" * 64 + b'","edge":"' + (self._escaped if text is None else escape(text))
        body += self.rows if rows is None else rows
        n = padded(8 + len(body), PAGE) - 8
        body = body.ljust(n)
        digest = hashlib.sha256(body).hexdigest().encode()
        at = DIGEST_AT - 8
        body = body[:at] + digest + body[at + 64 :]
        return n.to_bytes(8, "little") + body + (self.data if data is None else data)

    def mended(self, data: bytes) -> bytes:
        """The file with other data and the digests of every plane made right for it."""
        text, at = self.text, 0
        for size, digest in zip(self.sizes, self.manifest.planes.values(), strict=True):
            end = at + size
            text = text.replace(digest.encode(), hashlib.sha256(data[at:end]).hexdigest().encode())
            at = end
        return self.forged(text, data=data)

    def put(self, raw: bytes) -> None:
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, raw, 0)

    def cut(self, nbytes: int) -> None:
        os.ftruncate(self._fd, nbytes)

    def verdict(self, raw: bytes | None = None, verify: bool = True) -> tuple[Engine | None, str]:
        """(engine, "") when accepted, (None, message) when refused; any other exception escapes."""
        if raw is not None:
            self.put(raw)
        try:
            return read_engine(self.path, verify), ""
        except BadEngineFile as error:
            return None, str(error)


def walk(engine: Engine) -> int:
    """Touch every byte of every plane and blob through the views that backends use; returns their sum."""
    total = 0
    for name, entry in engine.manifest.parts.items():
        part = engine.part(name)
        lay_out(part.program, part.plan.step)
        for tensor in part.weights.values():
            assert entry.program.tensors
            items = packing.plane_items(tensor.format, tensor.packing, tensor.rows, tensor.cols)
            for plane, array in tensor.planes.items():
                count, dtype = items[plane]
                assert array.shape == (count,) and array.dtype == np.dtype(dtype)
                total += int(array.view(np.uint8).sum())
    for name in engine.manifest.adapters:
        for update in engine.adapter(name).values():
            total += int(update.a.view(np.uint8).sum()) + int(update.b.view(np.uint8).sum())
    return total + sum(sum(engine.blob(name)) for name in engine.manifest.blobs)


def decode_step(engine: Engine) -> None:
    """One step of two tokens on each backend there is. Weights may be anything: NumericError is an answer."""
    for backend in BACKENDS:
        if backend.available().ok:
            _decode_step(engine, backend)


def _decode_step(engine: Engine, backend: Backend) -> None:
    part = engine.part("language")
    executor = backend.load(Part(part.program, part.weights, part.plan.kv, part.plan.step), threads=1)
    n = min(2, part.plan.step.tokens)
    batch = StepBatch(
        tokens=np.arange(n, dtype=np.int32),
        positions=np.arange(n, dtype=np.int32),
        sequence=np.zeros(n, np.int32),
        page_tables=np.zeros((1, 1), np.int32),
        logit_rows=np.array([n - 1], np.int32),
    )
    try:
        logits = executor.forward(batch)
        assert logits.shape == (1, part.program.vocab_size) and np.isfinite(logits).all()
    except NumericError:
        return
    finally:
        executor.close()


def mutate(rng: random.Random, raw: bytes) -> bytes:
    """One to three small changes of the kinds that bit rot, cut copies and forgers make."""
    out = bytearray(raw)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        at = rng.randrange(len(out))
        length = rng.choice((1, 1, 2, 4, 16, 64))
        kind = rng.randrange(8)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.choice(b'0123456789-"\\{}[],:. eEnutf\x00\xff')
        elif kind == 2:
            del out[at : at + length]
        elif kind == 3:
            out[at:at] = out[at : at + length]
        elif kind == 4:
            out[at:at] = rng.randbytes(length)
        elif kind == 5:
            other = rng.randrange(len(out))
            out[at : at + length], out[other : other + length] = (
                out[other : other + length],
                out[at : at + length],
            )
        else:
            _swap_token(rng, out, same=kind == 6)
        if not out:
            out = bytearray(b" ")
    return bytes(out)


def _swap_token(rng: random.Random, out: bytearray, *, same: bool) -> None:
    """Put a boundary number, or a token found near a place, in place of another there."""
    at = rng.randrange(len(out))
    window = bytes(out[at : at + 400])
    tokens = list(NUMBER.finditer(window))
    if not tokens:
        return
    old = rng.choice(tokens)
    new = rng.choice(tokens)[0] if same else str(rng.choice(BOUNDARY)).encode()
    out[at + old.start() : at + old.end()] = new
