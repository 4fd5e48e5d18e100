"""How large the checks are: on a GPU, and in the emulator, which proves that the scripts themselves work."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from gpu_code import EMULATED
from gpu_models import LLAMA_8B, Shape

from edge_runtime.engine.device_code import Kernel


@dataclass(frozen=True, slots=True)
class Sizes:
    """matrices: (rows, columns) of those that are timed. working_set: bytes of each timed set of copies at
    least, and at least so many times the L2. copy_nbytes: of the copy that gives the bandwidth."""

    formats: tuple[str, ...]
    caches: tuple[str, ...]
    matrices: tuple[tuple[int, int], ...]
    goal_matrices: tuple[tuple[int, int], ...]
    working_set: int
    times_l2: int
    copy_nbytes: int
    prompt: int
    context: int
    llama: Shape
    attention: Shape
    decoded: int  # tokens of a timed decode
    rounds: int
    toy: Shape


TOY = Shape("toy", 128, 2, 4, 2, 192, 160, 96)
FULL = Sizes(
    formats=("int4_g64", "int8_row", "f16"),
    caches=("f16", "int8", "int4", "fp8"),
    matrices=((4096, 4096), (4096, 14336), (14336, 4096), (6144, 4096), (28672, 4096)),
    goal_matrices=((4096, 4096), (4096, 14336)),
    working_set=1 << 29,
    times_l2=8,
    copy_nbytes=2 << 30,
    prompt=2048,
    context=32768,
    llama=LLAMA_8B,
    attention=LLAMA_8B,
    decoded=128,
    rounds=7,
    toy=TOY,
)
TINY = Sizes(
    formats=("int4_g64",),
    caches=("f16", "int4"),
    matrices=((32, 128),),
    goal_matrices=((32, 128),),
    working_set=1 << 13,
    times_l2=0,
    copy_nbytes=1 << 16,
    prompt=70,
    context=300,
    llama=Shape("tiny", 64, 1, 2, 1, 64, 96, 160),
    attention=Shape("tiny", 64, 1, 2, 1, 64, 96, 300),
    decoded=3,
    rounds=2,
    toy=Shape("toy", 64, 1, 2, 1, 64, 96, 96),
)
SIZES = TINY if EMULATED else FULL


@functools.lru_cache(1)
def tiny_kernels() -> tuple[Kernel, ...]:
    """Every kernel that a check in the emulator launches: compiled once, in one unit."""
    from gpu_models import attentions, formats_of, llama, matrices

    from edge_runtime.engine.launches import kernels_of
    from edge_runtime.engine.lowering import lower
    from edge_runtime.engine.plan import KvPlan

    found: dict[str, Kernel] = {}
    programs = [(llama(TINY.llama), "int8"), (matrices(*TINY.matrices[0], 2), "int8")]
    programs += [(attentions(TINY.attention, 1, TINY.context), kv) for kv in TINY.caches]
    for program, kv in programs:
        plan = KvPlan(k=kv, v=kv, page_tokens=16, pages=1)
        for kernel in kernels_of(lower(program, formats_of(program, "int4_g64"), plan)):
            found[kernel.symbol] = kernel
    return tuple(found[symbol] for symbol in sorted(found))
