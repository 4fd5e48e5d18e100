r"""The header of an engine file, byte for byte. The file is a valid safetensors file:

    8 bytes      n, little endian; 8 + n is a multiple of 4096, so planes start on a page
    n bytes      {"__metadata__":{"edge_sha256":"<64 hex>","edge":"<manifest>"},<rows>}<spaces>
    data         planes and blobs in the order of `manifest.planes`, each padded with zeros to 64 bytes

A row is "<name>":{"dtype":"U8","shape":[<bytes>],"data_offsets":[<from>,<to>]}. Everything follows from the
manifest: a reader derives the rows and demands these very bytes, so there is no second reading of a name, an
offset or a key given twice. The manifest is ASCII JSON with `"` and `\` escaped once more by a backslash.
edge_sha256 is the digest of all n bytes with its own 64 digits as zeros.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import msgspec

from edge_runtime.engine.manifest import AdapterEntry, Manifest, PartEntry
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadEngineFile

ALIGN = 64  # of each plane
PAGE = 4096  # of the data section
HEADER_LIMIT = 4 << 20  # bytes, the 8 of the length included
SLACK = 1 << 20  # a refused file may cost this much memory and twice its header
BYTES_PER_VALUE = 96  # of memory, for each , : { [ of the densest manifest
LONGEST = 8192  # bytes without a quote: no text or list of a manifest is longer

OPENING = b'{"__metadata__":{"edge_sha256":"'
DIGEST_AT = 8 + len(OPENING)  # offset of the 64 hex digits in the file
BETWEEN = b'","edge":"'  # digest and manifest
MANIFEST_AT = DIGEST_AT + 64 + len(BETWEEN)
_BATCH = 32  # entries encoded in one go
# Inside the manifest every quote follows a backslash, so this is its end and nothing else.
MANIFEST_END = b'}"}'


def padded(nbytes: int, align: int = ALIGN) -> int:
    """`nbytes` rounded up to whole `align`."""
    return -(-nbytes // align) * align


def manifest_json(manifest: Manifest) -> bytes:
    """Canonical ASCII JSON of a manifest."""
    return b"".join(manifest_chunks(manifest))


def manifest_chunks(value: Manifest | PartEntry | AdapterEntry | Program | Plan) -> Iterator[bytes]:
    """The canonical JSON in small pieces, so that a proof against the file's bytes needs no second copy."""
    for i, name in enumerate(value.__struct_fields__):
        yield b'%s"%s":' % (b"," if i else b"{", name.encode())
        field = getattr(value, name)
        if isinstance(field, Program | Plan):
            yield from manifest_chunks(field)
        elif isinstance(field, dict) and name in ("parts", "adapters"):
            for j, (key, entry) in enumerate(field.items()):
                yield (b"," if j else b"{") + msgspec.json.encode(key) + b":"
                yield from manifest_chunks(entry)
            yield b"}" if field else b"{}"
        elif isinstance(field, dict):
            yield from _batches(iter(field.items()), dict, b"{}")
        elif isinstance(field, tuple):
            yield from _batches(iter(field), tuple, b"[]")
        else:
            yield _ascii(msgspec.json.encode(field))
    yield b"}"


def _batches(items: Iterator[Any], kind: type, ends: bytes) -> Iterator[bytes]:
    yield ends[:1]
    comma = b""
    while batch := kind(islice(items, _BATCH)):
        yield comma + _ascii(msgspec.json.encode(batch))[1:-1]
        comma = b","
    yield ends[1:]


def _ascii(encoded: bytes) -> bytes:
    if encoded.isascii():
        return encoded
    text = encoded.decode("utf-8").encode("utf-16-be", "surrogatepass")
    units = [int.from_bytes(text[i : i + 2], "big") for i in range(0, len(text), 2)]
    return "".join(chr(u) if u < 128 else f"\\u{u:04x}" for u in units).encode("ascii")


def escape(chunk: bytes) -> bytes:
    """A piece of the manifest as it stands inside the JSON string of the metadata."""
    return chunk.replace(b"\\", b"\\\\").replace(b'"', b'\\"')


def unescape(text: bytes) -> bytes:
    """Inverse of `escape`. What `escape` never writes gives other bytes, which the proof then refuses."""
    text = text.replace(b"\\\\", b"\0").replace(b'\\"', b'"')  # JSON itself holds no NUL
    return text.replace(b"\0", b"\\")


