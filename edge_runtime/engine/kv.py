"""The KV cache's numbers: which formats it may have, and the arrays that one arena holds for a program.

A row is the head_dim values of one (token, kv head), encoded as a one-row matrix of a registered format, so
sizes and codec come from the same record as the weights'.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from edge_runtime.engine.formats import ENCODINGS, Format, get_format
from edge_runtime.errors import BadConfig, nearest

if TYPE_CHECKING:  # the C header is generated from this file where msgspec may be missing
    from edge_runtime.engine.plan import KvPlan
    from edge_runtime.engine.program import Program

# Cache name -> format. int4 has zero points: values (V above all) are not centred, and a row is short.
KV_FORMATS: dict[str, str] = {
    "f32": "f32",  # exact: for the oracle and for evaluation, too wide to ship
    "f16": "f16",
    "int8": "int8_row",
    "int4": "int4_g32_zp",
    "fp8": "fp8_e4m3_row",
}
PAGE_TOKENS = (16, 32)


@dataclass(frozen=True, slots=True)
class CacheArray:
    """One array of the arena: shape (pages, kv_heads, page_tokens, items) of a plane's storage dtype."""

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


def kv_format(name: str) -> Format:
    """The format behind a cache name. Raises BadConfig naming the nearest valid one."""
    if name not in KV_FORMATS:
        raise BadConfig(f"unknown KV format {name!r}; {nearest(name, KV_FORMATS)}")
    return get_format(KV_FORMATS[name])


def kv_pair(text: str) -> tuple[str, str]:
    """Cache names of K and V from "int8" (both) or "f16,int8". Raises BadConfig."""
    names = [name.strip() for name in text.split(",")]
    if len(names) not in (1, 2):
        raise BadConfig(f"KV formats {text!r:.60}: expected one, or K,V such as f16,int8")
    for name in names:
        kv_format(name)
    return names[0], names[-1]


def cache_arrays(program: Program, kv: KvPlan) -> list[CacheArray]:
    """Every array of the arena, in arena order (layer, k then v, plane order)."""
    if kv.page_tokens not in PAGE_TOKENS:
        raise BadConfig(f"kv.page_tokens is {kv.page_tokens}, expected one of {PAGE_TOKENS}")
    arrays: list[CacheArray] = []
    sides: tuple[tuple[Literal["k", "v"], str], ...] = (("k", kv.k), ("v", kv.v))
    for layer, slot in enumerate(program.cache):
        for which, name in sides:
            for plane in kv_format(name).planes:
                items = plane.shape(1, slot.head_dim)[1]
                dtype = ENCODINGS[plane.encoding].dtype
                shape = (kv.pages, slot.kv_heads, kv.page_tokens, items)
                arrays.append(CacheArray(layer, which, plane.name, shape, dtype))
    return arrays


def cache_nbytes(program: Program, kv: KvPlan) -> int:
    """Bytes of the arena, each array rounded up to 64."""
    return sum(-(-a.nbytes // 64) * 64 for a in cache_arrays(program, kv))
