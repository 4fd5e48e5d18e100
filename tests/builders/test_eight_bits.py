"""LLM.int8(), FP8 and NF4 as algorithms: against their papers' formulas in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from made_weights import made_statistics

from builders.quantize import AlgorithmOptions, get_algorithm
from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, get_format

OUTLIER, FP8, NF4, RTN = (get_algorithm(n) for n in ("int8_outlier", "fp8", "nf4", "rtn"))
PLAIN = AlgorithmOptions()


def matrix(rows: int, cols: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, cols)).astype(np.float32)


def outlier_inputs(cols: int) -> InputStatistics:
    rng = np.random.default_rng(1)
    x = np.clip(rng.normal(size=(256, cols)), -4, 4).astype(np.float32)
    x[:, [7, 200]] *= 30
    return InputStatistics(256, x.T @ x / 256, np.abs(x).max(0), np.abs(x).mean(0), x)


def test_outlier_columns_are_exact_and_the_others_int8_without_them() -> None:
    """Section 3.2: columns of inputs beyond 6 in f16, absmax int8 rows of what remains."""
    w, inputs = matrix(12, 300), outlier_inputs(300)
    w[:, 7] *= 50  # would coarsen every row
    fmt = get_format("int8_row_o128")
    planes = OUTLIER.quantize(w, fmt, inputs, PLAIN)
    assert set(np.flatnonzero(inputs.absmax >= 6)) == {7, 200} <= set(planes["index"][0])
    assert OUTLIER.outliers(inputs) == 2
    kept = planes["index"][0]
    assert len(kept) == 3  # the third slot goes to the next largest input
    assert inputs.absmax[kept].min() == np.sort(inputs.absmax)[-3]
    got = fmt.decode(planes, *w.shape)
    np.testing.assert_array_equal(got[:, kept], w[:, kept].astype(np.float16))
    rest = np.delete(np.arange(300), kept)
    step = np.abs(w[:, rest]).max(axis=1, keepdims=True).astype(np.float64) / 127
    np.testing.assert_allclose(got[:, rest], np.rint(w[:, rest] / step) * step, atol=1e-3 * step.max())


def test_mixed_products_with_int8_inputs_beat_plain_int8() -> None:
    """What the paper is for: int8 inputs per token, with the outlier inputs left out of the step."""
    w, inputs = matrix(12, 300), outlier_inputs(300)
    fmt = get_format("int8_row_o128")
    planes = OUTLIER.quantize(w, fmt, inputs, PLAIN)
    got, kept, x = fmt.decode(planes, *w.shape), planes["index"][0], inputs.rows

    def int8(a: Array) -> Array:
        step = np.abs(a).max(axis=1, keepdims=True) / 127
        return np.rint(a / step) * step

    rest = np.delete(np.arange(300), kept)
    mixed = x[:, kept] @ got[:, kept].T + int8(x[:, rest]) @ got[:, rest].T
    plain = int8(x) @ int8(w).T
    error = [np.square(y - x @ w.T).mean() for y in (mixed, plain)]
    assert error[0] < 0.05 * error[1]


def test_gptq_and_awq_keep_outlier_columns_too() -> None:
    pytest.importorskip("torch")
    w, inputs, fmt = matrix(6, 300), outlier_inputs(300), get_format("int8_row_o128")
    want = OUTLIER.quantize(w, fmt, inputs, PLAIN)
    for name in ("gptq", "awq"):
        got = get_algorithm(name).quantize(w, fmt, inputs, PLAIN)
        assert all(np.array_equal(got[plane], want[plane]) for plane in want)


def test_channels_that_never_fired_get_no_slot() -> None:
    assert list(OUTLIER.outlier_columns(np.array([0, 9, 0, 3, 0], np.float32), 4)) == [1, 3, -1, -1]


@pytest.mark.parametrize("name", ["int8_row", "int4_g32", "f16"])
def test_other_formats_are_rounded_to_nearest(name: str) -> None:
    fmt, w = get_format(name), matrix(6, 64)
    want = RTN.quantize(w, fmt, None, PLAIN)
    for algorithm in (OUTLIER, FP8, NF4):
        got = algorithm.quantize(w, fmt, made_statistics(64), PLAIN)
        assert all(np.array_equal(got[plane], want[plane]) for plane in want)


@pytest.mark.parametrize("name", ["fp8_e4m3_row", "fp8_e4m3_tensor", "fp8_e4m3_g128"])
def test_fp8_is_torchs_cast_after_scaling_by_absmax(name: str) -> None:
    torch = pytest.importorskip("torch")
    fmt, w = get_format(name), matrix(6, 200)
    got = fmt.decode(FP8.quantize(w, fmt, None, PLAIN), *w.shape)
    for start in range(0, 200, 128 if name.endswith("g128") else 200):
        part = w[:, start : start + (128 if name.endswith("g128") else 200)]
        largest = np.abs(part).max(axis=None if name.endswith("tensor") else 1, keepdims=True)
        scale = largest / np.float32(448)
        cast = torch.from_numpy(part / scale).to(torch.float8_e4m3fn).float().numpy() * scale
        np.testing.assert_array_equal(got[:, start : start + part.shape[1]], cast)


def test_fp8_e5m2_is_torchs_cast() -> None:
    torch = pytest.importorskip("torch")
    fmt, w = get_format("fp8_e5m2"), matrix(6, 50)
    got = fmt.decode(FP8.quantize(w, fmt, None, PLAIN), *w.shape)
    np.testing.assert_array_equal(got, torch.from_numpy(w).to(torch.float8_e5m2).float().numpy())


@pytest.mark.parametrize("name", ["nf4_g64_f32", "nf4_g64_dq", "nf4_g64"])
def test_nf4_is_the_nearest_level_of_blocks_scaled_by_absmax(name: str) -> None:
    """Levels from bitsandbytes' published table; the second level of scales costs a little."""
    table = get_format("nf4_g64").levels.astype(np.float64)
    fmt, w = get_format(name), matrix(8, 512)
    got = fmt.decode(NF4.quantize(w, fmt, None, PLAIN), *w.shape).reshape(-1, 64)
    blocks = w.reshape(-1, 64).astype(np.float64)
    absmax = np.abs(blocks).max(axis=1, keepdims=True)
    want = table[np.abs(blocks[..., None] / absmax[..., None] - table).argmin(axis=2)] * absmax
    off = np.abs(got - want) / absmax
    if name == "nf4_g64_f32":
        assert off.max() < 1e-6
    assert (off < (0.05 if name.endswith("dq") else 1e-3)).mean() > 0.99
