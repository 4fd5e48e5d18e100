"""Channel scales merged into a model: the same f32 function with weights that round better.

Linears that read the same values are scaled together: their columns by s, and what makes the values by 1/s.
That is exact for a norm (its weight and bias), for the `up` rows of a gated unit (linear in them), for rows
before a relu, and for the rows of v before o: attention averages values with weights that do not depend on
them, and query heads of one key/value head share its s. Everything else is left alone, and said so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from builders.quantize import AlgorithmOptions, ChannelScaler
from builders.sources.matrix import Stored
from builders.statistics import InputStatistics
from builders.weights import Model
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.ops import (
    Activation,
    AnyOp,
    Attention,
    KvAppend,
    Linear,
    Logits,
    Norm,
    reads,
    writes,
)
from edge_runtime.engine.ops import weights as tensors_of
from edge_runtime.engine.program import Program

Value = tuple[str, int]  # a buffer, and which of its versions


@dataclass(frozen=True, slots=True, eq=False)
class ScaleGroup:
    """`linears` read the same values. `sources` are the tensors that absorb 1/s: vectors along their columns,
    matrices along their rows. ties (cols,): the number of each column's channel in the sources, or None where
    it is the column."""

    linears: tuple[str, ...]
    sources: tuple[str, ...]
    ties: Array | None = None


@dataclass(frozen=True, slots=True)
class Unscaled:
    """Linears whose inputs cannot be scaled, and why."""

    linears: tuple[str, ...]
    reason: str


class ScaledWeights:
    """`Weights` of the same program with channel scales merged in.

    `changed`: tensors that differ, for whom an adapter's factors would mean something else. `scales`: of
    linears, s f32 (cols,): their statistics are `statistics.scaled(s)`.
    """

    def __init__(self, inner: Model) -> None:
        self.program = inner.program
        self.scales: dict[str, Array] = {}
        self._inner = inner
        self._rows: dict[str, Array] = {}
        self._cols: dict[str, Array] = {}

    @property
    def changed(self) -> frozenset[str]:
        return frozenset(self._rows) | frozenset(self._cols)

    def scale(self, group: ScaleGroup, s: Array) -> None:
        """Merge s f32 (cols,), positive and equal where the group's columns are tied. Once for each group."""
        s = np.asarray(s, np.float32)
        own = s
        if group.ties is not None:
            own = np.empty(int(group.ties.max()) + 1, np.float32)
            own[group.ties] = s
        for name in group.linears:
            self.scales[name] = self._cols[name] = s
        for name in group.sources:
            kept = self._cols if self.program.tensors[name].role == "vector" else self._rows
            kept[name] = np.float32(1) / own

    def inputs(self, name: str, found: InputStatistics | None) -> InputStatistics | None:
        """Statistics of the scaled inputs of a linear, from those of the model as it was."""
        s = self.scales.get(name)
        return found if s is None or found is None else found.scaled(s)

    def row_importance(self, name: str, found: Array) -> Array:
        """How much its rows matter, from how much they did in the model as it was."""
        scale = self._rows.get(name)
        return found if scale is None else found / np.square(scale)

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        return self._scaled(name, self._inner.block(name, start, stop), slice(start, stop))

    def rows(self, name: str, ids: Array) -> Array:
        return self._scaled(name, self._inner.rows(name, ids), ids)

    def stored(self, name: str, fmt: str) -> Stored | None:
        """The checkpoint's own planes, of a tensor that is as it was."""
        return None if name in self.changed else self._inner.stored(name, fmt)

    def _scaled(self, name: str, values: Array, which: slice | Array) -> Array:
        if name in self._cols:
            values = values * self._cols[name]
        if name in self._rows:
            values = values * self._rows[name][which, None]
        return values


