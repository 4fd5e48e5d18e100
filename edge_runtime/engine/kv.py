"""The KV cache's numbers: which formats it may have, and the arrays that one arena holds for a program.

A row is the head_dim values of one (token, kv head), encoded as a one-row matrix of a registered format, so
sizes and codec come from the same record as the weights'. Keys may also be kept per channel (KIVI, Liu et al.
2024), for models with a few large channels in K: a page of one kv head is then the matrix (head_dim,
page_tokens) with a scale for each channel. It is quantized when it is full; a token sees the keys of its own
page as they came and those of earlier pages quantized, which depends on nothing but its position.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edge_runtime.engine.formats import ENCODINGS, Format, get_format
from edge_runtime.errors import BadConfig, nearest

if TYPE_CHECKING:  # the C header is generated from this file where msgspec may be missing
    from edge_runtime.engine.plan import KvPlan, StepShape
    from edge_runtime.engine.program import Program

# Cache name -> format. int4 has zero points: values (V above all) are not centred, and a row is short.
KV_FORMATS: dict[str, str] = {
    "f32": "f32",  # exact: for the oracle and for evaluation, too wide to ship
    "f16": "f16",
    "int8": "int8_row",
    "int4": "int4_g32_zp",
    "fp8": "fp8_e4m3_row",
}
# Of keys alone. A group of 32 holds a channel's values of a page of 16 or 32 tokens: one scale each.
CHANNEL_FORMATS: dict[str, str] = {"int8c": "int8_g32", "int4c": "int4_g32_zp"}
K_FORMATS: dict[str, str] = {**KV_FORMATS, **CHANNEL_FORMATS}
PAGE_TOKENS = (16, 32)
# Pages that a sequence keeps unquantized: the step's last two, where a roll-back may land, and the one in
# which the step began, so that a step that failed can be run again.
OPEN_PAGES = 3


@dataclass(frozen=True, slots=True)
class CacheArray:
    """One array of the arena: shape (pages, kv_heads, rows, items) of a plane's storage dtype.

    Rows are page_tokens, or head_dim where K is per channel.
    """

    layer: int
    which: Literal["k", "v"]
    plane: str
    shape: tuple[int, int, int, int]
    dtype: str

    @property
    def nbytes(self) -> int:
        n = 1
        for d in self.shape:
            n *= d
        return n * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class OpenArrays:
    """Shapes, all f32, of the unquantized keys that a per-channel K needs beside its pages.

    pages: one a layer, (sequences * OPEN_PAGES, page_tokens, kv_heads * head_dim). fresh: the keys of the
    running step, (step.tokens, kv_heads * head_dim of the widest layer), used by one layer after the other.
    """

    pages: tuple[tuple[int, int, int], ...]
    fresh: tuple[int, int]


def per_channel(name: str) -> bool:
    """Whether a cache name is of keys that are quantized per channel."""
    return name in CHANNEL_FORMATS


def kv_format(name: str) -> Format:
    """The format behind a cache name. Raises BadConfig naming the nearest valid one."""
    if name not in K_FORMATS:
        raise BadConfig(f"unknown KV format {name!r}; {nearest(name, K_FORMATS)}")
    return get_format(K_FORMATS[name])


def v_format(name: str) -> Format:
    """The format behind a cache name of values. Raises BadConfig for an unknown one and for one of keys."""
    if per_channel(name):
        raise BadConfig(
            f"V cannot be {name!r}: per channel is for K, whose outliers keep to channels; "
            f"use {name},{_per_token(name)}"
        )
    return kv_format(name)


def row_nbytes(name: str, head_dim: int, page_tokens: int) -> float:
    """Bytes of one token's keys or values of one kv head: its row, or its share of a per-channel page."""
    fmt = kv_format(name)
    return fmt.nbytes(head_dim, page_tokens) / page_tokens if per_channel(name) else fmt.nbytes(1, head_dim)


def kv_pair(text: str) -> tuple[str, str]:
    """Cache names of K and V from "int8" (both) or "f16,int8"; "int4c" is K, with V in int4.

    Raises BadConfig.
    """
    names = [name.strip() for name in text.split(",")]
    if len(names) not in (1, 2):
        raise BadConfig(f"KV formats {text!r:.60}: expected one, or K,V such as f16,int8")
    k, v = names[0], names[1] if len(names) == 2 else _per_token(names[0])
    kv_format(k)
    v_format(v)
    return k, v


def _per_token(name: str) -> str:
    """The cache of the same width with a scale a token: the c stands for channel."""
    return name.removesuffix("c") if per_channel(name) else name


def cache_arrays(program: Program, kv: KvPlan) -> list[CacheArray]:
    """Every array of pages, in arena order (layer, k then v, plane order). Raises BadConfig."""
    if kv.page_tokens not in PAGE_TOKENS:
        raise BadConfig(f"kv.page_tokens is {kv.page_tokens}, expected one of {PAGE_TOKENS}")
    arrays: list[CacheArray] = []
    k, v = kv_format(kv.k), v_format(kv.v)
    for layer, slot in enumerate(program.cache):
        by_token, by_channel = (kv.page_tokens, slot.head_dim), (slot.head_dim, kv.page_tokens)
        sides: tuple[tuple[Literal["k", "v"], Format, tuple[int, int]], ...] = (
            ("k", k, by_channel if per_channel(kv.k) else by_token),
            ("v", v, by_token),
        )
        for which, fmt, matrix in sides:
            for plane in fmt.planes:
                shape = (kv.pages, slot.kv_heads, *plane.shape(*matrix))
                arrays.append(CacheArray(layer, which, plane.name, shape, ENCODINGS[plane.encoding].dtype))
    return arrays


def open_arrays(program: Program, kv: KvPlan, step: StepShape) -> OpenArrays | None:
    """What a per-channel K needs beside its pages; None for the other caches."""
    if not per_channel(kv.k) or not program.cache:
        return None
    widths = [slot.kv_heads * slot.head_dim for slot in program.cache]
    entries = step.sequences * OPEN_PAGES
    return OpenArrays(
        pages=tuple((entries, kv.page_tokens, width) for width in widths), fresh=(step.tokens, max(widths))
    )


def cache_nbytes(program: Program, kv: KvPlan, step: StepShape) -> int:
    """Bytes of the arena: pages and unquantized keys, each array rounded up to 64."""
    sizes = [a.nbytes for a in cache_arrays(program, kv)]
    beside = open_arrays(program, kv, step)
    if beside is not None:
        sizes += [4 * entries * tokens * width for entries, tokens, width in beside.pages]
        sizes.append(4 * beside.fresh[0] * beside.fresh[1])
    return sum(-(-n // 64) * 64 for n in sizes)
