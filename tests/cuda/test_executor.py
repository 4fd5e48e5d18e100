"""The cuda backend on the fake GPU against independent numpy, the reference and the cpu backend.

Integer weight formats quantize the inputs of their products to int8 by groups, as the cpu backend does;
other formats round inputs to f16 (bf16: to bf16). Bounds follow from that.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_programs import (
    ACTIVATIONS,
    GROUPS,
    INTEGER,
    NAMES,
    Loader,
    decoded,
    decoder,
    fed,
    hidden,
    model,
    opened,
    oracle_hidden,
    ready,
    rows,
    rows_part,
)
from emulated_parts import load, part_of, random_weights
from fake_cuda import FakeCuda

from edge_runtime.backends import numpy_ops
from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.cuda.backend import BACKEND
from edge_runtime.backends.protocol import Part
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.engine import packing
from edge_runtime.engine.formats import FORMATS, Array, get_format
from edge_runtime.engine.ops import Activation, Add, AnyOp, Embed, Gather, Linear, Logits, Norm, Round
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.errors import Unsupported


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    """Loads a part on the fake GPU."""
    return lambda part: load(ready(part, tmp_path))


# --- products ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 15, 40])  # split of one and two blocks, tiles
@pytest.mark.parametrize("name", NAMES)
def test_linear_within_its_bound(on_gpu: Loader, name: str, count: int) -> None:
    """|y - W x - b| <= |W| times what its inputs are rounded by, and f32 rounding; integers are the cpu's."""
    rng = np.random.default_rng(1)
    w = (rng.standard_normal((45, 203)) * 0.1).astype(np.float32)
    bias = rng.standard_normal(45).astype(np.float32)
    part = rows_part(
        [Linear(x="x", out="y", weight="w", bias="b")], {"x": 203, "y": 45}, {"w": (name, w)}, {"b": bias}
    )
    x = rows(count, 203)
    x[-1, :64] = 0
    got = hidden(on_gpu, part, x)
    exact, wide = decoded(part, "w").astype(np.float64), x.astype(np.float64)
    size = np.abs(wide) @ np.abs(exact).T
    rounding = size * 203 * 2.0**-24 + np.abs(bias) * 2.0**-22
    if name in INTEGER:
        group = get_format(name).group or 64
        full = np.zeros((count, -(-203 // group) * group))
        full[:, :203] = np.abs(wide)
        half_step = full.reshape(count, -1, group).max(axis=2) / 254  # of int8 codes
        matrix = np.zeros((45, full.shape[1]))
        matrix[:, :203] = np.abs(exact)
        bound = half_step @ matrix.reshape(45, -1, group).sum(axis=2).T * 1.0001
        near = oracle_hidden(CPU, part, x)
        assert (np.abs(got - near) <= rounding).all()
    elif name == "bf16":
        bound = size * 2.0**-8
    else:  # f16 of x divided by the power of two below its row's greatest
        bound = (
            size * 2.0**-11 + np.abs(wide).max(axis=1, keepdims=True) * np.abs(exact).sum(axis=1) * 2.0**-24
        )
    assert (np.abs(got - (wide @ exact.T + bias)) <= bound + rounding).all()
    assert np.abs(got - wide @ exact.T).max() > 0.1, "the bias is added"


@pytest.mark.parametrize("shape", [(1, 1), (16, 64), (3, 65), (17, 31), (130, 129)])
def test_small_and_single_shapes(on_gpu: Loader, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(3)
    w = rng.standard_normal(shape).astype(np.float32)
    x = rows(2, shape[1])
    for name in ("f16", "int8_row", "int4_g32_zp", "nvfp4_g16"):
        part = rows_part([Linear(x="x", out="y", weight="w")], dict(zip("yx", shape, strict=True)),
                         {"w": (name, w)}, {})  # fmt: skip
        got, exact = hidden(on_gpu, part, x), decoded(part, "w").astype(np.float64)
        bound = 0.005 * np.abs(x).max(axis=1, keepdims=True) * np.abs(exact).sum(axis=1)
        assert (np.abs(got - x @ exact.T) <= bound + 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
def test_embedding_rows_are_the_codecs(on_gpu: Loader, name: str) -> None:
    """To the bit. Weights in the order of other backends are put in this one's at load."""
    values = np.random.default_rng(7).standard_normal((37, 100)).astype(np.float32)
    program = Program(
        ops=(Embed(out="x", weight="w", scale=2.0), Logits(x="x", weight="w")),
        tensors={"w": TensorSpec(37, 100, "embedding")},
        buffers={"x": 100},
        cache=(),
        vocab_size=37,
        max_context=64,
    )
    made = part_of(program, random_weights(program, {"w": name}))
    planes = get_format(name).encode(values)
    tokens = np.random.default_rng(8).permutation(37).astype(np.int32)
    batch = replace(fed(np.empty((37, 0), np.float32)), tokens=tokens, inputs=None)
    for order in dict.fromkeys(("rows", packing.cpu_packing(name), "m16")):
        tensor = replace(made.weights["w"], packing=order, planes=packing.pack(name, order, planes, 37, 100))
        with opened(on_gpu(replace(made, weights={"w": tensor}, step=_of_tokens(made, 37)))) as executor:
            executor.forward(batch)
            want = get_format(name).decode(planes, 37, 100)[tokens] * np.float32(2)
            np.testing.assert_array_equal(executor.hidden, want)


def _of_tokens(part: Part, tokens: int) -> Any:
    step = part.step
    return type(step)(context=step.context, sequences=step.sequences, tokens=tokens, logits=tokens)


# --- rows --------------------------------------------------------------------------------------------------


def through(
    on_gpu: Loader, op: AnyOp, x: Array, vectors: dict[str, Array], *, out: int | None = None
) -> Array:
    """Rows that an op makes of x."""
    width = x.shape[1]
    return hidden(on_gpu, rows_part([op], {"x": width, "y": out or width}, {}, vectors), x)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("width", [8, 33, 39, 72, 200, 1100])
def test_norms(on_gpu: Loader, kind: Any, width: int) -> None:
    rng = np.random.default_rng(4)
    x = rows(6, width) + np.float32(0.3)
    for group in (0, *(g for g in GROUPS if width % g == 0 and g < width)):
        vectors = {"w": rng.standard_normal(group or width), "b": rng.standard_normal(group or width)}
        for bias in ("b", None):
            op = Norm(x="x", out="y", weight="w", bias=bias, eps=1e-5, kind=kind, group=group)
            if bias is None:
                del vectors["b"]
            got = through(on_gpu, op, x, vectors)
            want = numpy_ops.norm(x.astype(np.float64), vectors["w"], vectors.get("b"), 1e-5, kind, group)
            assert np.abs(got - want).max() <= 2e-6 * max(1, np.abs(want).max()) + 1e-6


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("width", [61, 64])
def test_activations(on_gpu: Loader, kind: Any, width: int) -> None:
    x = np.linspace(-30, 30, 8 * width, dtype=np.float32).reshape(8, width)
    x[0, :4] = (0.0, -0.0, 1e-30, -1e-30)
    for up in (None, "x"):
        got = through(on_gpu, Activation(x="x", out="y", kind=kind, up=up), x, {})
        want = numpy_ops.activation(x, kind) * (x if up else np.float32(1))
        size = np.abs(x) if up else np.float32(1)
        assert (np.abs(got - want) <= 3e-6 * np.abs(want) + 1e-6 * np.minimum(np.abs(x), 1) * size).all()


@pytest.mark.parametrize("width", [37, 64])
def test_adds_gathers_and_roundings_to_the_bit(on_gpu: Loader, width: int) -> None:
    x = rows(12, width)
    x[1], x[2] = 0, -0.0
    x[3] *= 1e-41
    x[4] *= 1e30
    x[6] = (np.arange(width) - width // 2) / 2
    for scale in (1.0, 0.22, -3.5):
        twice = [Activation(x="x", out="p", kind="relu"), Add(a="p", b="x", out="y", scale=scale)]
        part = rows_part(twice, {"x": width, "y": width, "p": width}, {}, {})
        np.testing.assert_array_equal(hidden(on_gpu, part, x), np.maximum(x, 0) + np.float32(scale) * x)
    for out in (5, width, 2 * width + 1):
        order = np.random.default_rng(out).integers(0, width, out)
        got = through(on_gpu, Gather(x="x", out="y", order="o"), x, {"o": order}, out=out)
        assert got.tobytes() == x[:, order].tobytes()
    forms: list[Any] = ["fp8_e4m3", "int8"]
    for form, scale in product(forms, (None, 0.01, 3.0)):
        got = through(on_gpu, Round(x="x", out="y", format=form, scale=scale), x, {})
        with np.errstate(over="ignore"):
            assert got.tobytes() == numpy_ops.rounded(x, form, scale).tobytes()


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("reader", ["int4_g64", "f16", "bf16", "int8_g128"])
def test_what_is_made_on_the_way_into_a_product(on_gpu: Loader, reader: str, in_place: bool) -> None:
    """Norms and activations fused with the inputs of their readers; once where another op reads them too."""
    rng = np.random.default_rng(6)
    width, x = 72, rows(9, 72)
    out = "x" if in_place else "n"
    matrices = {"w": (reader, (rng.standard_normal((72, 72)) * 0.1).astype(np.float32))}
    vectors = {"s": 1 + 0.1 * rng.standard_normal(width), "b": rng.standard_normal(width)}
    buffers = dict.fromkeys("xyzn", width)
    first: list[AnyOp] = [
        Norm(x="x", out=out, weight="s", eps=1e-5),
        Norm(x="x", out=out, weight="s", bias="b", eps=1e-5, kind="layer"),
        Activation(x="x", out=out, kind="silu"),
        Activation(x="x", out=out, kind="gelu", up="x"),
    ]
    backend = CPU if reader in INTEGER else REFERENCE
    for op, again in product(first, (False, True)):
        ops: list[AnyOp] = [op, Linear(x=out, out="z", weight="w")]
        ops += [Add(a="z", b=out, out="y", scale=0.5)] if again else [Activation(x="z", out="y", kind="relu")]
        used = vectors if isinstance(op, Norm) else {}
        used = {k: v for k, v in used.items() if k in (op.weight, op.bias)} if isinstance(op, Norm) else {}
        part = rows_part(ops, buffers, matrices, used)
        got, want = hidden(on_gpu, part, x), oracle_hidden(backend, part, x)
        scale = np.abs(want).max(axis=1, keepdims=True)
        limit = {"f16": 1e-3, "bf16": 8e-3}.get(reader, 2e-3)  # a code of int8 on a rounding edge
        assert (np.abs(got - want) <= limit * scale).all()
        if reader in INTEGER:  # which hardly any is
            assert np.median(np.abs(got - want) / scale) <= 2e-6


# --- what it refuses ---------------------------------------------------------------------------------------


def test_what_has_no_kernels_is_refused_with_its_reason() -> None:
    program = decoder()
    formats = dict.fromkeys(program.tensors, "int4_g64")
    assert BACKEND.supports(program, formats).ok
    for name in sorted(set(FORMATS) - set(NAMES)):
        answer = BACKEND.supports(program, formats | {"0.q": name})
        assert not answer.ok and f"no kernel for format '{name}' (tensor '0.q')" in answer.why
    assert "unknown format 'int7'" in BACKEND.supports(program, formats | {"0.q": "int7"}).why
    del formats["0.k"]
    assert "'0.k' of the program has no format" in BACKEND.supports(program, formats).why


@pytest.mark.parametrize("kv", ["f32", "int8c,int8", "int4c,int4"])
def test_caches_without_kernels_are_refused(on_gpu: Loader, kv: str) -> None:
    with pytest.raises(Unsupported, match=f"no KV cache '{kv.split(',')[0]}'; use f16, int8, int4, fp8"):
        on_gpu(model(kv=kv))
