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

import msgspec

from edge_runtime.engine.manifest import Manifest, PartEntry
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program

ALIGN = 64  # of each plane
PAGE = 4096  # of the data section
HEADER_LIMIT = 4 << 20  # bytes, the 8 of the length included

OPENING = b'{"__metadata__":{"edge_sha256":"'
DIGEST_AT = 8 + len(OPENING)  # offset of the 64 hex digits in the file
MANIFEST_AT = DIGEST_AT + 64 + len(b'","edge":"')
_BETWEEN = b'","edge":"'
# Inside the manifest every quote follows a backslash, so this is its end and nothing else.
MANIFEST_END = b'}"}'


def padded(nbytes: int, align: int = ALIGN) -> int:
    """`nbytes` rounded up to whole `align`."""
    return -(-nbytes // align) * align


def manifest_json(manifest: Manifest) -> bytes:
    """Canonical ASCII JSON of a manifest."""
    return b"".join(manifest_chunks(manifest))


def manifest_chunks(value: object) -> Iterator[bytes]:
    """The canonical JSON in small pieces, so that a proof against the file's bytes needs no second copy."""
    if isinstance(value, Manifest | PartEntry | Program | Plan):
        for i, name in enumerate(value.__struct_fields__):
            yield b'%s"%s":' % (b"," if i else b"{", name.encode())
            yield from manifest_chunks(getattr(value, name))
        yield b"}"
    elif isinstance(value, dict) and value:
        for i, (key, item) in enumerate(value.items()):
            yield (b"," if i else b"{") + _ascii(msgspec.json.encode(key)) + b":"
            yield from manifest_chunks(item)
        yield b"}"
    elif isinstance(value, tuple) and value:
        for i, item in enumerate(value):
            yield b"," if i else b"["
            yield from manifest_chunks(item)
        yield b"]"
    else:
        yield _ascii(msgspec.json.encode(value))


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


def render(manifest: Manifest, sizes: Mapping[str, int], least: int = 0) -> bytes:
    """The whole header, length and padding included: a multiple of 4096 bytes, at least `least`."""
    body = b"".join(body_chunks(manifest, sizes))
    total = max(padded(MANIFEST_AT + len(body), PAGE), padded(least, PAGE))
    header = bytearray((total - 8).to_bytes(8, "little") + OPENING + b"0" * 64 + _BETWEEN + body)
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
    escapes = manifest_nbytes // 3
    return min(padded(manifest_nbytes + escapes + n_planes * 320 + 16 * 1024, PAGE), HEADER_LIMIT)