def offsets(sizes: Mapping[str, int]) -> dict[str, int]:
    """Start of each plane in the data section, for true sizes (bytes) in file order."""
    at, found = 0, {}
    for name, nbytes in sizes.items():
        found[name] = at
        at += padded(nbytes)
    return found


def table_chunks(sizes: Mapping[str, int]) -> Iterator[bytes]:
    """The rows, for true sizes (bytes) in file order."""
    at = 0
    for name, nbytes in sizes.items():
        end = at + padded(nbytes)
        yield b',%s:{"dtype":"U8","shape":[%d],"data_offsets":[%d,%d]}' % (
            _ascii(msgspec.json.encode(name)),
            end - at,
            at,
            end,
        )
        at = end
    yield b"}"


def body_chunks(manifest: Manifest, sizes: Mapping[str, int]) -> Iterator[bytes]:
    """The header from the manifest on, up to the padding."""
    for chunk in manifest_chunks(manifest):
        yield escape(chunk)
    yield b'"}'
    yield from table_chunks(sizes)


def memory_bound(text: bytes | bytearray) -> int:
    """Bytes that reading a manifest of this JSON may take: no more than `SLACK` + twice its header's size.

    A dense text (`{"a":1,"b":1,...`) takes many times its size as objects, so a header must be padded until
    its own size pays for them; only forged or very large headers ever are.
    """
    values = sum(text.count(mark) for mark in (b",", b":", b"{", b"["))
    return 2 * len(text) + values * BYTES_PER_VALUE  # the text, its strings once more, and objects


def check_text(text: bytes | bytearray, header_nbytes: int) -> None:
    """Refuse a manifest JSON that would take too much memory as objects. Raises BadEngineFile."""
    bound, allowed = memory_bound(text), SLACK + 2 * header_nbytes
    if bound > allowed:
        raise BadEngineFile(
            f"a manifest that takes {bound} bytes of memory in a header of {header_nbytes}; at most {allowed}"
        )
    for at in range(0, len(text) - LONGEST, LONGEST):
        if text.find(b'"', at, at + LONGEST) < 0:
            raise BadEngineFile(f"the manifest holds one text or list longer than {LONGEST} bytes at {at}")


def render(manifest: Manifest, sizes: Mapping[str, int], least: int = 0) -> bytes:
    """The whole header, length and padding included: a multiple of 4096 bytes, at least `least`.

    Raises BadEngineFile when it would be larger than HEADER_LIMIT.
    """
    body = b"".join(body_chunks(manifest, sizes))
    text = manifest_json(manifest)
    dense = (memory_bound(text) - SLACK + 1) // 2
    total = padded(max(MANIFEST_AT + len(body), least, dense), PAGE)
    if total > HEADER_LIMIT:
        raise BadEngineFile(f"the header takes {total} bytes, at most {HEADER_LIMIT} are allowed")
    check_text(text, total)
    header = bytearray((total - 8).to_bytes(8, "little") + OPENING + b"0" * 64 + BETWEEN + body)
    header += b" " * (total - len(header))
    header[DIGEST_AT : DIGEST_AT + 64] = digest([header[8:]]).encode()
    return bytes(header)


def digest(pieces: Iterable[bytes | bytearray | memoryview]) -> str:
    """edge_sha256 of the header's n bytes, given in pieces of which the first holds the digits."""
    sha = hashlib.sha256()
    at = DIGEST_AT - 8
    for i, piece in enumerate(pieces):
        if i == 0:
            view = memoryview(piece)
            sha.update(view[:at])
            sha.update(b"0" * 64)
            sha.update(view[at + 64 :])
        else:
            sha.update(piece)
    return sha.hexdigest()


def header_reserve(n_planes: int, manifest_nbytes: int) -> int:
    """Bytes to keep free for a header with that many planes and blobs and about `manifest_nbytes` of manifest
    JSON without its digests. Generous; a header that grows beyond it only costs a copy of the data."""
    text = manifest_nbytes + n_planes * 140  # a digest with its name
    rows = n_planes * 140
    values = manifest_nbytes // 4 + 2 * n_planes
    dense = (2 * text + values * BYTES_PER_VALUE - SLACK) // 2
    return min(padded(max(text * 5 // 4 + rows, dense) + 16 * 1024, PAGE), HEADER_LIMIT)
