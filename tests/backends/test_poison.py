"""NaN and Inf anywhere in a step are a NumericError of that same step, on every instruction set."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from cpu_programs import Array, decoded, ids, instruction_sets, llama, packed, part_of, step, vector

from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.protocol import Executor, PackedTensor, Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine.kv import K_FORMATS, cache_arrays
from edge_runtime.engine.ops import Activation, Embed, Linear, Logits, Norm
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.errors import NumericError

if not CPU.available().ok:
    pytest.skip(CPU.available().why, allow_module_level=True)

Load = Callable[[Part], Executor]


def _cpu(simd: str) -> Load:
    return lambda part: CPU.load(part, threads=2, simd=simd)


BACKENDS: dict[str, Load] = {**{simd: _cpu(simd) for simd in instruction_sets()}, "reference": REFERENCE.load}
VALUES = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}
FMTS = ["f32", "f16", "bf16", "int8_row", "int8_g64", "int4_g64", "int4_g32_zp", "nf4_g64"]
FMTS += ["nf4_g64_f32", "nf4_g64_dq", "fp8_e4m3_g128", "int8_row_o128"]

backends = pytest.mark.parametrize("load", list(BACKENDS.values()), ids=list(BACKENDS))
values = pytest.mark.parametrize("value", list(VALUES.values()), ids=list(VALUES))


def caught(executor: Executor, batch: object) -> bool:
    """Whether the step is refused as it should be. Anything but NumericError goes on to the test."""
    try:
        executor.forward(batch)  # type: ignore[arg-type]
    except NumericError:
        return True
    return False


def spoilable(tensor: PackedTensor) -> list[str]:
    """Planes that can hold NaN: scales, offsets and outliers where the format has some, else the codes."""
    planes = [p for p in tensor.planes if p not in ("q", "index") and tensor.planes[p].dtype.kind == "f"]
    return [p for p in planes if p != "w"] or [next(iter(tensor.planes))]


def poisoned(part: Part, name: str, value: float, plane: str) -> Part:
    """The part with one number of a tensor spoiled."""
    tensor = part.weights[name]
    spoiled = tensor.planes[plane].copy()
    at = 5 % spoiled.size  # of row 5 in a panel, or the whole of a small plane
    if tensor.format == "bf16":
        spoiled[at] = np.float32(value).view(np.uint32) >> 16
    else:
        spoiled[at] = value
    return replace(
        part, weights={**part.weights, name: replace(tensor, planes={**tensor.planes, plane: spoiled})}
    )


@backends
@pytest.mark.parametrize("fmt", FMTS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the formats' codecs, which decode Inf
def test_weights_of_every_layer(fmt: str, load: Load) -> None:
    """Each tensor in turn, with one of the three values; another format brings it another one."""
    part = llama(fmt, kv="int8")
    text = ids(21)
    text[3] = 5  # the token whose embedding is spoiled
    batch = replace(step((0, 0, text)), logit_rows=np.array([20], np.int32))
    executor = load(part)
    executor.forward(batch)
    executor.close()
    for i, name in enumerate(part.program.tensors, FMTS.index(fmt)):
        value = list(VALUES.values())[i % 3]
        for plane in spoilable(part.weights[name]):
            executor = load(poisoned(part, name, value, plane))
            assert caught(executor, batch), (name, plane, value)
            executor.close()


@backends
@values
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("kv", K_FORMATS)
def test_pages_of_every_layer(kv: str, softcap: float | None, value: float, load: Load) -> None:
    """One scale, or one number where there are none, of one cached key or value; every head of it in turn."""
    part = llama("int4_g64", kv=kv, softcap=softcap, head_dim=16)
    executor = load(part)
    table = step((0, 0, ids(20)))
    executor.forward(table)
    page = int(table.page_tables[0, 0])
    good = executor.read_page(page)
    after = step((0, 20, ids(1)))
    executor.forward(after)
    for token in (0, 7, 15):
        for where, bad in spoiled_pages(part, good, token, value):
            executor.write_page(page, bad)
            assert caught(executor, after), (where, token)
    executor.write_page(page, good)
    executor.forward(after)
    executor.close()


def spoiled_pages(part: Part, page: Array, token: int, value: float) -> list[tuple[str, Array]]:
    """Copies of a page, each with one number of one (layer, k or v, head) spoiled, and where that is."""
    found = []
    at = 0
    arrays = cache_arrays(part.program, part.kv)
    scaled = {(a.layer, a.which) for a in arrays if a.plane == "scale"}
    for a in arrays:
        _, heads, rows, items = a.shape
        nbytes = a.nbytes // part.kv.pages
        if a.plane == "scale" or (a.layer, a.which) not in scaled:
            for head in range(heads):
                bad = page.copy()
                plane = bad[at : at + nbytes].view(a.dtype).reshape(heads, rows, items)
                plane[head, token % rows, items // 2] = value
                found.append((f"layer {a.layer} {a.which} head {head}", bad))
        at += nbytes
    return found


@backends
def test_codes_of_fp8_pages_that_are_nan(load: Load) -> None:
    part = llama("int4_g64", kv="fp8", head_dim=16)
    executor = load(part)
    batch = step((0, 0, ids(20)))
    executor.forward(batch)
    page = int(batch.page_tables[0, 0])
    good = executor.read_page(page)
    at = 0
    for a in cache_arrays(part.program, part.kv):
        if a.plane == "q":
            for code in (0x7F, 0xFF):
                bad = good.copy()
                bad[at + 5] = code
                executor.write_page(page, bad)
                assert caught(executor, step((0, 20, ids(1)))), (a.layer, a.which)
        at += a.nbytes // part.kv.pages
    executor.close()


@backends
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("group", [0, 8])
def test_squares_beyond_f32_are_no_zeros(kind: str, group: int, load: Load) -> None:
    """The mean square overflows though every number is finite: 1 / Inf must not pass as a scale of 0."""
    width = 32
    rows = np.ones((40, width), np.float32)
    rows[7, 3], rows[9, 3] = 1e20, 1e18
    program = Program(
        ops=(
            Embed(out="x", weight="e"),
            Norm(x="x", out="x", weight="n", eps=1e-5, kind=kind, group=group),  # type: ignore[arg-type]
            Logits(x="x", weight="e"),
        ),
        tensors={"e": TensorSpec(40, width, "head"), "n": TensorSpec(1, group or width, "vector")},
        buffers={"x": width},
        cache=(),
        vocab_size=40,
        max_context=64,
    )
    part = part_of(program, {"e": packed(rows, "f32"), "n": vector(np.ones(group or width))})
    executor = load(part)
    executor.forward(step((0, 0, np.array([1, 2, 9]))))
    assert caught(executor, step((0, 0, np.array([1, 2, 7]))))
    executor.close()


@backends
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_activations_swallow_no_overflow(kind: str, sign: float, load: Load) -> None:
    """A product that overflows to -Inf is no zero after the activation."""
    width = 32
    rows = np.full((40, width), 0.5, np.float32)
    rows[7] = 1e10
    matrix = np.full((width, width), sign * 1e30, np.float32)
    program = Program(
        ops=(
            Embed(out="x", weight="e"),
            Linear(x="x", out="y", weight="m"),
            Activation(x="y", out="y", kind=kind),  # type: ignore[arg-type]
            Logits(x="y", weight="h", scale=1e-30),
        ),
        tensors={
            "e": TensorSpec(40, width, "embedding"),
            "m": TensorSpec(width, width, "matrix"),
            "h": TensorSpec(40, width, "head"),
        },
        buffers={"x": width, "y": width},
        cache=(),
        vocab_size=40,
        max_context=64,
    )
    head = np.full((40, width), 1e-3, np.float32)
    part = part_of(program, {"e": packed(rows, "f32"), "m": packed(matrix, "f32"), "h": packed(head, "f32")})
    executor = load(part)
    if kind != "gelu_tanh":  # whose cube of such numbers is Inf already
        executor.forward(step((0, 0, np.array([1, 2]))))
    assert caught(executor, step((0, 0, np.array([1, 7]))))
    executor.close()


@backends
def test_rows_that_nobody_asked_for_are_looked_at_too(load: Load) -> None:
    """An overflow in the last layer of a prompt's chunk, which has no logits, is found in that chunk."""
    part = llama("f32")
    down = decoded(part.weights["1.down"]) * np.float32(1e38)
    bad = replace(part, weights={**part.weights, "1.down": packed(down, "f32")})
    executor = load(bad)
    batch = replace(step((0, 0, ids(9))), logit_rows=np.zeros(0, np.int32))
    assert caught(executor, batch)
    executor.close()
