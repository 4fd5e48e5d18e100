"""One segment of a program on batches of windows: its weights loaded once, its rows in, its rows out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from msgspec.structs import replace
from torch import Tensor

from builders.segments import Segment
from builders.torch_program import Buffers, Hook, TorchProgram, Weight
from builders.weights import Weights, row_blocks
from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import AnyOp, Embed, Linear, Logits
from edge_runtime.engine.ops import weights as names_of
from edge_runtime.engine.program import Program

_BATCH_BYTES = {"cpu": 32 << 20, "cuda": 1 << 30}  # of all buffers; each worker needs about twice as much


def batches(program: Program, windows: int, length: int, device: str) -> list[tuple[int, int]]:
    """(first, last + 1) windows of every batch: the same on every machine."""
    token = 4 * sum(program.buffers.values())
    many = max(1, _BATCH_BYTES[device.partition(":")[0]] // (token * length))
    return [(a, min(a + many, windows)) for a in range(0, windows, many)]


def kept_after(program: Program, segments: Sequence[Segment], i: int) -> tuple[str, ...]:
    """Buffers that live on after segment i: what the next one reads, or the logits' input."""
    if i + 1 < len(segments):
        return segments[i + 1].reads
    return (program.heads[0].x,)


def load(weights: Weights, name: str, device: str) -> Tensor:
    """A whole f32 tensor on the device, in torch's own aligned memory, read block by block."""
    spec = weights.program.tensors[name]
    found = torch.empty(spec.rows, spec.cols, device=device)
    for start, stop in row_blocks(spec.rows, spec.cols):
        found[start:stop] = torch.from_numpy(weights.block(name, start, stop))
    return found


class SegmentRunner:
    """Runs segment i. Its matrices and vectors are held; of embeddings only the rows that a batch needs."""

    def __init__(self, weights: Weights, segments: Sequence[Segment], i: int, device: str) -> None:
        self.program = program = weights.program
        self._weights, self._device = weights, device
        self._ops = segments[i].ops(program)
        self._reads, self._keeps = segments[i].reads, kept_after(program, segments, i)
        self.tables = {op.weight: op.first for op in self._ops if isinstance(op, Embed)}
        needed = {name for op in self._ops if not isinstance(op, Embed) for name in names_of(op)}
        self.held = {name: load(weights, name, device) for name in sorted(needed)}

    @property
    def width(self) -> int:
        """Values a token of what the segment leaves."""
        return sum(self.program.buffers[name] for name in self._keeps)

    def run(
        self,
        tokens: Array,
        rows: Array | None,
        hook: Hook | None = None,
        replaced: Mapping[str, Tensor] | None = None,
        tables: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> Tensor:
        """Rows that the segment leaves, (windows, length, width), for token ids (windows, length) and rows
        that the one before left.

        `replaced` weights take the place of its own; `tables` give f32 rows by number in place of an
        embedding.
        """
        ops, held, ids, buffers = self._ready(tokens, rows, replaced, tables)
        with torch.no_grad():
            TorchProgram(self.program, held.__getitem__, checked=True).run(ops, buffers, ids, hook)
            return self._left(buffers)

    def slopes(
        self, tokens: Array, rows: Array | None, gradient: Tensor
    ) -> tuple[list[tuple[str, Tensor, Tensor]], list[tuple[str, Tensor]], Tensor | None]:
        """From the gradient by the rows that the segment leaves, by calculus backwards: of every linear
        (weight, its input, the gradient by its output), of every embedding (weight, the gradient by the rows
        of all tokens), and the gradient by the rows that the one before left."""
        ops, held, ids, buffers = self._ready(tokens, rows)
        before = [b.requires_grad_() for b in buffers.values()]
        program = _Recorded(self.program, held.__getitem__)
        with torch.enable_grad():  # each thread has its own switch
            program.run(ops, buffers, ids)
            wanted = [*(y for _, _, y in program.products), *(e for _, e in program.rows), *before]
            found = torch.autograd.grad(self._left(buffers), wanted, gradient, materialize_grads=True)
        slopes = iter(found)
        products = [(name, x.detach(), next(slopes)) for name, x, _ in program.products]
        looked_up = [(name, next(slopes)) for name, _ in program.rows]
        return products, looked_up, torch.cat(list(slopes), dim=-1) if before else None

    def _ready(
        self,
        tokens: Array,
        rows: Array | None,
        replaced: Mapping[str, Tensor] | None = None,
        tables: Mapping[str, Callable[[Array], Array]] | None = None,
    ) -> tuple[list[AnyOp], dict[str, Tensor], Tensor, Buffers]:
        """Ops that look the tokens up in the rows that are held of each table, weights with these, places of
        the tokens among all such rows, and buffers to begin with."""
        held = {**self.held, **(replaced or {})}
        ids = torch.empty(0)
        firsts: dict[str, int] = {}
        if self.tables:
            unique, places = np.unique(tokens, return_inverse=True)
            for name, first in self.tables.items():
                rows_of = (tables or {}).get(name) or partial(self._weights.rows, name)
                start, stop = np.searchsorted(unique, [first, first + self.program.tensors[name].rows])
                values = rows_of(unique[start:stop] - first)
                held[name] = torch.from_numpy(values).to(self._device, copy=True)
                firsts[name] = int(start)
            ids = torch.from_numpy(places.reshape(tokens.shape).astype(np.int64)).to(self._device)
        buffers: Buffers = {}
        if rows is not None:
            widths = [self.program.buffers[name] for name in self._reads]
            whole = torch.from_numpy(rows).to(self._device, copy=True)  # aligned as torch has it
            buffers = dict(zip(self._reads, torch.split(whole, widths, dim=-1), strict=True))
        ops = [replace(op, first=firsts[op.weight]) if isinstance(op, Embed) else op for op in self._ops]
        return ops, held, ids, buffers

    def _left(self, buffers: Buffers) -> Tensor:
        kept = [buffers[name] for name in self._keeps]
        return kept[0] if len(kept) == 1 else torch.cat(kept, dim=-1)


class _Recorded(TorchProgram):
    """Remembers what linears read and gave, and rows that were looked up."""

    def __init__(self, program: Program, weight: Weight) -> None:
        super().__init__(program, weight, checked=True)
        self.products: list[tuple[str, Tensor, Tensor]] = []
        self.rows: list[tuple[str, Tensor]] = []

    def product(self, op: Linear | Logits, x: Tensor) -> Tensor:
        y = super().product(op, x)
        self.products.append((op.weight, x, y))
        return y

    def embedded(self, op: Embed, tokens: Tensor) -> Tensor:
        found = super().embedded(op, tokens).requires_grad_()
        self.rows.append((op.weight, found))
        return found
