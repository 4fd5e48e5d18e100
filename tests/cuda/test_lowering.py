"""Lowering: what is fused and what must not be, and that launches mean what the program's ops mean."""

from __future__ import annotations

from dataclasses import replace as replaced

import msgspec
import pytest
from device_programs import NAMES, decoder, formats_of
from hypothesis import HealthCheck, given, settings
from launch_walk import KV, Device, World, check_meaning
from random_programs import programs

from edge_runtime.engine.launches import (
    LOGITS,
    ROWS,
    AppendLaunch,
    AttentionLaunch,
    Launch,
    LinearLaunch,
    PrepareLaunch,
    RotateLaunch,
    RowLaunch,
    kernels_of,
)
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
    Round,
    reads,
    writes,
)
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import Unsupported


@given(programs(("int4_g64", "int8_row", "f16", "nf4_g64", "bf16", "int8_g32")))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_launches_mean_what_the_ops_mean(drawn: tuple[Program, dict[str, str]]) -> None:
    check_meaning(*drawn)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_decoder_of_every_format(name: str, tied: bool) -> None:
    program = decoder(tied=tied)
    lowered = check_meaning(program, formats_of(program, name))
    kinds = [type(launch).__name__ for launch in lowered.launches]
    layer = [
        "PrepareLaunch", "LinearLaunch", "RowLaunch", "AppendLaunch", "AttentionLaunch", "PrepareLaunch",
        "LinearLaunch", "PrepareLaunch", "LinearLaunch", "PrepareLaunch", "LinearLaunch",
    ]  # fmt: skip
    assert kinds == ["AnglesLaunch", "EmbedLaunch", *layer, *layer, "PrepareLaunch", "LinearLaunch"]
    every = kernels_of(lowered)
    assert [k.symbol for k in every] == sorted({k.symbol for k in every})


# --- what is fused -----------------------------------------------------------------------------------------


def lowered_ops(*ops: AnyOp, formats: dict[str, str] | None = None, kv: KvPlan = KV) -> list[Launch]:
    """Launches of ops over rows of 16, keys and values of 8, between an input `x` and logits of `y`; matrices
    (names of one letter) are int4_g64 unless `formats` says otherwise. Their meaning is checked too."""
    width = {"k": 8, "v": 8}
    names = {n for op in ops for n in (*reads(op), *writes(op))} | {"x", "y"}
    buffers = {name: width.get(name, 16) for name in names}
    tensors = {"out": TensorSpec(3, 16, "head")}
    slots = []
    for op in ops:
        if isinstance(op, Linear):
            tensors[op.weight] = TensorSpec(buffers[op.out], buffers[op.x], "matrix")
        if isinstance(op, Norm):
            tensors[op.weight] = TensorSpec(1, op.group or buffers[op.x], "vector")
        if isinstance(op, Rope):
            tensors[op.inv_freq] = TensorSpec(1, 4, "vector")
        if isinstance(op, KvAppend):
            slots.append(CacheSlot(1, 8))
    program = Program(
        ops=(Input(out="x"), *ops, Logits(x="y", weight="out")),
        tensors=tensors,
        buffers=buffers,
        cache=tuple(slots),
        vocab_size=3,
        max_context=64,
    )
    program.check()
    chosen = dict.fromkeys(tensors, "int4_g64") | (formats or {})
    return list(check_meaning(program, chosen, kv).launches)[1 + len(_tables(ops)) : -2]


def _tables(ops: tuple[AnyOp, ...]) -> set[tuple[str, float]]:
    return {(op.inv_freq, op.scale) for op in ops if isinstance(op, Rope)}


def linear(x: str, out: str, weight: str = "w", bias: str | None = None) -> Linear:
    return Linear(x=x, out=out, weight=weight, bias=bias)


def shown(launches: list[Launch]) -> list[str]:
    """Launches in short: kernel and what it writes; of products their outputs, + what is added."""
    found = []
    for launch in launches:
        match launch:
            case LinearLaunch():
                names = (p.out + (f"+{p.add}*{p.add_scale:g}" if p.add else "") for p in launch.products)
                found.append("linear " + " ".join(names))
            case PrepareLaunch():
                source = launch.kernel.symbol.split("_")[1]
                found.append(f"{source} {launch.kind}" + (f" {launch.out}" if launch.out else ""))
            case AppendLaunch():
                found.append(f"append {launch.q}" + ("" if launch.table is None else f" {launch.table}"))
            case RotateLaunch():
                found.append(f"rotate {launch.x} {launch.table}")
            case RowLaunch():
                found.append(f"{launch.kernel.symbol.split('_')[0]} {launch.out}")
            case AttentionLaunch():
                found.append("attention")
    return found


