"""The NF4 formats and LLM.int8() against bitsandbytes: its published constants, and the package itself."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest

from edge_runtime.engine.formats import Array, get_format, int8_outlier
from edge_runtime.engine.formats.nf4 import NF4
from edge_runtime.engine.formats.nf4_double import DYNAMIC
from edge_runtime.errors import ValueOutOfRange


@pytest.fixture(scope="module")
def bnb() -> ModuleType:
    pytest.importorskip("bitsandbytes")
    import bitsandbytes.functional

    return bitsandbytes.functional  # type: ignore[no-any-return]


def weights(rows: int, cols: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((rows, cols)) * np.exp(rng.standard_normal((rows, 1))) * 0.02).astype("f4")


def test_the_dynamic_map_has_its_published_values() -> None:
    """As checkpoints carry it in `nested_quant_map`: the ends of each decade and the top of the map."""
    published = {
        0: -0.992968738079071, 1: -0.9789062738418579, 2: -0.96484375, 126: -5.500000384017767e-07,
        127: 0.0, 128: 5.500000384017767e-07, 252: 0.96484375, 253: 0.9789062738418579,
        254: 0.992968738079071, 255: 1.0,
    }  # fmt: skip
    assert {i: float(DYNAMIC[i]) for i in published} == {
        i: float(np.float32(v)) for i, v in published.items()
    }
    assert (np.diff(DYNAMIC) > 0).all() and len(DYNAMIC) == 256
    assert np.array_equal(DYNAMIC[:127], -DYNAMIC[254:127:-1])


def test_the_dynamic_map_is_that_of_the_package(bnb: ModuleType) -> None:
    import torch

    theirs = bnb.create_dynamic_map(signed=True).numpy()
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert np.array_equal(theirs, DYNAMIC)
    else:  # no fused multiply-add in torch.linspace
        np.testing.assert_array_max_ulp(theirs, DYNAMIC, 1)


def nibbles(packed: Array, rows: int, cols: int) -> Array:
    """bitsandbytes puts the first of two weights in the high nibble."""
    flat = packed.reshape(-1)
    return ((flat << 4) | (flat >> 4)).astype(np.uint8).reshape(rows, cols // 2)


@pytest.mark.parametrize("rows,cols", [(8, 64), (5, 192), (12, 2048), (7, 3584), (16, 5632)])
def test_plain_nf4_of_the_package_is_exact(bnb: ModuleType, rows: int, cols: int) -> None:
    import torch

    x = torch.from_numpy(weights(rows, cols))
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4")
    want = bnb.dequantize_4bit(packed, state).numpy()
    planes = {
        "q": nibbles(packed.numpy(), rows, cols),
        "scale": state.absmax.numpy().reshape(rows, cols // 64),
    }
    fmt = get_format("nf4_g64_f32")
    assert np.array_equal(fmt.decode(planes, rows, cols), want)
    assert np.array_equal(fmt.encode(x.numpy())["scale"], planes["scale"])
    assert np.array_equal(state.code.numpy(), NF4)
    # Its codes are ours but for ties within an f32 rounding: it multiplies by 1 / absmax, we divide.
    assert (fmt.encode(x.numpy())["q"] != planes["q"]).mean() < 1e-3


@pytest.mark.parametrize("rows,cols", [(8, 64), (12, 256), (12, 2048), (7, 3584), (9, 5632), (16, 14336)])
def test_double_quantized_nf4_of_the_package_is_exact(bnb: ModuleType, rows: int, cols: int) -> None:
    import torch

    x = torch.from_numpy(weights(rows, cols))
    packed, state = bnb.quantize_4bit(x, blocksize=64, quant_type="nf4", compress_statistics=True)
    want = bnb.dequantize_4bit(packed, state).numpy()
    blocks = np.arange(rows * cols // 64).reshape(rows, cols // 64)  # their blocks of 256 run on over rows
    planes = {
        "q": nibbles(packed.numpy(), rows, cols),
        "scale": state.absmax.numpy().reshape(rows, cols // 64),
        "scale2": state.state2.absmax.numpy()[blocks[:, ::8] // 256],
        "offset": state.offset.numpy().reshape(1, 1),
    }
    assert np.array_equal(get_format("nf4_g64_dq").decode(planes, rows, cols), want)


def test_double_quantization_costs_as_little_as_the_package_says(bnb: ModuleType) -> None:
    """Our own second level is no coarser than theirs: blocks of 8 scales, not of 256."""
    import torch

    x = weights(64, 2048)
    packed, state = bnb.quantize_4bit(
        torch.from_numpy(x), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    theirs = np.square(bnb.dequantize_4bit(packed, state).numpy() - x).sum()
    fmt = get_format("nf4_g64_dq")
    ours = np.square(fmt.decode(fmt.encode(x), *x.shape) - x).sum()
    assert ours < theirs


def test_int8_of_the_package_is_exact(bnb: ModuleType) -> None:
    """LLM.int8() checkpoints: CB and SCB, value = CB * SCB / 127; no column is stored apart."""
    import torch

    x = weights(24, 320)
    codes, stats, _ = bnb.int8_vectorwise_quant(torch.from_numpy(x).to(torch.float16))
    planes = {
        "q": codes.numpy(),
        "scale": (stats.numpy() / np.float32(127))[:, None],
        "outlier": np.zeros((24, 3), np.float16),
        "index": np.full((1, 3), int8_outlier.NONE, np.int32),
    }
    decoded = get_format("int8_row_o128").decode(planes, 24, 320)
    want = codes.numpy().astype(np.float64) * stats.numpy()[:, None] / 127
    assert np.abs(decoded - want).max() <= np.abs(want).max() * 2.0**-22


def test_outlier_columns_are_kept_in_f16_and_leave_the_rest_fine() -> None:
    x = weights(32, 256)
    x[:, [9, 200]] *= 60
    fmt = get_format("int8_row_o128")
    planes = fmt.encode(x)
    assert planes["index"].tolist() == [[9, 200]]
    decoded = fmt.decode(planes, 32, 256)
    assert np.array_equal(decoded[:, [9, 200]], x[:, [9, 200]].astype(np.float16))
    row = get_format("int8_row")
    plain = row.decode(row.encode(x), 32, 256)
    rest = np.ones(256, bool)
    rest[[9, 200]] = False
    assert np.square(decoded - x)[:, rest].sum() < np.square(plain - x)[:, rest].sum() / 100


def test_an_algorithm_gives_the_outlier_columns() -> None:
    x, fmt = weights(8, 300), get_format("int8_row_o128")
    grid = fmt.grid_for(np.zeros((8, 1), "f4"), np.abs(x).max(axis=1, keepdims=True))
    index = np.array([[299, int8_outlier.NONE, 4]], np.int32)
    planes = fmt.encode_on_grid(x, grid | {"index": index})
    assert planes["index"].tolist() == [[4, 299, int8_outlier.NONE]]
    assert not planes["q"][:, [4, 299]].any() and not planes["outlier"][:, 2].any()
    assert np.array_equal(planes["outlier"][:, [0, 1]], x[:, [4, 299]].astype(np.float16))
    assert set(fmt.encode_on_grid(x, grid)) == {"q", "scale", "outlier", "index"}  # chosen by magnitude


@pytest.mark.parametrize(
    "index,message",
    [([0, 300, -1], r"names columns 0\.\.300"), ([-2, 1, 2], r"-2\.\.2"), ([5, 5, -1], "not ascending")],
)
def test_a_bad_index_is_refused(index: list[int], message: str) -> None:
    x, fmt = weights(8, 300), get_format("int8_row_o128")
    planes = fmt.encode(x)
    bad = planes | {"index": np.array([index], np.int32)}
    with pytest.raises(ValueOutOfRange, match=message):
        fmt.decode(bad, 8, 300)
    with pytest.raises(ValueOutOfRange, match=message):
        fmt.encode_on_grid(x, bad)


def test_block_scaled_fp8_has_its_exact_home() -> None:
    """A checkpoint with an f32 scale per 128 x 128 block: the scale repeated for its rows."""
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 256, (256, 384)).astype(np.uint8)
    codes[codes & 127 == 127] = 0  # no NaN
    blocks = rng.uniform(1e-4, 1e-2, (2, 3)).astype(np.float32)
    planes = {"q": codes, "scale": np.repeat(blocks, 128, axis=0)}
    one = get_format("fp8_e4m3_tensor").decode({"q": codes, "scale": np.ones((1, 1), "f4")}, 256, 384)
    want = one * np.kron(blocks, np.ones((128, 128), "f4"))
    assert np.array_equal(get_format("fp8_e4m3_g128").decode(planes, 256, 384), want)
