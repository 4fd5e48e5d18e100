"""A slow reading of what launches mean, in numpy and f64: for the tests of lowering.

Buffers share bytes as layout.py lays them out, and of each launch it is proved that its blocks may run in any
order. `check_meaning` compares with the program's ops, one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edge_runtime.backends import numpy_ops
from edge_runtime.engine.formats import Array
from edge_runtime.engine.launches import (
    LOGITS,
    MATRICES,
    ROWS,
    AnglesLaunch,
    AppendLaunch,
    AttentionLaunch,
    EmbedLaunch,
    Launch,
    LinearLaunch,
    Lowered,
    PrepareLaunch,
    RotateLaunch,
    RowLaunch,
)
from edge_runtime.engine.layout import lay_out
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    Gather,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
    Round,
)
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program

KV = KvPlan(k="int8", v="int8", page_tokens=16, pages=4)
TOKENS, WIDE = 5, np.float64
LOGIT_ROWS = np.array([1, 4])


@dataclass
class World:
    """What a step starts from: tensors by name, ids, inputs."""

    program: Program
    values: dict[str, Array]
    tokens: Array
    inputs: Array
    cache: dict[int, tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, seed: int = 0) -> World:
        rng = np.random.default_rng(seed)
        values = {}
        for name, spec in program.tensors.items():
            values[name] = rng.normal(0, spec.cols**-0.5, (spec.rows, spec.cols))
            if spec.role == "vector":
                values[name] = 1 + 0.3 * values[name]
        for op in program.ops:
            if isinstance(op, Gather):
                values[op.order] = rng.integers(0, program.buffers[op.x], (1, program.buffers[op.out]))
            if isinstance(op, Rope):
                values[op.inv_freq] = rng.uniform(0.1, 1, (1, program.tensors[op.inv_freq].cols))
        tokens = rng.integers(0, program.vocab_size, TOKENS)
        return cls(program, values, tokens, rng.standard_normal((TOKENS, program.input_width or 1)))

    def vector(self, name: str | None) -> Array:
        return np.zeros(1) if name is None else self.values[name][0]

    def looked_up(self, weight: str, first: int) -> tuple[Array, Array]:
        """Which tokens a block of the vocabulary has rows for, and the rows."""
        table, ids = self.values[weight], self.tokens - first
        here = (ids >= 0) & (ids < len(table))
        return here, table[ids[here]]

    def attend(self, op: Attention, q: Array) -> Array:
        k, v = (side.reshape(TOKENS, op.kv_heads, op.head_dim) for side in self.cache[op.layer])
        out = np.empty((TOKENS, op.heads, op.head_dim))
        for t, h in np.ndindex(TOKENS, op.heads):
            kv = h // (op.heads // op.kv_heads)
            score = op.scale * k[: t + 1, kv] @ q.reshape(TOKENS, op.heads, op.head_dim)[t, h]
            share = np.exp(score - score.max())
            out[t, h] = share / share.sum() @ v[: t + 1, kv]
        return out.reshape(TOKENS, -1)


def normed(x: Array, weight: Array, bias: Array, eps: float, kind: str, group: int) -> Array:
    runs = x.reshape(len(x), -1, group)
    if kind == "layer":
        runs = runs - runs.mean(axis=2, keepdims=True)
    runs = runs / np.sqrt((runs**2).mean(axis=2, keepdims=True) + eps)
    return np.asarray((runs * weight + bias).reshape(x.shape))


def activated(x: Array, kind: Any) -> Array:
    match kind:
        case "silu":
            return np.asarray(x / (1 + np.exp(-x)))
        case "relu":
            return np.maximum(x, 0)
        case _:
            return np.asarray(numpy_ops.activation(x.astype(np.float32), kind), WIDE)


def rotated(x: Array, freqs: Array, head_dim: int, scale: float) -> Array:
    heads, n = x.reshape(TOKENS, -1, head_dim).copy(), len(freqs)
    angle = np.arange(TOKENS)[:, None] * freqs
    cos, sin = scale * np.cos(angle)[:, None], scale * np.sin(angle)[:, None]
    low, high = heads[..., :n].copy(), heads[..., n : 2 * n].copy()
    heads[..., :n], heads[..., n : 2 * n] = low * cos - high * sin, high * cos + low * sin
    return heads.reshape(x.shape)


def plain(world: World) -> tuple[Array, Array]:
    """Logits and hidden rows of the ops, one after the other."""
    b: dict[str, Array] = {}
    logits = []
    for op in world.program.ops:
        match op:
            case Embed():
                if op.first == 0:
                    b[op.out] = np.empty((TOKENS, world.program.buffers[op.out]))
                here, rows = world.looked_up(op.weight, op.first)
                b[op.out][here] = rows * op.scale
            case Input():
                b[op.out] = world.inputs
            case Norm():
                group = op.group or b[op.x].shape[1]
                weight, bias = world.vector(op.weight), world.vector(op.bias)
                b[op.out] = normed(b[op.x], weight, bias, op.eps, op.kind, group)
            case Linear():
                b[op.out] = b[op.x] @ world.values[op.weight].T + world.vector(op.bias)
            case Rope():
                b[op.x] = rotated(b[op.x], world.vector(op.inv_freq), op.head_dim, op.scale)
            case KvAppend():
                world.cache[op.layer] = b[op.k], b[op.v]
            case Attention():
                b[op.out] = world.attend(op, b[op.q])
            case Activation():
                b[op.out] = activated(b[op.x], op.kind) * (b[op.up] if op.up else 1)
            case Add():
                b[op.out] = b[op.a] + op.scale * b[op.b]
            case Gather():
                b[op.out] = b[op.x][:, world.vector(op.order).astype(int)]
            case Round():
                b[op.out] = np.sin(b[op.x])  # any function of a row will do
            case Logits():
                hidden = b[op.x][LOGIT_ROWS]
                logits.append(op.scale * (hidden @ world.values[op.weight].T + world.vector(op.bias)))
    return np.concatenate(logits, axis=1), hidden


class Device:
    """Runs launches in one block of memory, buffers where layout.py puts them."""

    def __init__(self, world: World, lowered: Lowered, formats: dict[str, str]) -> None:
        self.world, self.lowered, self.formats = world, lowered, formats
        shape = StepShape(context=64, sequences=1, tokens=TOKENS, logits=len(LOGIT_ROWS))
        layout = lay_out(world.program, shape)
        self.widths = world.program.buffers
        self.at = {name: offset // 4 for name, offset in layout.offsets.items()}
        self.memory = np.full(layout.nbytes // 4, np.nan, WIDE)
        # Rows and logits
        self.own = {LOGITS: np.full((len(LOGIT_ROWS), world.program.vocab_size), np.nan, WIDE)}
        self.inputs: tuple[str, Array] | None = None  # of linears: kind and values

    def get(self, name: str | None) -> Array:
        if name is None:
            return np.zeros(1)
        if name in self.own:
            return self.own[name]
        return self.memory[self._range(name)].reshape(TOKENS, -1).copy()

    def put(self, name: str, values: Array, first: int = 0) -> None:
        """first: of the columns, in the logits."""
        if name == LOGITS:
            self.own[name][:, first : first + values.shape[1]] = values
        elif name == ROWS:
            self.own[name] = values
        else:
            self.memory[self._range(name)] = values.reshape(-1)

    def _range(self, name: str) -> slice:
        return slice(self.at[name], self.at[name] + TOKENS * self.widths[name])

    def prove(self, reads: list[str | None], writes: list[str | None], *, by_value: bool) -> None:
        """No byte that is written is read or written elsewhere in the launch. by_value: in place is well."""
        out = [name for name in writes if name is not None and name not in (ROWS, LOGITS)]
        for i, w in enumerate(out):
            for name in [*reads, *out[:i]]:
                if name is None or name in (ROWS, LOGITS):
                    continue
                same = by_value and self.at[w] == self.at[name] and self.widths[w] == self.widths[name]
                a, b = self._range(w), self._range(name)
                assert (same and name in reads) or a.stop <= b.start or b.stop <= a.start, (w, name)

    def run(self) -> tuple[Array, Array]:
        for launch in self.lowered.launches:
            self.launch(launch)
        return self.own[LOGITS], self.own[ROWS]

    def launch(self, launch: Launch) -> None:
        world = self.world
        match launch:
            case EmbedLaunch():
                out = self.get(launch.out)
                here, rows = world.looked_up(launch.weight, launch.first)
                out[here] = rows * launch.scale
                self.put(launch.out, out)
            case PrepareLaunch():
                self.prove([launch.x, launch.y], [launch.out], by_value=True)
                self.prepare(launch)
            case LinearLaunch():
                self.prove([p.add for p in launch.products], [p.out for p in launch.products], by_value=True)
                self.products(launch)
            case RowLaunch():
                self.prove([launch.x, launch.y], [launch.out], by_value=launch.per != "tokens")
                self.row(launch)
            case AnglesLaunch():
                assert self.lowered.tables[launch.table] == (launch.inv_freq, launch.scale)
            case AppendLaunch():
                self.prove([launch.value], [launch.q, launch.key if launch.table is not None else None],
                           by_value=False)  # fmt: skip
                self.append(launch)
            case RotateLaunch():
                head_dim = self.widths[launch.x] // launch.heads
                self.rotate(launch.x, launch.table, head_dim)
            case AttentionLaunch():
                self.prove([launch.op.q], [launch.op.out], by_value=True)
                self.put(launch.op.out, world.attend(launch.op, self.get(launch.op.q)))

    def rotate(self, name: str, table: int, head_dim: int) -> None:
        inv_freq, scale = self.lowered.tables[table]
        self.put(name, rotated(self.get(name), self.world.vector(inv_freq), head_dim, scale))

    def append(self, launch: AppendLaunch) -> None:
        head_dim = self.widths[launch.key] // launch.kv_heads
        if launch.table is not None:
            for name in filter(None, (launch.q, launch.key)):
                self.rotate(name, launch.table, head_dim)
        else:
            assert launch.q is None
        self.world.cache[launch.layer] = self.get(launch.key), self.get(launch.value)

    def prepare(self, launch: PrepareLaunch) -> None:
        x = self.get(launch.x)
        source = launch.kernel.symbol.removeprefix("prepare_").rsplit(f"_{launch.kind}_", 1)[0]
        if launch.rows == "logits":
            x = x[LOGIT_ROWS]
        assert x.shape[1] == launch.width and launch.shared == (
            source not in ("rms", "layer") and launch.kind != "half"
        )
        if source in ("rms", "layer"):
            weight, bias = self.world.vector(launch.weight), self.world.vector(launch.bias)
            x = normed(x, weight, bias, launch.eps, source, launch.width)
        elif source != "plain":
            kind = source.removeprefix("gated_")
            x = activated(x, kind) * (self.get(launch.y) if source != kind else 1)
        assert np.isfinite(x).all()
        if launch.out is not None:
            self.put(launch.out, x)
        self.inputs = launch.kind, x

    def products(self, launch: LinearLaunch) -> None:
        assert self.inputs is not None and 1 <= len(launch.products) <= MATRICES
        kind, x = self.inputs
        assert (kind, x.shape[1]) == (launch.kernels.kind, launch.cols)
        assert len(x) == (TOKENS if launch.rows == "tokens" else len(LOGIT_ROWS))
        assert len({self.formats[p.weight] for p in launch.products}) == 1
        outs = []
        for p in launch.products:
            y = p.scale * (x @ self.world.values[p.weight].T + self.world.vector(p.bias))
            outs.append(y if p.add is None else self.get(p.add) + p.add_scale * y)
        for p, y in zip(launch.products, outs, strict=True):
            self.put(p.out, y, p.first)

    def row(self, launch: RowLaunch) -> None:
        symbol = launch.kernel.symbol
        x = self.world.inputs if launch.x is None else self.get(launch.x)
        if symbol.startswith("norm_"):
            weight, bias = self.world.vector(launch.weight), self.world.vector(launch.bias)
            x = normed(x, weight, bias, launch.eps, symbol.split("_")[1], launch.group)
        elif symbol.startswith("activate_"):
            kind = symbol.removeprefix("activate_")
            gated = kind.startswith("gated_")
            x = activated(x, kind.removeprefix("gated_")) * (self.get(launch.y) if gated else 1)
        elif symbol == "add":
            x = x + launch.scale * self.get(launch.y)
        elif symbol == "gather":
            x = x[:, self.world.vector(launch.weight).astype(int)]
        elif symbol.startswith("round_"):
            x = np.sin(x)
        else:
            assert symbol == "input"
        self.put(launch.out, x)


def check_meaning(program: Program, formats: dict[str, str], kv: KvPlan = KV) -> Lowered:
    lowered = lower(program, formats, kv)
    with np.errstate(over="ignore"):
        want = plain(World.of(program))
        got = Device(World.of(program), lowered, formats).run()
    for a, b in zip(got, want, strict=True):
        assert np.abs(a - b).max() <= 1e-5 * np.abs(b).max() + 1e-9
    return lowered