NORM = Norm(x="x", out="n", weight="s", eps=1e-3)
QUERY = Attention(q="q", out="a", layer=0, heads=2, kv_heads=1, head_dim=8, scale=1.0)
STORE = KvAppend(k="k", v="v", layer=0)
PROJECTED = (linear("x", "q"), linear("x", "k", "wk"), linear("x", "v", "wv"))


def rope(x: str, table: str = "f", scale: float = 1.0) -> Rope:
    return Rope(x=x, inv_freq=table, head_dim=8, scale=scale)


CASES: dict[str, tuple[tuple[AnyOp, ...], list[str]]] = {
    "a norm on the way into its readers": (
        (NORM, linear("n", "u"), linear("n", "g", "b"), Activation(x="u", out="y", kind="silu", up="g")),
        ["rms int64", "linear u g", "activate y"],
    ),
    "a norm that an add reads too": (
        (NORM, linear("n", "u"), Add(a="u", b="n", out="y")),
        ["rms int64 n", "linear y+n*1"],
    ),
    "a norm that is read again far below": (
        (NORM, linear("n", "u"), Round(x="u", out="u", format="int8"), linear("n", "y", "b")),
        ["rms int64 n", "linear u", "round u", "linear y"],
    ),
    "a norm whose buffer is written again before it is read": (
        (NORM, linear("n", "u"), Activation(x="u", out="n", kind="relu"), Add(a="n", b="u", out="y")),
        ["rms int64", "linear u", "activate n", "add y"],
    ),
    "a norm in place": (
        (msgspec.structs.replace(NORM, out="x"), linear("x", "u"), Add(a="x", b="u", out="y")),
        ["rms int64 x", "linear y+x*1"],
    ),
    "a norm in place that only products read": (
        (msgspec.structs.replace(NORM, out="x"), linear("x", "u"), Activation(x="u", out="y", kind="relu")),
        ["rms int64", "linear u", "activate y"],
    ),
    "a norm of groups": (
        (msgspec.structs.replace(NORM, group=8), linear("n", "y")),
        ["norm n", "plain int64", "linear y"],
    ),
    "a norm before something else": (
        (NORM, Round(x="x", out="x", format="int8"), linear("n", "u"), Add(a="u", b="x", out="y")),
        ["norm n", "round x", "plain int64", "linear y+x*1"],
    ),
    "an activation on the way": (
        (Activation(x="x", out="x", kind="silu", up="x"), linear("x", "y")),
        ["gated int64", "linear y"],
    ),
    "an add after a product": (
        (linear("x", "u"), Add(a="x", b="u", out="y", scale=0.5)),
        ["plain int64", "linear y+x*0.5"],
    ),
    "an add in place": (
        (linear("x", "u"), Add(a="x", b="u", out="x"), Activation(x="x", out="y", kind="relu")),
        ["plain int64", "linear x+x*1", "activate y"],
    ),
    "an add of the other order": (
        (linear("x", "u"), Add(a="u", b="x", out="y")),
        ["plain int64", "linear y+x*1"],
    ),
    "an add whose scale is not the product's": (
        (linear("x", "u"), Add(a="u", b="x", out="y", scale=0.5)),
        ["plain int64", "linear u", "add y"],
    ),
    "an add of a product to itself": (
        (linear("x", "u"), Add(a="u", b="u", out="y")),
        ["plain int64", "linear u", "add y"],
    ),
    "an add before the product is read again": (
        (linear("x", "u"), Add(a="x", b="u", out="x"), Add(a="x", b="u", out="y")),
        ["plain int64", "linear u", "add x", "add y"],
    ),
    "an add of one of several products": (
        (linear("x", "u"), linear("x", "g", "b"), Add(a="u", b="g", out="y"), linear("x", "u", "c"),
         Add(a="y", b="u", out="y")),
        ["plain int64", "linear u", "linear y+u*1", "linear y+y*1"],
    ),
    "what a fused add wrote is prepared again": (
        (linear("x", "u"), Add(a="x", b="u", out="x"), linear("x", "y", "b")),
        ["plain int64", "linear x+x*1", "plain int64", "linear y"],
    ),
    "more products than a launch takes": (
        (*(linear("x", f"u{i}", f"w{i}") for i in range(6)),
         *(Add(a="u0" if i == 1 else "y", b=f"u{i}", out="y") for i in range(1, 6))),
        ["plain int64", "linear u0 u1 u2 u3", "linear u4 u5", *["add y"] * 5],
    ),
    "what nothing reads ends a launch": (
        (linear("x", "u"), linear("x", "g", "b"), linear("x", "y", "c")),
        ["plain int64", "linear u", "linear g", "linear y"],
    ),
    "an output that is written twice": (
        (linear("x", "y"), linear("x", "y", "b")),
        ["plain int64", "linear y", "linear y"],
    ),
    "rotations and the store after them": (
        (*PROJECTED, rope("q"), rope("k"), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "append q 0", "attention", "plain int64", "linear y"],
    ),
    "a key that turns alone": (
        (*PROJECTED, rope("k"), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "append None 0", "attention", "plain int64", "linear y"],
    ),
    "a query that turns alone": (
        (*PROJECTED, rope("q"), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "rotate q 0", "append None", "attention", "plain int64", "linear y"],
    ),
    "rotations by two tables": (
        (*PROJECTED, rope("q"), rope("k", scale=1.5), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "rotate q 0", "append None 1", "attention", "plain int64",
         "linear y"],
    ),
    "values that turn": (
        (*PROJECTED, rope("v"), rope("k"), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "rotate v 0", "append None 0", "attention", "plain int64",
         "linear y"],
    ),
    "a query that turns twice": (
        (*PROJECTED, rope("q"), rope("q"), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "rotate q 0", "rotate q 0", "append None", "attention", "plain int64",
         "linear y"],
    ),
    "a key that turns twice": (
        (*PROJECTED, rope("k"), rope("k"), STORE, QUERY, linear("a", "y", "o")),
        ["plain int64", "linear q k v", "rotate k 0", "append None 0", "attention", "plain int64",
         "linear y"],
    ),
    "attention and ffn beside each other": (
        (NORM, linear("n", "q"), linear("n", "k", "wk"), linear("n", "v", "wv"), rope("q"), rope("k"), STORE,
         QUERY, linear("a", "u", "o"), Add(a="x", b="u", out="u"), linear("n", "g", "b"),
         Activation(x="g", out="g", kind="gelu"), linear("g", "y", "c"), Add(a="u", b="y", out="y")),
        ["rms int64 n", "linear q k v", "append q 0", "attention", "plain int64", "linear u+x*1",
         "plain int64", "linear g", "gelu int64", "linear y+u*1"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_fused(case: str) -> None:
    ops, want = CASES[case]
    assert shown(lowered_ops(*ops)) == want


def test_readers_of_two_kinds() -> None:
    """A second kind of inputs is made of the values, which must then be there; formats of one kind share."""
    ops = (NORM, linear("n", "u"), linear("n", "g", "b"), Add(a="u", b="g", out="y"))
    assert shown(lowered_ops(*ops, formats={"b": "int8_row"})) == ["rms int64", "linear u", "linear y+u*1"]
    assert shown(lowered_ops(*ops, formats={"b": "f16"})) == [
        "rms int64 n", "linear u", "plain half", "linear y+u*1",
    ]  # fmt: skip
    ops = (*ops[:3], linear("n", "z", "c"), Add(a="u", b="g", out="g"), Add(a="g", b="z", out="y"))
    assert shown(lowered_ops(*ops, formats={"b": "bf16"})) == [
        "rms int64 n", "linear u", "plain bfloat", "linear g", "plain int64", "linear z", "add g", "add y",
    ]  # fmt: skip


def test_the_head_reads_chosen_rows() -> None:
    program = decoder()
    *_, prepare, product = lower(program, formats_of(program, "int4_g64"), KV).launches
    assert isinstance(prepare, PrepareLaunch) and isinstance(product, LinearLaunch)
    assert (prepare.rows, prepare.out, prepare.x) == ("logits", ROWS, "h") and product.rows == "logits"
    (head,) = product.products
    assert (head.out, head.scale, head.bias) == (LOGITS, 0.9, "head_bias")


def test_what_has_no_kernel_is_refused() -> None:
    program = decoder()
    with pytest.raises(Unsupported, match=r"no kernel for format 'int8_row_o128'.*; it has: bf16, f16"):
        lower(program, formats_of(program, "int8_row_o128"), KV)
    with pytest.raises(Unsupported, match="no KV cache 'int8c'"):
        lower(program, formats_of(program, "f16"), KvPlan(k="int8c", v="int8", page_tokens=16, pages=4))


def test_the_checks_of_launches_have_power() -> None:
    """A launch whose outputs share bytes is found: what lowering did before it looked at unread outputs."""
    ops = (linear("x", "u"), linear("x", "g", "b"), linear("x", "y", "c"))
    program = Program(
        ops=(Input(out="x"), *ops, Logits(x="y", weight="out")),
        tensors={n: TensorSpec(16, 16, "matrix") for n in "wbc"} | {"out": TensorSpec(3, 16, "head")},
        buffers=dict.fromkeys("xugy", 16),
        cache=(),
        vocab_size=3,
        max_context=64,
    )
    formats = dict.fromkeys(program.tensors, "int4_g64")
    good = lower(program, formats, KV)
    products = tuple(p for x in good.launches[2:5] if isinstance(x, LinearLaunch) for p in x.products)
    first = good.launches[2]
    assert isinstance(first, LinearLaunch) and len(products) == 3
    joined = replaced(first, products=products)
    bad = replaced(good, launches=(*good.launches[:2], joined, *good.launches[5:]))
    with pytest.raises(AssertionError):
        Device(World.of(program), bad, formats).run()
