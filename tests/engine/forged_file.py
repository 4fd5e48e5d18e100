"""Engine files with a forged manifest under a right header digest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from edge_runtime.engine import header as layout
from edge_runtime.engine.manifest import Manifest
from edge_runtime.engine.proof import check_manifest


def forge(path: Path, manifest: Manifest, data: bytes) -> None:
    """A file with a right header digest for any provable manifest; rows follow the order of its digests."""
    sizes = check_manifest(manifest)
    path.write_bytes(layout.render(manifest, sizes) + data)


def rewrite(path: Path, change: Callable[[str], str]) -> None:
    """Change the manifest's JSON, keep everything else, mend the header's digest."""
    raw = bytearray(path.read_bytes())
    total = 8 + int.from_bytes(raw[:8], "little")
    head = json.loads(raw[8:total])
    text = change(head["__metadata__"]["edge"])
    start = raw.index(b'"edge":"') + len(b'"edge":"')
    end = raw.index(layout.MANIFEST_END) + 1
    body = bytes(raw[:start]) + layout.escape(text.encode()) + bytes(raw[end:total]).rstrip(b" ")
    size = layout.padded(len(body), 4096)
    new = bytearray(body.ljust(size))
    new[:8] = (size - 8).to_bytes(8, "little")
    new[layout.DIGEST_AT : layout.DIGEST_AT + 64] = layout.digest([new[8:]]).encode()
    path.write_bytes(bytes(new) + bytes(raw[total:]))
