"""Act-order at build time: inputs are put in the order of a quantized matrix' columns by a Gather before it.

GPTQ may quantize columns by falling importance ("desc_act" of Frantar et al. 2210.17323), so that its groups
are no runs of columns. Stored in the order of their groups they are, and W x = W[:, order] x[order].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import msgspec
import numpy as np

from builders.architecture import Architecture, TensorSource
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import AnyOp, Gather, Linear, writes
from edge_runtime.engine.program import TensorSpec


def order_inputs(architecture: Architecture, orders: Mapping[str, Array]) -> Architecture:
    """`orders`: checkpoint tensor -> (cols,) input of each column. Linears that read the same input in the
    same order share one Gather. Raises BadConfig where an order does not fit its matrix.
    """
    program, sources = architecture.program, dict(architecture.sources)
    tensors, buffers = dict(program.tensors), dict(program.buffers)
    named: dict[bytes, str] = {}  # an order's tensor
    ready: dict[str, str] = {}  # buffer -> the order in which its ordered copy is
    ops: list[AnyOp] = []
    for op in program.ops:
        made = sources[op.weight] if isinstance(op, Linear) else None
        if isinstance(op, Linear) and made is not None and made.key in orders:
            order = orders[made.key]
            copy = f"{op.x}.ordered"
            name = named.setdefault(order.tobytes(), f"order.{len(named)}")
            if name not in tensors:
                tensors[name] = TensorSpec(1, len(order), "vector")
                sources[name] = TensorSource("", constant=order.astype(np.float32))
            if ready.get(copy) != name:
                buffers[copy] = buffers[op.x]
                ops.append(Gather(x=op.x, out=copy, order=name))
                ready[copy] = name
            sources[op.weight] = replace(made, columns=order)
            op = msgspec.structs.replace(op, x=copy)
        ops.append(op)
        for written in writes(op):
            ready.pop(f"{written}.ordered", None)
    if not named:
        return architecture
    ordered = msgspec.structs.replace(program, ops=tuple(ops), tensors=tensors, buffers=buffers)
    ordered.check()
    return Architecture(ordered, sources)
