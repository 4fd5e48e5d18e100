"""A saved prefix: the KV pages of a system prompt or tool list in a file, so that they need not be computed.

The file is a safetensors file with one u8 tensor `pages` (pages, bytes of a page). Its metadata holds the
description, as strict JSON, and the sha256 over description and pages. It belongs to one engine, backend, KV
format and page size; everything else is refused, for the same bytes would mean other numbers.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from edge_runtime.engine.formats import Array
from edge_runtime.engine.header import manifest_json
from edge_runtime.engine.manifest import Manifest
from edge_runtime.errors import BadPrefixFile

SCHEMA = 1
SUFFIX = ".prefix"
MAX_BYTES = 4 << 30
_DESCRIPTION, _DIGEST, _PAGES = "edge_prefix", "edge_prefix_sha256", "pages"
_SLACK = 1 << 20  # bytes of a file beside its pages: names, description
_Digest = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Origin(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the bytes of a page depend on. engine: `engine_id`; adapter: sha256 of its planes, None = none."""

    engine: _Digest
    part: str
    backend: str
    k: str
    v: str
    page_tokens: int
    page_nbytes: int
    adapter: _Digest | None


class _Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int
    origin: Origin
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SavedPrefix:
    """tokens: whole pages of them; pages u8 (pages, page_nbytes)."""

    tokens: tuple[int, ...]
    pages: Array


def engine_id(manifest: Manifest) -> str:
    """sha256 of an engine's manifest, which holds the digests of all its planes."""
    return hashlib.sha256(manifest_json(manifest)).hexdigest()


def write_prefix(path: str | os.PathLike[str], origin: Origin, prefix: SavedPrefix) -> None:
    """Write the file: a temporary one beside it, fsynced, renamed, folder fsynced. Raises BadPrefixFile."""
    target = Path(path)
    description = msgspec.json.encode(_Description(schema=SCHEMA, origin=origin, tokens=prefix.tokens))
    pages = np.ascontiguousarray(prefix.pages)
    metadata = {_DESCRIPTION: description.decode(), _DIGEST: _digest(description, pages.tobytes())}
    data = save({_PAGES: pages}, metadata=metadata)
    part = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        try:
            with part.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise BadPrefixFile(f"{target}: cannot be written: {error.strerror or error}") from error


def read_prefix(path: str | os.PathLike[str], origin: Origin, vocab: int) -> SavedPrefix:
    """The prefix of a file that was saved for the same origin.

    Raises BadPrefixFile when the file is damaged, or naming what it was saved for and what is here.
    """
    where = Path(path)
    try:
        data = _read(where)
        description, raw, found = _parse(data)
    except BadPrefixFile as error:
        raise BadPrefixFile(f"{where}: {error}") from None
    for name in origin.__struct_fields__:
        had, here = getattr(description.origin, name), getattr(origin, name)
        if had != here:
            raise BadPrefixFile(
                f"{where}: saved for {name} {had!s:.64}, this session has {here!s:.64}; save it again"
            )
    pages, size = divmod(len(description.tokens), origin.page_tokens)
    if size or pages == 0 or len(raw) != pages * origin.page_nbytes:
        raise BadPrefixFile(
            f"{where}: {len(description.tokens)} tokens and {len(raw)} bytes are no whole pages of "
            f"{origin.page_tokens} tokens and {origin.page_nbytes} bytes"
        )
    if found != [pages, origin.page_nbytes]:
        raise BadPrefixFile(f"{where}: pages have the shape {found}, expected {[pages, origin.page_nbytes]}")
    if not all(0 <= token < vocab for token in description.tokens):
        raise BadPrefixFile(f"{where}: holds token ids beyond the vocabulary of {vocab}")
    return SavedPrefix(description.tokens, np.frombuffer(raw, np.uint8).reshape(pages, origin.page_nbytes))


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise BadPrefixFile("no such file, or no regular one; save a prefix with edge-build --prefix")
        if path.stat().st_size > MAX_BYTES:
            raise BadPrefixFile(f"larger than {MAX_BYTES} bytes")
        return path.read_bytes()
    except OSError as error:
        raise BadPrefixFile(f"cannot be read: {error.strerror or error}") from None
    except ValueError as error:  # a NUL in the path
        raise BadPrefixFile(f"cannot be opened: {error}") from None


def _parse(data: bytes) -> tuple[_Description, bytes | bytearray, list[int]]:
    """Description, bytes of the pages and their shape, with the digest checked."""
    try:
        tensors = dict(deserialize(data))  # type: ignore[no-untyped-call]
        header = int.from_bytes(data[:8], "little")  # deserialize has proved its bounds
        metadata = msgspec.json.decode(data[8 : 8 + header], type=dict[str, msgspec.Raw])["__metadata__"]
        texts = msgspec.json.decode(metadata, type=dict[str, str])
    except (SafetensorError, msgspec.MsgspecError, KeyError, UnicodeDecodeError) as error:
        raise BadPrefixFile(f"damaged, or no saved prefix ({error!s:.120}); save it again") from None
    if set(tensors) != {_PAGES} or set(texts) != {_DESCRIPTION, _DIGEST} or header > _SLACK:
        raise BadPrefixFile("no saved prefix: it must hold a description, its digest and `pages`")
    pages = tensors[_PAGES]
    if pages["dtype"] != "U8":
        raise BadPrefixFile(f"pages are {pages['dtype']}, expected U8")
    text = texts[_DESCRIPTION].encode()
    if _digest(text, pages["data"]) != texts[_DIGEST]:
        raise BadPrefixFile("does not match its digest; it is damaged, save it again")
    try:
        description = msgspec.json.decode(text, type=_Description)
    except msgspec.MsgspecError as error:
        raise BadPrefixFile(f"the description is not valid: {error!s:.120}") from None
    if description.schema != SCHEMA:
        raise BadPrefixFile(f"schema {description.schema}, this version reads {SCHEMA}; save it again")
    return description, pages["data"], list(pages["shape"])


def _digest(description: bytes, pages: bytes | bytearray) -> str:
    sha = hashlib.sha256(description)
    sha.update(pages)
    return sha.hexdigest()
