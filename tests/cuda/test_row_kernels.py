"""Ops on rows in the emulator, against f64 and the formats' codecs, and the functions they are made of."""

from __future__ import annotations

import itertools
import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from emulation import Emulated, Guarded, compile_kernels, guarded
from running_step import RunningStep, rows_of

from edge_runtime.backends import numpy_ops
from edge_runtime.backends.cuda import records as rec
from edge_runtime.engine.formats import Array

WIDTHS = (1, 7, 63, 65, 288, 4096)
ACTIVATIONS = {"silu": "kSilu", "gelu": "kGelu", "gelu_tanh": "kGeluTanh", "relu": "kRelu"}
VALUES = 1024  # of a block of an elementwise kernel

FUNCTIONS = """
template <int kFunction>
EDGE_DEVICE void function_of(const EdgeRow& p) {
    for (int i = static_cast<int>(threadIdx.x); i < p.x_width; i += 256)
        p.out[i] = kFunction == 0 ? edge::exp_of(p.x[i]) : kFunction == 1 ? edge::tanh_of(p.x[i])
                                                                          : edge::erf_of(p.x[i]);
}
EDGE_DEVICE void quotients(const EdgeRow& p) {
    for (int i = static_cast<int>(threadIdx.x); i < p.x_width; i += 256)
        p.out[i] = edge::divisor(p.y[i]).of(p.x[i]);
}
"""


@lru_cache(maxsize=1)
def library() -> Emulated:
    calls = {
        "add": "edge::add",
        "input": "edge::input",
        "gather": "edge::gather",
        "exp": "function_of<0>",
        "tanh": "function_of<1>",
        "erf": "function_of<2>",
        "quotients": "quotients",
    }
    for name, kind in ACTIVATIONS.items():
        for up in (0, 1):
            calls[f"{name}_{up}"] = f"edge::activate_rows<edge::Activation::{kind}, {up}>"
    for threads, vectors, whole in itertools.product((32, 256), (0, 2), (0, 1)):
        for way in (0, 1):
            tail = f"{way}, {threads}, {vectors}, {whole}"
            calls[f"norm_{way}_{threads}_{vectors}_{whole}"] = f"edge::norm<{tail}>"
            calls[f"round_{way}_{threads}_{vectors}_{whole}"] = f"edge::round_rows<{tail}>"
    lines = [f"EDGE_KERNEL({symbol}, 256, EdgeRow, {call})" for symbol, call in calls.items()]
    return Emulated(compile_kernels('#include "rows.cuh"\n' + FUNCTIONS + "\n".join(lines)))


class Ran:
    """A launch on x (tokens, width) of a step of `count` of them: `out` f32 (count, width), and `status`."""

    def __init__(
        self,
        symbol: str,
        grid: int,
        x: Array,
        *,
        count: int | None = None,
        out_width: int | None = None,
        in_place: bool = False,
        **given: Any,
    ) -> None:
        tokens, width = x.shape
        wide = width if out_width is None else out_width
        self.step = RunningStep(tokens if count is None else count)
        held = {"x": Guarded.of(x)}
        held |= {k: Guarded.of(v) for k, v in given.items() if isinstance(v, np.ndarray)}
        out = held["x"] if in_place else guarded(tokens * wide * 4)
        before = out.data.copy()
        record = rec.Row(
            step=self.step.record, out=out.address, x_width=width, out_width=wide, group=given.get("group", 0)
        )
        record.eps, record.scale = given.get("eps", 0.0), given.get("scale", 0.0)
        for name, memory in held.items():
            setattr(record, name, memory.address)
        library().launch(symbol, grid, record)
        for memory in (*held.values(), out):
            memory.check()
        self.step.check()
        end = (tokens if count is None else count) * wide * 4
        assert out.data[end:].tobytes() == before[end:].tobytes()  # tokens beyond the step's are untouched
        self.out = out.data[:end].view(np.float32).reshape(-1, wide).copy()
        self.status = self.step.status


