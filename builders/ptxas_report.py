"""What ptxas says of every kernel with -v: registers, shared memory, stack and spills, in NVRTC's log.

    ptxas info    : Compiling entry function 'k' for 'sm_87'
    ptxas info    : Function properties for k
    ptxas         .     64 bytes stack frame, 104 bytes spill stores, 120 bytes spill loads
    ptxas info    : Used 64 registers, used 1 barriers, 512 bytes smem, 372 bytes cmem[0]

The same from CUDA 12.4 to 13.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edge_runtime.errors import BuildError

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)\w*'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers\b(.*)")
_SHARED = re.compile(r"\b(\d+) bytes smem")


@dataclass(frozen=True, slots=True)
class Usage:
    """Of a kernel: registers of a thread; bytes of a block's shared memory, as far as known when compiled;
    bytes of a thread's stack, and of the registers that it writes to and reads from there."""

    registers: int
    shared_bytes: int
    stack_bytes: int
    spill_stores: int
    spill_loads: int


def read_report(log: str) -> dict[str, Usage]:
    """symbol -> usage. Raises BuildError for a kernel of which the log does not tell all."""
    found: dict[str, Usage] = {}
    marks = list(_ENTRY.finditer(log))
    ends = [mark.start() for mark in marks[1:]] + [len(log)]
    for mark, end in zip(marks, ends, strict=False):
        text = log[mark.end() : end]
        # A function that is not inlined has a frame of its own, before or after the kernel's line "Used"
        frames, used = list(_FRAME.finditer(text)), _USED.search(text)
        if used is None or not frames:
            raise BuildError(f"the compiler says nothing of {mark[1]}'s registers: {text.strip()[:200]!r}")
        shared = _SHARED.search(used[2])
        stack, stores, loads = (max(int(f[i]) for f in frames) for i in (1, 2, 3))
        found[mark[1]] = Usage(int(used[1]), int(shared[1]) if shared else 0, stack, stores, loads)
    return found