def equalize(
    weights: Model,
    scaler: ChannelScaler,
    formats: Mapping[str, Format],
    statistics: Callable[[str], InputStatistics | None],
    options: AlgorithmOptions,
) -> ScaledWeights:
    """Scale every group that can be, with its matrices in memory one group at a time.

    formats: of every tensor; groups of floats alone are left as they are. statistics: of a linear's inputs by
    the name of its weight.
    """
    scaled = ScaledWeights(weights)
    groups, _ = scale_groups(weights.program)
    for group in groups:
        chosen = [formats[name] for name in group.linears]
        inputs = statistics(group.linears[0])
        if inputs is None or all(fmt.affine is None for fmt in chosen):
            continue
        s = scaler.scale_inputs([scaled(n) for n in group.linears], chosen, inputs, options, group.ties)
        if not np.all(s == 1):
            scaled.scale(group, s)
    return scaled


def scale_groups(program: Program) -> tuple[list[ScaleGroup], list[Unscaled]]:
    """Groups of linears (and the head) whose inputs can be scaled exactly, and those that cannot."""
    flow = _Flow(program)
    groups, left = [], []
    for value, readers in flow.readers.items():
        linears = tuple(op.weight for op in readers if isinstance(op, Linear | Logits))
        if not linears:
            continue
        found = flow.sources(value, readers, linears)
        if isinstance(found, str):
            left.append(Unscaled(linears, found))
        else:
            groups.append(ScaleGroup(linears, *found))
    return groups, left


class _Flow:
    """Which op makes each value, and which ops read it."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.writer: dict[Value, AnyOp] = {}
        self.read: dict[int, dict[str, Value]] = {}  # by identity of the op: buffer -> value that it reads
        self.readers: dict[Value, list[AnyOp]] = {}
        self.uses: dict[str, int] = {}
        version: dict[str, int] = {}
        for op in program.ops:
            now = {name: (name, version.get(name, 0)) for name in reads(op)}
            self.read[id(op)] = now
            for value in now.values():
                self.readers.setdefault(value, []).append(op)
            for name in writes(op):
                version[name] = version.get(name, 0) + 1
                self.writer[name, version[name]] = op
            for name in tensors_of(op):
                self.uses[name] = self.uses.get(name, 0) + 1

    def sources(
        self, value: Value, readers: list[AnyOp], linears: tuple[str, ...]
    ) -> tuple[tuple[str, ...], Array | None] | str:
        """(tensors that absorb 1/s, ties), or why there are none."""
        if len(linears) != len(readers):
            return "other ops than linears read the same values"
        if shared := [name for name in linears if self.uses[name] > 1]:
            return f"{shared[0]} is used elsewhere too"
        op = self.writer.get(value)
        match op:
            case Norm() if op.group in (0, self.program.buffers[op.x]):
                return self._own((op.weight, op.bias))
            case Activation(up=str(up)):
                return self._rows_of(op, up)
            case Activation(kind="relu"):
                return self._rows_of(op, op.x)
            case Attention():
                return self._values_of(op)
        return f"they come from {'outside' if op is None else 'an op: ' + type(op).__name__.lower()}"

    def _own(self, names: tuple[str | None, ...]) -> tuple[tuple[str, ...], None] | str:
        found = tuple(name for name in names if name is not None)
        if shared := [name for name in found if self.uses[name] > 1]:
            return f"{shared[0]} is used elsewhere too"
        return found, None

    def _rows_of(self, reader: AnyOp, buffer: str) -> tuple[tuple[str, ...], None] | str:
        """The linear that makes what `reader` reads from `buffer`, if nobody else reads it."""
        value = self.read[id(reader)][buffer]
        op = self.writer.get(value)
        if not isinstance(op, Linear):
            return f"{buffer!r} is not the output of a linear"
        if len(self.readers[value]) != 1:
            return f"{buffer!r} is read by other ops too"
        return self._own((op.weight, op.bias))

    def _values_of(self, attention: Attention) -> tuple[tuple[str, ...], Array] | str:
        ops = self.program.ops
        if sum(isinstance(op, Attention) and op.layer == attention.layer for op in ops) != 1:
            return "several attentions read the same keys and values"
        append = next(op for op in ops if isinstance(op, KvAppend) and op.layer == attention.layer)
        found = self._rows_of(append, append.v)
        if isinstance(found, str):
            return found
        head = np.arange(attention.heads) // (attention.heads // attention.kv_heads)
        ties = head[:, None] * attention.head_dim + np.arange(attention.head_dim)
        return found[0], ties.reshape(-1)
