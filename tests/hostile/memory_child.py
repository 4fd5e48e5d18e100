"""Peak memory of refusals, by Python's allocators (exact) and by the kernel (VmHWM), and their audit events.

Each file is made in one forked process and read in another, both from a small parent: memory that making it
left free in the allocator would hide what reading it takes.
"""

import ctypes
import gc
import json
import os
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from specimen import Specimen

from edge_runtime.engine.file import read_engine
from edge_runtime.engine.header import HEADER_LIMIT, SLACK, memory_bound
from edge_runtime.errors import BadEngineFile

RUNS_CODE = ("exec", "compile", "import", "subprocess", "socket", "os.system", "ctypes", "pickle", "marshal")
SIZES = (20_000, 200_000, 1_200_000)
BEFORE_TENSORS = b'"plan":{"profile":"cpu","power_mode":"default","tensors":{'
# What fills the section that opens so: the most objects in the least text, for each kind of field.
DENSE = {
    "buffers": (b'"buffers":{', b'"%x":99999'),
    "tensors": (b'"tensors":{', b'"%x":{"rows":999,"cols":999,"role":"matrix"}'),
    "plan": (BEFORE_TENSORS, b'"%x":{"format":"ab","packing":"cd"}'),
    "ops": (b'"ops":[', b'{"op":"add","a":"ab","b":"cd","out":"ef"}'),
    "cache": (b'"cache":[', b'{"kv_heads":999,"head_dim":999}'),
    "eos": (b'"eos":[', b"99999"),
    "answer": (b'"answer":[', b"99999"),
    "recipe": (b'"recipe":{', b'"%x":"ab"'),
    "sqnr": (b'"sqnr_db":{', b'"%x":1.5'),
    "origins": (b'"origins":{', b'"%x":{"key":"ab","row":99999}'),
    "targets": (b'"targets":{', b'"%x":{"rank":999,"scale":1.5}'),
    "adapters": (b'"adapters":{', b'"%x":{"part":"ab","targets":{}}'),
    "blobs": (b'"blobs":{', b'"%x":99999'),
    "device_code": (
        b'"device_code":[',
        b'{"blob":"a","kind":"ptx","sm":9,"ptx":"1.0","cuda":"1.0","nbytes":9,"kernels":{"a":'
        b'{"threads":1,"shared_bytes":0}}}',
    ),
    "planes": (b'"planes":{', b'"%x":"' + b"0" * 64 + b'"'),
    "parts": (b'"parts":{', b""),
}


def make(specimen: Specimen, name: str) -> bytes | None:
    """A whole hostile file, or None when its header would be too large to be read at all."""
    limit = HEADER_LIMIT - 4096
    match name.split():
        case ["flipped"]:
            raw = specimen.good[:3000] + b"?" + specimen.good[3001:]
        case ["data"]:
            raw = specimen.good[:-1] + b"\1"
        case ["spaces"]:
            raw = specimen.forged(b"", rows=b" " * limit)
        case ["quotes"]:
            raw = specimen.forged(b'"' * (limit // 2) + b"}", rows=b'"}')
        case ["backslashes"]:
            raw = specimen.forged(b"\\" * (limit // 2) + b"}", rows=b'"}')
        case ["deep"]:
            raw = specimen.forged(b"[" * limit + b"}", rows=b'"}')
        case ["text"]:
            raw = specimen.forged(b'{"schema":5,"name":"' + b"x" * limit + b'"}', rows=b'"}')
        case [kind, nbytes]:
            raw = specimen.forged(dense(specimen.text, kind, int(nbytes)))
        case [kind, nbytes, _]:  # with spaces for as much as `check_text` asks for, so that it is decoded
            text = dense(specimen.text, kind, int(nbytes))
            have = int.from_bytes(specimen.forged(text)[:8], "little")
            need = (memory_bound(text) - SLACK) // 2 + 8192
            raw = specimen.forged(text, rows=specimen.rows + b" " * max(0, need - have) + b"!")
    return raw if int.from_bytes(raw[:8], "little") + 8 <= HEADER_LIMIT else None


def dense(text: bytes, kind: str, nbytes: int) -> bytes:
    """The manifest with one section full of small entries, about `nbytes` of them."""
    opening, entry = DENSE[kind]
    start = text.index(opening)
    end = closing(text, start + len(opening) - 1)
    if kind == "parts":
        whole = text[start + len(opening) : end]
        entry = b'"%x"' + whole[whole.index(b":") :].replace(b"%", b"%%")
    entries, used = [], 0
    while used < nbytes:
        entries.append(entry % len(entries) if b"%x" in entry else entry)
        used += len(entries[-1]) + 1
    return text[: start + len(opening)] + b",".join(entries) + text[end:]


def closing(text: bytes, at: int) -> int:
    """Where the bracket that opens at `at` is closed (no bracket stands inside the specimen's names)."""
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] in b"{[") - (text[i] in b"}]")
        if not depth:
            return i
    raise ValueError(at)


def status(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def in_child(work: Callable[[], object]) -> Any:
    """The result of `work`, done in a forked process."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writable, json.dumps(work()).encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(writable)
    with os.fdopen(readable) as pipe:
        text = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("a child failed")
    return json.loads(text)


def refusal(path: Path) -> str:
    try:
        read_engine(path)
    except BadEngineFile as error:
        return str(error)[-80:]
    return ""


def resident(specimen: Specimen, good: Path, trim: Callable[[int], int]) -> dict[str, object]:
    """Growth of the pages that the process holds, its code's pages and the allocators' room included."""
    for verify in (True, False):  # a forked process maps the interpreter's code anew, page by page
        read_engine(good, verify)
    events: list[str] = []
    sys.addaudithook(lambda event, _: events.append(event) if event.startswith(RUNS_CODE) else None)
    gc.collect()
    trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    events.clear()
    message = refusal(specimen.path)
    seen = list(events)
    return {"resident": status("VmHWM") - before, "message": message, "events": seen}


def allocated(specimen: Specimen, good: Path) -> dict[str, object]:
    """Growth of what Python's allocators have handed out, numpy's and msgspec's share included."""
    read_engine(good)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    refusal(specimen.path)
    return {"allocated": tracemalloc.get_traced_memory()[1] - before}


def main(folder: Path) -> None:
    trim = ctypes.CDLL(None).malloc_trim
    names = ["flipped", "data", "spaces", "quotes", "backslashes", "deep", "text"]
    names += [f"{kind} {nbytes}{end}" for kind in DENSE for nbytes in SIZES for end in ("", " padded")]
    names = [name for name in names if not name.endswith("20000 padded")]  # what is small needs no padding
    rows = []
    with Specimen(folder) as specimen:
        good = folder / "specimen.edge"
        read_engine(specimen.path)

        def put(name: str) -> int:
            raw = make(specimen, name)
            if raw is None:
                return 0
            specimen.put(raw)
            return int.from_bytes(raw[:8], "little") + 8

        for name in names:
            header = in_child(lambda name=name: put(name))
            if header:
                row = {"name": name, "header": header}
                row |= in_child(lambda: resident(specimen, good, trim))
                row |= in_child(lambda: allocated(specimen, good))
                rows.append(row)
    print(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
