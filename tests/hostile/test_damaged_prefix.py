"""Damaged and forged prefix files: typed errors only, and nothing taken that could not be a prefix."""

from __future__ import annotations

import hashlib
import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save
from speaking_engine import vocabulary, write_speaking

from edge_runtime import BadPrefixFile, Request, open_engine
from edge_runtime.backends import cpu
from edge_runtime.serving.prefix_file import Origin, read_prefix

BACKEND = "cpu" if cpu.BACKEND.available().ok else "reference"
VOCAB = vocabulary().size
PREFIX = [7 + i % 40 for i in range(37)]  # two pages of 16, and a rest


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "speaking.edge"
    write_speaking(path)
    return path


@pytest.fixture(scope="module")
def saved(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "tools.prefix"
    with open_engine(engine, backend=BACKEND, threads=1) as session:
        assert session.save_prefix(PREFIX, path) == 32
    return path


@pytest.fixture(scope="module")
def origin(engine: Path) -> Origin:
    with open_engine(engine, backend=BACKEND, threads=1) as session:
        return session._prefixes.origin


def test_what_is_no_file_is_refused(engine: Path, saved: Path, tmp_path: Path) -> None:
    fifo, folder, loop = tmp_path / "fifo", tmp_path / "folder", tmp_path / "loop"
    os.mkfifo(fifo)
    folder.mkdir()
    loop.symlink_to(loop)
    dangling, link = tmp_path / "dangling", tmp_path / "link"
    dangling.symlink_to(tmp_path / "nowhere")
    link.symlink_to(saved)
    paths = [fifo, folder, loop, dangling, tmp_path / "missing", "/dev/zero", "a\0b", "x" * 5000, ""]
    with open_engine(engine, backend=BACKEND, threads=1) as session:
        for path in paths:
            with pytest.raises(BadPrefixFile):
                session.load_prefix(path)
        assert session.load_prefix(link) == 32
        for path in (folder, tmp_path / "no" / "folder", "x" * 5000, fifo / "x"):
            with pytest.raises(BadPrefixFile, match="cannot be written"):
                session.save_prefix(PREFIX, path)
        session.save_prefix(PREFIX, fifo)  # replaced as a whole, not written into
        assert fifo.is_file() and session.load_prefix(fifo) == 32
        assert session.pages_used == session.in_flight == 0
    assert sorted(os.listdir(tmp_path)) == sorted(["fifo", "folder", "loop", "dangling", "link"])
    assert os.listdir(folder) == []


def refused(path: Path, data: bytes, origin: Origin) -> BadPrefixFile:
    path.write_bytes(data)
    with pytest.raises(BadPrefixFile) as caught:
        read_prefix(path, origin, VOCAB)
    assert str(caught.value).startswith(str(path)) and len(str(caught.value)) < 600
    return caught.value


def test_every_truncation_is_refused(saved: Path, origin: Origin, tmp_path: Path) -> None:
    data = saved.read_bytes()
    for end in [*range(0, len(data), 64), *range(1, 80), len(data) - 1]:
        refused(tmp_path / "p", data[:end], origin)
    refused(tmp_path / "p", data + b"\0", origin)


def test_every_changed_byte_is_refused(saved: Path, origin: Origin, tmp_path: Path) -> None:
    data, rng, path = saved.read_bytes(), random.Random(1), tmp_path / "p"
    for _ in range(1000):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else rng.randrange(1200)
        changed = bytearray(data)
        changed[at] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
        try:
            found = read_prefix(path, origin, VOCAB)
        except BadPrefixFile:
            continue
        # Padding of the header and the like: then it must still say the same
        assert found.tokens == tuple(PREFIX[:32]) and found.pages.tobytes() == data[-found.pages.nbytes :]


def parts(data: bytes) -> tuple[dict[str, Any], np.ndarray]:
    """Description and pages (pages, bytes) of a file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    description = json.loads(header["__metadata__"]["edge_prefix"])
    pages = np.frombuffer(data[8 + length :], np.uint8).reshape(header["pages"]["shape"])
    return description, pages


def forged(description: object, pages: np.ndarray, **more: Any) -> bytes:
    """A file whose digest is right, whatever it says."""
    text = description if isinstance(description, str) else json.dumps(description)
    digest = hashlib.sha256(text.encode() + pages.tobytes()).hexdigest()
    metadata = {"edge_prefix": text, "edge_prefix_sha256": digest} | more.pop("metadata", {})
    return bytes(save({"pages": pages} | more, metadata=metadata))


def mutated(description: dict[str, Any], pages: np.ndarray, rng: random.Random) -> bytes:
    """One thing wrong that an attacker, who can make digests too, might try."""
    description = json.loads(json.dumps(description))
    odd = [None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 2**64, 1e308, 1.5, "", "x", [], {}, [[]], "ab" * 32]
    match rng.randrange(7):
        case 0:
            description[rng.choice(list(description))] = rng.choice(odd)
        case 1:
            description["origin"][rng.choice(list(description["origin"]))] = rng.choice(odd)
        case 2:
            description["tokens"][rng.randrange(32)] = rng.choice(odd)
        case 3:
            del description["tokens"][rng.randrange(1, 32) :]
        case 4:
            description[rng.choice("abc")] = rng.choice(odd)
        case 5:
            shape = rng.choice([(1, -1), (-1,), (2, -1, 2), (-1, 1), (4, -1)])
            pages = pages.reshape(shape)
        case 6:
            text = list(json.dumps(description))
            for _ in range(rng.randrange(1, 4)):
                text[rng.randrange(len(text))] = chr(rng.choice([34, 44, 48, 91, 123, 125, 0x10FFFF]))
            return forged("".join(text), pages)
    return forged(description, pages)


def test_forged_files_are_refused_or_say_no_more_than_they_may(
    saved: Path, origin: Origin, tmp_path: Path
) -> None:
    """With digests made anew: what is taken has pages of the right size and tokens of the vocabulary."""
    description, pages = parts(saved.read_bytes())
    assert forged(description, pages) != saved.read_bytes()  # another order of keys, but as good:
    rng, path, taken = random.Random(2), tmp_path / "p", 0
    path.write_bytes(forged(description, pages))
    assert read_prefix(path, origin, VOCAB).tokens == tuple(PREFIX[:32])
    for _ in range(1000):
        path.write_bytes(mutated(description, pages, rng))
        try:
            found = read_prefix(path, origin, VOCAB)
        except BadPrefixFile:
            continue
        taken += 1
        assert found.pages.shape == (2, origin.page_nbytes) and len(found.tokens) == 32
        assert all(type(t) is int and 0 <= t < VOCAB for t in found.tokens)
    assert 0 < taken < 200


def test_what_forged_files_say_wrong_is_named(saved: Path, origin: Origin, tmp_path: Path) -> None:
    description, pages = parts(saved.read_bytes())
    path = tmp_path / "p"
    cases = [
        (forged(description | {"schema": 2}, pages), "schema 2, this version reads 1"),
        (forged(description | {"tokens": [*PREFIX[:31], VOCAB]}, pages), "token ids beyond the vocabulary"),
        (forged(description | {"tokens": PREFIX[:16]}, pages), "16 tokens and"),
        (forged(description | {"tokens": []}, pages[:0]), "0 tokens and 0 bytes are no whole pages"),
        (forged(description, pages.reshape(1, -1)), "pages have the shape"),
        (forged(description, pages.view(np.int8)), "pages are I8, expected U8"),
        (forged(description, pages, other=pages), "no saved prefix"),
        (forged(description, pages, metadata={"more": "x"}), "no saved prefix"),
        (forged(description, pages, metadata={"edge_prefix_sha256": "ab" * 32}), "does not match its digest"),
        (forged("[" * 100_000, pages), "the description is not valid"),
        (bytes(save({"pages": pages})), "damaged, or no saved prefix"),
        (b"\xff" * 64, "damaged, or no saved prefix"),
        ((2**40).to_bytes(8, "little") + b"{}", "damaged, or no saved prefix"),
    ]
    for data, message in cases:
        assert message in str(refused(path, data, origin))


def test_pages_of_nan_end_requests_typed_and_harm_no_other(saved: Path, engine: Path, tmp_path: Path) -> None:
    description, pages = parts(saved.read_bytes())
    path = tmp_path / "p"
    path.write_bytes(forged(description, np.full_like(pages, 0xFF)))
    with open_engine(engine, backend=BACKEND, threads=1) as session:
        want = session.complete([9, 8, 7], max_tokens=5).tokens
    with open_engine(engine, backend=BACKEND, threads=1, prefix=path) as session:
        bad = session.stream(Request(prompt=[*PREFIX, 9], max_tokens=5))
        good = session.stream(Request(prompt=[9, 8, 7], max_tokens=5))
        assert tuple(e.token for e in good) == want
        assert [(e.token, e.finish_reason) for e in bad] == [(None, "error")]
        assert session.pages_used == session.in_flight == 0
