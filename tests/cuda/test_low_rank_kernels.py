"""Updates of adapters: the kernels against f64 and to the bit in every step, and where lowering puts them."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from device_programs import NAMES, decoder, formats_of
from emulation import Emulated, Guarded, compile_emulated
from hypothesis import HealthCheck, given, settings
from launch_walk import KV, LOGIT_ROWS, TOKENS, Device, World, plain
from random_programs import programs

from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine import device_code as code
from edge_runtime.engine.adapter import updatable
from edge_runtime.engine.formats import Array
from edge_runtime.engine.launches import LinearLaunch, Lowered, LowRankLaunch
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.memory import ADAPTER_RECORD
from edge_runtime.engine.ops import Activation, Add, Input, Linear, Logits
from edge_runtime.engine.program import Program, TensorSpec


@functools.cache
def library() -> Emulated:
    return Emulated(compile_emulated(code.source(code.low_rank_kernels())))


def test_records_and_paddings_are_the_headers() -> None:
    for kernel in code.low_rank_kernels():
        assert library().record_bytes(kernel.symbol) == ctypes.sizeof(rec.LowRank)
        assert library().threads(kernel.symbol) == kernel.threads
    assert ctypes.sizeof(rec.Adapter) == ctypes.sizeof(rec.Update) == ADAPTER_RECORD
    source = compile_emulated(
        '#include "low_rank.cuh"\nEDGE_EMU_EXPORT const int sizes[] = {edge::kRankUnit, edge::kRankPanel, '
        "edge::kLowRankTokens, sizeof(EdgeAdapter), sizeof(EdgeUpdate)};\n"
    )
    found = list((ctypes.c_int * 5).in_dll(ctypes.CDLL(str(source)), "sizes"))
    assert found == [code.RANK_UNIT, code.RANK_PANEL, code.RANK_TOKENS, ADAPTER_RECORD, ADAPTER_RECORD]


# --- kernels -----------------------------------------------------------------------------------------------


class Updated:
    """Matrices of a launch, and adapters that update some: (a, b, scale) by (adapter, matrix)."""

    def __init__(
        self, sizes: Sequence[int], cols: int, ranks: Sequence[Sequence[int]], seed: int = 0
    ) -> None:
        """ranks: for each adapter, that of each matrix; 0 = not updated."""
        rng = np.random.default_rng(seed)
        self.sizes, self.cols, self.ranks = sizes, cols, ranks
        self.low = {
            (n, m): (
                rng.standard_normal((rank, cols)).astype(np.float16),
                rng.standard_normal((sizes[m], rank)).astype(np.float16),
                0.3 + 0.2 * n + 0.1 * m,
            )
            for n, of in enumerate(ranks)
            for m, rank in enumerate(of)
            if rank
        }

    def run(self, x: Array, before: list[Array], adapters: Array, *, turns: int = 16) -> list[Array]:
        """Rows of outputs of each matrix; row t of x is of a sequence t that uses adapters[t], -1 = none."""
        count = len(x)
        held = {"x": Guarded.of(x)} | {f"out{m}": Guarded.of(out) for m, out in enumerate(before)}
        blocks = [self._adapter(n, count, held) for n in range(len(self.ranks))]
        using = np.array([blocks[n] if n >= 0 else 0 for n in adapters], np.uint64)
        held |= {"using": Guarded.of(using), "sequence": Guarded.of(np.arange(count, dtype=np.int32))}
        held["counts"] = Guarded.of(np.array([count, count, 0, 0] + 12 * [0], np.int32))
        record = rec.LowRank(
            step=rec.Step(counts=held["counts"].address, sequence=held["sequence"].address),
            adapters=held["using"].address, x=held["x"].address,
            count=len(self.sizes), cols=self.cols, row_count=rec.TOKENS,
        )  # fmt: skip
        panels = 0
        for m, size in enumerate(self.sizes):
            record.matrix[m] = rec.Updated(held[f"out{m}"].address, 0.5 + m, 2 * m + 1, size, panels, size)
            panels += -(-size // 32)
        record.panels = panels
        tokens = -(-(count + 3) // 4)  # and a block with nothing to do
        library().launch("low_rank_in", (turns, len(self.sizes), tokens), record)
        library().launch("low_rank_out", (-(-panels // 8), tokens, 1), record)
        for memory in held.values():
            memory.check()
        return [held[f"out{m}"].view(np.float32, out.shape).copy() for m, out in enumerate(before)]

    def _adapter(self, n: int, count: int, held: dict[str, Guarded]) -> int:
        """Its memory in `held`; returns its address."""
        updates, offset = [rec.Update() for _ in range(2 * len(self.sizes) + 1)], 0
        for m, rank in enumerate(self.ranks[n]):
            if not rank:
                continue
            a, b, scale = self.low[n, m]
            units, panels, padded = -(-rank // 8), -(-len(b) // 32), -(-self.cols // 8) * 8
            wide = np.zeros((units * 8, padded), np.float16)
            wide[:rank, : self.cols] = a
            tall = np.zeros((panels, units, 32, 8), np.float16)
            for row, column in np.ndindex(b.shape):
                tall[row // 32, column // 8, row % 32, column % 8] = b[row, column]
            planes = {f"a{n}.{m}": Guarded.of(wide), f"b{n}.{m}": Guarded.of(tall)}
            held |= planes
            at = [memory.address for memory in planes.values()]
            updates[2 * m + 1] = rec.Update(*at, scale=scale, rank=rank, offset=offset)
            offset += units * 8
        held[f"u{n}"] = u = Guarded.of(np.full((count, max(offset, 8)), np.nan, np.float32))
        head = bytes(rec.Adapter(u=u.address, stride=max(offset, 8))) + b"".join(map(bytes, updates))
        held[f"adapter{n}"] = Guarded.of(np.frombuffer(head, np.uint8))
        return held[f"adapter{n}"].address


def random(updated: Updated, count: int, seed: int = 1) -> tuple[Array, list[Array]]:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, updated.cols)).astype(np.float32)
    before = [rng.standard_normal((count, size)).astype(np.float32) for size in updated.sizes]
    for out in before:
        out[2:5] = -0.0  # to which nothing can be added unseen
    return x, before


SHAPES = [
    ((48, 100), 128, [(8, 3)]),
    ((1, 33, 300, 64), 127, [(1, 17, 0, 5), (0, 9, 512, 0)]),
    ((70,), 2309, [(16,), (64,)]),
    ((40, 40), 1, [(2, 9)]),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_updates_within_f32_rounding(shape: tuple[tuple[int, ...], int, list[tuple[int, ...]]]) -> None:
    updated = Updated(*shape)
    x, before = random(updated, 11)
    adapters = np.array([0, 0, 0, -1, -1, 0, 0, 0, 0, 0, 0])
    adapters[6:9] = len(shape[2]) - 1
    got = updated.run(x, before, adapters)
    for m, out in enumerate(got):
        for t, n in enumerate(adapters.tolist()):
            if (n, m) not in updated.low:
                assert out[t].tobytes() == before[m][t].tobytes()
                continue
            a, b, scale = (np.asarray(v, np.float64) for v in updated.low[n, m])
            gain = (0.5 + m) * scale
            size = gain * (np.abs(b) @ (np.abs(a) @ np.abs(x[t]))) + np.abs(before[m][t])
            bound = 2.0**-24 * (len(a) + updated.cols / 256 + 16 + 4) * size
            assert (np.abs(out[t] - (before[m][t] + gain * (b @ (a @ x[t])))) <= bound).all()
            assert np.abs(out[t] - before[m][t]).max() > 100 * bound.max()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_what_shares_its_step(
    shape: tuple[tuple[int, ...], int, list[tuple[int, ...]]], thread_order: str
) -> None:
    updated = Updated(*shape)
    x, before = random(updated, 10)
    last = len(shape[2]) - 1
    for adapters in (np.full(10, last), np.array([0, last, -1, 0, 0, last, last, last, 0, -1])):
        want = updated.run(x, before, adapters)
        again = updated.run(x, before, adapters, turns=3)
        for m in range(len(before)):
            assert again[m].tobytes() == want[m].tobytes()
        for first, end in ((0, 1), (1, 6), (3, 10), (9, 10)):
            some = updated.run(x[first:end], [b[first:end] for b in before], adapters[first:end], turns=4)
            for m, out in enumerate(some):
                assert out.tobytes() == want[m][first:end].tobytes()


# --- lowering ----------------------------------------------------------------------------------------------


class Adapting(Device):
    """Runs launches with one adapter of all updatable ops: (a, b, scale) by number."""

    low: dict[int, tuple[Array, Array, float]]
    u: tuple[LowRankLaunch, list[Array]] | None = None

    def launch(self, launch: object) -> None:
        if not isinstance(launch, LowRankLaunch):
            super().launch(launch)  # type: ignore[arg-type]
        elif launch.side == "in":
            x = self.get(launch.x)
            assert x.shape == (TOKENS if launch.rows == "tokens" else len(LOGIT_ROWS), launch.cols)
            assert self.inputs is not None and np.array_equal(self.inputs[1], x), "those of the products"
            self.u = launch, [x @ self.low[update.op][0].T for update in launch.updates]
        else:
            assert self.u is not None and self.u[0].updates == launch.updates
            self.prove([], [update.out for update in launch.updates], by_value=False)
            for update, u in zip(launch.updates, self.u[1], strict=True):
                _, b, scale = self.low[update.op]
                before = self.get(update.out)[:, update.first : update.first + len(b)]
                self.put(update.out, before + update.scale * (scale * (u @ b.T)), update.first)


def check_adapting(program: Program, formats: dict[str, str]) -> None:
    """The launches with adapters are the ops with merged weights, and the plain ones are within them."""
    check_meaning(program, formats, lower(program, formats, KV))


def check_meaning(program: Program, formats: dict[str, str], lowered: Lowered) -> None:
    rng = np.random.default_rng(2)
    merged, device = World.of(program), Adapting(World.of(program), lowered, formats)
    device.lowered = replace(lowered, launches=lowered.adapting)
    device.low = {}
    for number, op in enumerate(updatable(program)):
        rows, cols = merged.values[op.weight].shape
        a, b = rng.standard_normal((3, cols)) * cols**-0.5, rng.standard_normal((rows, 3)) * 3**-0.5
        device.low[number] = a, b, 0.1 * number - 0.7
        merged.values[op.weight] = merged.values[op.weight] + (0.1 * number - 0.7) * b @ a
    with np.errstate(over="ignore"):
        want, got = plain(merged), device.run()
    for mine, theirs in zip(got, want, strict=True):
        assert np.abs(mine - theirs).max() <= 1e-5 * np.abs(theirs).max() + 1e-9
    others = [launch for launch in lowered.adapting if not isinstance(launch, LowRankLaunch)]
    assert [_without_out(x) for x in others] == [_without_out(x) for x in lowered.launches]
    products = [launch for launch in others if isinstance(launch, LinearLaunch)]
    assert len(lowered.adapting) == len(others) + 2 * len(products)


def _without_out(launch: object) -> object:
    """What differs is only that norms and activations write their rows."""
    return replace(launch, out=None) if hasattr(launch, "kind") else launch  # type: ignore[type-var]


@given(programs(("int4_g64", "int8_row", "f16", "nf4_g64", "bf16", "int8_g32")))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_launches_with_adapters_are_those_of_merged_weights(drawn: tuple[Program, dict[str, str]]) -> None:
    check_adapting(*drawn)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_of_every_format(name: str) -> None:
    program = decoder()
    check_adapting(program, formats_of(program, name))


def test_the_checks_have_power() -> None:
    """A x after the products, whose outputs lie on the bytes of x, is found."""
    program = Program(
        ops=(
            Input(out="x"),
            Activation(x="x", out="a", kind="relu"),
            Linear(x="a", out="t", weight="w"),
            Add(a="x", b="t", out="y"),
            Logits(x="y", weight="out"),
        ),
        tensors={"w": TensorSpec(16, 16, "matrix"), "out": TensorSpec(3, 16, "head")},
        buffers=dict.fromkeys("xaty", 16),
        cache=(),
        vocab_size=3,
        max_context=64,
    )
    formats = dict.fromkeys(program.tensors, "f16")
    lowered = lower(program, formats, KV)
    check_meaning(program, formats, lowered)
    kinds = [type(x).__name__ for x in lowered.adapting[2:5]]
    assert kinds == ["LowRankLaunch", "LinearLaunch", "LowRankLaunch"]
    first, second, before, product, *rest = lowered.adapting
    late = (first, second, product, before, *rest)
    with pytest.raises(AssertionError):
        check_meaning(program, formats, replace(lowered, adapting=late))