def _blocks(x: Array) -> int:
    return -(-x.size // VALUES)


def _ulps(got: Array, want: Array) -> float:
    """The greatest distance in units of the last place of f32 values as large as `want` (f64, normal)."""
    unit = np.ldexp(1.0, np.maximum(np.frexp(want)[1] - 24, -149))
    return float((np.abs(got - want) / unit).max())


@pytest.mark.parametrize(
    ("name", "limit", "ends"), [("exp", 2, (-87.3, 88.3)), ("tanh", 3, (-12, 12)), ("erf", 2, (-5, 5))]
)
def test_functions(name: str, limit: float, ends: tuple[float, float]) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate(
        [
            rng.uniform(*ends, 400_000),
            rng.uniform(-1, 1, 100_000),
            np.exp(rng.uniform(-40, 1, 100_000)) * rng.choice([-1, 1], 100_000),
            np.linspace(0.62, 0.63, 1000),
            np.linspace(0.92, 0.93, 1000),
            [0.0, -0.0, *ends],
        ]
    ).astype(np.float32)[None]
    got = Ran(name, 1, x).out.astype(np.float64)
    wide = x.astype(np.float64)
    true = {"exp": np.exp, "tanh": np.tanh, "erf": np.vectorize(math.erf)}[name](wide)
    assert _ulps(got, true) <= limit
    assert Ran(name, 1, np.zeros((1, 1), np.float32)).out[0, 0] == (1 if name == "exp" else 0)
    assert np.isnan(Ran(name, 1, np.full((1, 1), np.nan, np.float32)).out).all()
    large = np.array([[3e38, np.inf]], np.float32)
    if name == "exp":
        assert (Ran(name, 1, large).out > 2e38).all()
        assert (Ran(name, 1, -large).out < 2e-38).all()
    else:
        np.testing.assert_array_equal(Ran(name, 1, large).out, 1)
        np.testing.assert_array_equal(Ran(name, 1, -large).out, -1)


def test_quotients() -> None:
    """Every bit of a division, for divisors of any size; quotients below 2^-48 to an ulp."""
    rng = np.random.default_rng(2)
    y = np.ldexp(rng.uniform(1, 2, 400_000), rng.integers(-126, 128, 400_000)).astype(np.float32)
    y[:1000] = np.ldexp(1.0, -rng.integers(126, 150, 1000)) * rng.integers(1, 9, 1000)  # denormals
    y[1000:2000] = np.float32(2) - np.ldexp(np.float32(1), rng.integers(-23, -18, 1000))
    q = rng.uniform(1, 2, y.size) * np.exp2(rng.uniform(-60, 63, y.size)) * rng.choice([-1, 1], y.size)
    with np.errstate(over="ignore"):
        x = (q * y).astype(np.float32)
        x[-50_000:] = (y[-50_000:] * rng.integers(-254, 255, 50_000) / 2).astype(np.float32)  # between codes
        x[~np.isfinite(x)] = 1
        want = x / y
    exact = (np.abs(want) >= 2.0**-48) | (want == 0)
    got = Ran("quotients", 1, x[None], y=y[None]).out[0]
    np.testing.assert_array_equal(got[exact], want[exact])
    assert exact.sum() > 200_000
    small = np.abs(want) < 2.0**-48
    assert (np.abs(got - want)[small] <= np.abs(want[small]) * 2.0**-23 + 2.0**-149).all()
    zero = np.zeros((1, 3), np.float32)
    np.testing.assert_array_equal(Ran("quotients", 1, np.array([[0, 5, -1e-40]], np.float32), y=zero).out, 0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("up", [0, 1])
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(kind: Any, up: int, width: int) -> None:
    x, y = rows_of(width, 5, width, 1.0), rows_of(width + 1, 5, width, 1.0)
    given = {"y": y} if up else {}
    made = Ran(f"{kind}_{up}", _blocks(x), x, count=4, **given)
    factor = y.astype(np.float64)[:4] if up else 1.0
    wide = x.astype(np.float64)[:4]
    match kind:
        case "silu":
            want = wide / (1 + np.exp(-wide))
        case "gelu":
            want = wide * 0.5 * np.vectorize(math.erfc)(wide * -math.sqrt(0.5))
        case "gelu_tanh":
            want = 0.5 * wide * (1 + np.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
        case _:
            want = np.maximum(wide, 0)
    # silu within 4 ulp; the gelus lose what 1 + erf or tanh of a negative x cancels: 2^-22 of |x|
    slack = np.abs(want * factor) if kind in ("silu", "relu") else np.abs(wide * factor)
    assert (np.abs(made.out - want * factor) <= slack * 2.0**-21 + 1e-35).all()
    reference = numpy_ops.activation(x[:4], kind) * (y[:4] if up else np.float32(1))
    assert (np.abs(made.out - reference) <= slack * 2.0**-20 + 1e-35).all()
    assert made.status == 0
    within = Ran(f"{kind}_{up}", 1, x, count=4, in_place=True, **given)  # one block does all in turns
    assert within.out.tobytes() == made.out.tobytes()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_told(bad: float) -> None:
    order = np.array([4.0, 1.0], np.float32)
    for at in (0, 66):  # in a whole vector, and in the last one
        x = rows_of(1, 2, 67)
        x[1, at] = bad
        ones, weight = np.ones_like(x), np.ones(67, np.float32)
        for count, status in ((2, rec.NOT_FINITE), (1, 0)):
            for kind in ACTIVATIONS:
                assert Ran(f"{kind}_0", 1, x, count=count).status == status
                assert Ran(f"{kind}_1", 1, ones, y=x, count=count).status == status
            assert Ran("add", 1, x, y=ones, scale=1.0, count=count).status == status
            assert Ran("add", 1, ones, y=x, scale=1.0, count=count).status == status
            assert Ran("input", 1, x, count=count).status == status
            assert Ran("gather", 2, x, out_width=2, weight=order, count=count).status == status
            for threads in (32, 256):
                grid = -(-2 * threads // 256)
                for way in (0, 1):
                    norm = Ran(f"norm_{way}_{threads}_2_0", grid, x, group=67, weight=weight, count=count)
                    assert norm.status == status
                    for scale in (0.0, 0.5):
                        made = Ran(f"round_{way}_{threads}_2_0", grid, x, scale=scale, count=count)
                        assert made.status == status


@pytest.mark.parametrize("width", WIDTHS)
def test_add(width: int) -> None:
    x, y = rows_of(1, 5, width), rows_of(2, 5, width)
    for scale in (1.0, 0.22, -3.5):
        want = x + np.float32(scale) * y  # the product rounded by itself
        made = Ran("add", _blocks(x), x, y=y, scale=scale)
        np.testing.assert_array_equal(made.out, want)
        assert made.status == 0
        assert Ran("add", 1, x, y=y, scale=scale, in_place=True).out.tobytes() == made.out.tobytes()
    large = np.full((1, width), 3e38, np.float32)
    assert Ran("add", _blocks(large), large, y=large, scale=1.0).status == rec.NOT_FINITE


@pytest.mark.parametrize("width", WIDTHS)
def test_input(width: int) -> None:
    x = rows_of(1, 5, width)
    np.testing.assert_array_equal(Ran("input", _blocks(x), x, count=3).out, x[:3])


@pytest.mark.parametrize("width", WIDTHS)
def test_gather(width: int) -> None:
    x = rows_of(1, 5, width)
    for out_width in (1, width, 2 * width + 1):
        order = np.random.default_rng(out_width).integers(0, width, out_width)
        made = Ran("gather", 5, x, count=4, out_width=out_width, weight=order.astype(np.float32))
        np.testing.assert_array_equal(made.out, x[:4, order])
        assert made.status == 0


@pytest.mark.parametrize("threads", [32, 256])
@pytest.mark.parametrize(("width", "group"), [(w, w) for w in WIDTHS] + [(288, 96), (4096, 128), (12, 2)])
@pytest.mark.parametrize("layer", [0, 1])
def test_norm(layer: int, width: int, group: int, threads: int) -> None:
    x = rows_of(width, 5, width) + np.float32(0.5)
    x[2] = 0
    rng = np.random.default_rng(width)
    weight, bias = rng.standard_normal((2, group)).astype(np.float32)
    given: dict[str, Any] = {"weight": weight, "group": group, "eps": 1e-3}
    if layer:
        given["bias"] = bias
    grid = -(-5 * (width // group) * threads // 256)
    whole = int(group % 4 == 0)
    made = Ran(f"norm_{layer}_{threads}_2_{whole}", grid, x, count=4, **given)
    runs = x[:4].astype(np.float64).reshape(-1, group)
    mean = runs.mean(axis=1, keepdims=True) if layer else np.zeros((len(runs), 1))
    inverse = 1 / np.sqrt(np.square(runs - mean).mean(axis=1, keepdims=True) + 1e-3)
    want = (runs - mean) * inverse * weight + layer * bias
    # as many roundings as a thread has values, and those of the lanes and warps
    steps = 4 * -(-group // (4 * threads)) + 15
    slip = layer * 2.0**-24 * inverse * (np.abs(runs) + steps * np.abs(runs).mean(axis=1, keepdims=True))
    bound = np.abs((runs - mean) * inverse * weight) * (steps / 2 + 5) * 2.0**-24
    bound = (bound + slip * (np.abs(weight) + np.abs(want - layer * bias))) * 1.01 + np.abs(want) * 2.0**-24
    got = made.out.reshape(-1, group)
    assert (np.abs(got - want) <= bound).all()
    assert made.status == 0
    reference = numpy_ops.norm(
        x[:4], weight, bias if layer else None, 1e-3, "layer" if layer else "rms", group
    )
    np.testing.assert_allclose(made.out, reference, rtol=1e-4, atol=1e-4)
    for vectors, other, in_place in itertools.product((0, 2), {0, whole}, (False, True)):
        symbol = f"norm_{layer}_{threads}_{vectors}_{other}"
        again = Ran(symbol, grid, x, count=4, in_place=in_place, **given)
        assert again.out.tobytes() == made.out.tobytes()


def test_norm_of_squares_beyond_f32() -> None:
    x = np.full((3, 64), 1e20, np.float32)
    x[:2] = 1
    x[2, 0] = -1e20
    weight = np.ones(64, np.float32)
    for layer in (0, 1):
        for threads in (32, 256):
            given: dict[str, Any] = {"weight": weight, "group": 64, "eps": 1e-5}
            assert Ran(f"norm_{layer}_{threads}_2_1", 3, x, **given).status == rec.NOT_FINITE
            assert Ran(f"norm_{layer}_{threads}_2_1", 3, x, count=2, **given).status == 0


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_round(kind: Any, width: int) -> None:
    x = rows_of(width, 9, width)
    x[1] = 0
    x[2, 0] = -0.0
    x[3] = np.ldexp(np.round(x[3] / np.abs(x[3]).max() * 254), -1)  # halfway between codes
    x[4] = x[4] / np.abs(x[4]).max() * np.float32(1e-42)
    x[5] = x[5] / np.abs(x[5]).max() * np.finfo(np.float32).max
    x[6, -1] = 2.0**-149
    for threads in (32, 256):
        grid = -(-9 * threads // 256)
        for scale in (None, 0.03125, 0.7, 1e-30, 3e38):
            with np.errstate(over="ignore"):
                want = numpy_ops.rounded(x[:8], kind, scale)
            ways = itertools.product((0, 2), {0, int(width % 4 == 0)}, (False, True))
            for vectors, whole, in_place in ways:
                symbol = f"round_{int(kind != 'int8')}_{threads}_{vectors}_{whole}"
                made = Ran(symbol, grid, x, count=8, scale=scale or 0.0, in_place=in_place)
                assert made.out.tobytes() == want.tobytes()
                assert made.status == 0
