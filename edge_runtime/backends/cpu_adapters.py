"""Low-rank adapters as the native kernels read them, each in one block of memory of its own."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.backends import cpu_records as rec
from edge_runtime.backends.cpu_program import allocate
from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.formats import Array
from edge_runtime.engine.layout import round_up
from edge_runtime.engine.memory import RANK_ROWS, adapter_nbytes, low_rank_layout
from edge_runtime.engine.ops import Linear, Logits
from edge_runtime.engine.plan import StepShape
from edge_runtime.engine.program import Program

LANES = 16


@dataclass(slots=True)
class CpuAdapter:
    """A record for `edge_cpu_set_adapter` and the bytes that it points to."""

    record: rec.Adapter
    memory: Array  # u8

    @property
    def nbytes(self) -> int:
        return int(self.memory.nbytes)


def pack_adapter(adapter: Adapter, program: Program, step: StepShape) -> CpuAdapter:
    """Copy a checked adapter: A in tiles, B in panels of sixteen rows, and room for A x."""
    ranks = {name: low.rank for name, low in adapter.items()}
    offsets, stride = low_rank_layout(program, ranks)
    memory = allocate(adapter_nbytes(program, step, ranks))
    base, at = memory.ctypes.data, 0

    def put(values: Array) -> int:
        nonlocal at
        memory[at : at + values.nbytes] = values.reshape(-1).view(np.uint8)
        start = base + at
        at += round_up(values.nbytes)
        return start

    places = {name: (put(_tiles(low.a, RANK_ROWS)), put(_panels(low.b))) for name, low in adapter.items()}
    items = [
        rec.LowRank(
            op=i,
            rank=ranks[op.weight],
            offset=offsets[i],
            scale=adapter[op.weight].scale,
            a=places[op.weight][0],
            b=places[op.weight][1],
        )
        for i, op in enumerate(program.ops)
        if isinstance(op, Linear | Logits) and op.weight in adapter
    ]
    record = rec.Adapter(
        items=(rec.LowRank * len(items))(*items), u=base + at, stride=stride, count=len(items)
    )
    return CpuAdapter(record, memory)


def _tiles(a: Array, rows: int) -> Array:
    """A (rank, cols) f16 as (rank / rows, cols / 16, rows, 16), padded with zeros."""
    rank, cols = a.shape
    out = np.zeros((-(-rank // rows) * rows, -(-cols // LANES) * LANES), np.float16)
    out[:rank, :cols] = a
    return np.ascontiguousarray(out.reshape(-1, rows, out.shape[1] // LANES, LANES).transpose(0, 2, 1, 3))


def _panels(b: Array) -> Array:
    """B (rows, rank) f16 as (rows / 16, rank, 16), padded with zeros."""
    rows, rank = b.shape
    out = np.zeros((-(-rows // LANES) * LANES, rank), np.float16)
    out[:rows] = b
    return np.ascontiguousarray(out.reshape(-1, LANES, rank).transpose(0, 2, 1))
