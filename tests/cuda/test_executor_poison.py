"""NaN, Inf and what a cache cannot hold are a NumericError of their own step, and of no other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_programs import TABLES, Loader, equal, fed, i32, ids, model, opened, ready, rows, rows_part, step
from emulated_parts import load, packed
from fake_cuda import FakeCuda

from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.engine.device_code import CACHES
from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import cache_arrays
from edge_runtime.engine.ops import Activation, AnyOp, Gather, Linear, Norm, Round
from edge_runtime.errors import NumericError

VALUES = (np.nan, np.inf, -np.inf)
FORMATS = ("f16", "bf16", "int8_row", "int4_g64", "int4_g32_zp", "nf4_g64_dq", "fp8_e4m3_row", "fp8_e5m2")


@pytest.fixture
def on_gpu(fake_gpu: FakeCuda, tmp_path: Path) -> Loader:
    """Loads a part on the fake GPU."""
    return lambda part: load(ready(part, tmp_path))


def caught(executor: CudaExecutor, batch: StepBatch) -> bool:
    """Whether the step is refused as it should be. Anything but NumericError goes on to the test."""
    try:
        executor.forward(batch)
    except NumericError:
        return True
    return False


def spoilable(part: Part, name: str) -> list[str]:
    """Planes that can hold NaN: scales and the like where the format has some, else the codes."""
    planes = part.weights[name].planes
    grid = [p for p in planes if p not in ("q", "w") and planes[p].dtype.kind == "f"]
    return grid or [next(iter(planes))]


def poisoned(part: Part, name: str, plane: str, value: float) -> Part:
    """The part with one number of a tensor spoiled."""
    tensor = part.weights[name]
    data = tensor.planes[plane].copy()
    at = 5 % data.size  # of row 5 in a panel, or the whole of a small plane
    if tensor.format == "bf16":
        data[at] = np.float32(value).view(np.uint32) >> 16
    elif tensor.format == "fp8_e5m2":
        data.view(np.uint8)[at] = 0x7F if np.isnan(value) else 0x7C
    else:
        data[at] = value
    spoiled = replace(tensor, planes={**tensor.planes, plane: data})
    return replace(part, weights={**part.weights, name: spoiled})


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_weights_of_every_layer(on_gpu: Loader, fmt: str) -> None:
    """Each tensor in turn, with one of the three values; another format brings it another one."""
    part = model(fmt, kv="int8")
    text = np.concatenate([np.arange(16, dtype=np.int32), ids(5)])  # embeddings of the spoiled panel are read
    batch = replace(step((0, 0, text)), logit_rows=i32([20]))
    with opened(on_gpu(part)) as executor:
        executor.forward(batch)
    for i, name in enumerate(part.program.tensors, FORMATS.index(fmt)):
        for plane in spoilable(part, name):
            value = VALUES[i % 3]
            with opened(on_gpu(poisoned(part, name, plane, value))) as executor:
                assert caught(executor, batch), (name, plane, value)
                assert caught(executor, batch), "and again"


def spoiled_pages(part: Part, page: Array, token: int, value: float) -> Iterator[tuple[str, Array]]:
    """Copies of a page, each with one number of one (layer, k or v, head) spoiled, and where that is."""
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
                # No step stores Inf as a key of f16, and as one that is written it may weigh nothing
                plane[head, token % rows, items // 2] = np.nan if a.plane == "w" and a.which == "k" else value
                yield f"layer {a.layer} {a.which} head {head}", bad
        at += nbytes


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_pages_of_every_layer(on_gpu: Loader, kv: str, softcap: float | None) -> None:
    """One scale, or one number where there are none, of one cached key or value; every head of it in turn."""
    part = model("int4_g64", kv=kv, softcap=softcap)
    page, after, many = int(TABLES[0, 0]), step((0, 20, ids(1))), step((0, 20, ids(11)))
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 0, ids(20))))
        good = executor.read_page(page)
        want = executor.forward(after).copy()
        for token, value in zip((0, 7, 15), VALUES, strict=True):
            for where, bad in spoiled_pages(part, good, token, value):
                executor.write_page(page, bad)
                assert caught(executor, after) and caught(executor, many), (where, token)
        executor.write_page(page, good)
        assert equal(executor.forward(after), want)


def one(op: AnyOp, width: int = 72, **vectors: Array) -> Part:
    return rows_part([op], {"x": width, "y": width}, {}, vectors)


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("group", [0, 8])
def test_squares_beyond_f32_are_no_zeros(on_gpu: Loader, kind: Any, group: int) -> None:
    """The mean square overflows though every number is finite: 1 / Inf must not pass as a scale of 0."""
    x = np.ones((3, 72), np.float32)
    x[1, 3] = 1e18
    norm = Norm(x="x", out="y", weight="n", eps=1e-5, kind=kind, group=group)
    fused = [norm, Linear(x="y", out="z", weight="w"), Activation(x="z", out="y", kind="relu")]
    weights = {"w": ("f16", np.eye(72, dtype=np.float32))}
    ones = {"n": np.ones(group or 72)}
    for part in (one(norm, **ones), rows_part(fused, dict.fromkeys("xyz", 72), weights, ones)):
        with opened(on_gpu(part)) as executor:
            want = executor.forward(fed(x)).copy()
            x[2, 3] = 1e20
            assert caught(executor, fed(x)) and len(executor.hidden) == 0
            x[2, 3] = 1
            assert equal(executor.forward(fed(x)), want)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("fused", [False, True])
def test_activations_swallow_no_overflow(on_gpu: Loader, kind: Any, sign: float, fused: bool) -> None:
    """A product that overflows to -Inf is no zero after the activation."""
    matrix = np.full((16, 16), sign * 60000, np.float32)
    ops: list[AnyOp] = [Linear(x="x", out="u", weight="w"), Activation(x="u", out="u", kind=kind)]
    ops += [Linear(x="u", out="y", weight="back")] if fused else [Gather(x="u", out="y", order="o")]
    matrices = {"w": ("f16", matrix)} | ({"back": ("f16", matrix * 0)} if fused else {})
    part = rows_part(ops, dict.fromkeys("xuy", 16), matrices, {} if fused else {"o": np.zeros(16)})
    x = np.full((2, 16), 0.5, np.float32)
    with opened(on_gpu(part)) as executor:
        assert not caught(executor, fed(x))
        x[1] = 1e35
        assert caught(executor, fed(x))
        assert not caught(executor, fed(x[:1]))


@pytest.mark.parametrize("value", VALUES)
def test_inputs(on_gpu: Loader, value: float) -> None:
    """Also in a column that is read by nothing, and in a row whose logits are not asked for."""
    ops: list[AnyOp] = [
        Round(x="x", out="y", format="int8", scale=0.1),
        Round(x="x", out="y", format="fp8_e4m3"),
        Gather(x="x", out="y", order="o"),
        Activation(x="x", out="y", kind="relu"),
    ]
    for op in ops:
        part = one(op, 20, **({"o": np.zeros(20)} if isinstance(op, Gather) else {}))
        x = rows(5, 20)
        with opened(on_gpu(part)) as executor:
            want = executor.forward(fed(x)).copy()
            bad = x.copy()
            bad[1, 19] = value
            for call in (executor.forward, executor.likeliest, lambda b: executor.top(b, 3)):
                with pytest.raises(NumericError, match="NaN or Inf; no token was emitted"):
                    call(replace(fed(bad), logit_rows=i32([4])))
                assert len(executor.hidden) == 0
            assert equal(executor.forward(fed(x)), want)


@pytest.mark.parametrize("kv", ["f16", "int4"])
def test_keys_that_a_cache_cannot_hold(on_gpu: Loader, kv: str) -> None:
    """Told apart from NaN; other tokens' steps go on, and this one's with a cache that can."""
    part = model("f16", kv=kv, layers=1, head="f16")
    embed = np.random.default_rng(3).standard_normal((70, 72)).astype(np.float32)
    weights = dict(part.weights)
    norm = np.full((1, 72), 2e3, np.float32)  # keys near 2e3, beyond f16 where the norm is more
    weights["embed"] = packed(embed, "f16", "m16")
    for factor, fits in ((1, True), (1000, False)):
        weights["0.norm"] = packed(norm * factor, "f32", "rows")
        changed = replace(part, weights=weights)
        with opened(on_gpu(changed)) as executor:
            if fits:
                executor.forward(step((0, 0, ids(9))))
                continue
            for _ in range(2):
                with pytest.raises(
                    NumericError, match=f"does not fit the KV formats {kv}/{kv}; use int8 or fp8"
                ):
                    executor.forward(step((0, 0, ids(9))))
        wide = replace(changed, kv=type(part.kv)(k="int8", v="int8", page_tokens=16, pages=12))
        with opened(on_gpu(wide)) as executor:
            executor.forward(step((0, 0, ids(9))))


def test_a_chain_that_breaks(on_gpu: Loader) -> None:
    part = model("f16", kv="f16", layers=1)
    batch = step((0, 9, ids(1)), tables=TABLES[:1])
    with opened(on_gpu(part)) as executor:
        executor.forward(step((0, 0, ids(9)), tables=TABLES[:1]))
        want = executor.chain(batch, 6)
        page = int(TABLES[0, 0])
        good = executor.read_page(page)
        executor.write_page(page, np.full_like(good, 0x7F))
        with pytest.raises(NumericError):
            executor.chain(batch, 6)
        executor.write_page(page, good)
        assert np.array_equal(executor.chain(batch, 6), want)
