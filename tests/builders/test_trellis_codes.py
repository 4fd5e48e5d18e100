"""Trellis formats in the builder: the native search against the numpy one, scales, and every algorithm."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

from made_weights import made_statistics

from builders import trellis
from builders.fake_quant import FakeQuantizer
from builders.quantize import AlgorithmOptions, ChannelScaler, get_algorithm
from builders.statistics import InputStatistics, output_error
from edge_runtime.backends.cpu import native_library
from edge_runtime.backends.cpu_records import SIMD
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.formats.trellis import CODES, RUN, search, trellis_of, windows
from edge_runtime.errors import Unsupported

NAMES = ("tcq2_g64", "tcq3_g64", "tcq4_g64")
PLAIN = AlgorithmOptions()
PATHS = [
    name for name, bit in SIMD.items() if name != "auto" and native_library().edge_cpu_features() >> bit & 1
]


def matrix(rows: int, cols: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * rng.uniform(0.5, 1.5, (rows, 1))
    return (0.05 * x).astype(np.float32)


def error(x: Array, name: str, planes: dict[str, Array]) -> float:
    return float(np.square(get_format(name).decode(planes, *x.shape) - x, dtype=np.float64).sum())


@pytest.mark.parametrize("bits", CODES)
@pytest.mark.parametrize("rows", [1, 20, 128, 150])
@pytest.mark.parametrize("simd", PATHS)
def test_the_native_search_finds_the_codes_of_the_slow_one(bits: int, rows: int, simd: str) -> None:
    """Fused multiplications may break a tie of two paths otherwise: then errors are equal."""
    code, rng = CODES[bits], np.random.default_rng(rows)
    y = rng.normal(0, code.deviation, (rows, 12)).astype(np.float32)
    w = rng.uniform(0, 1, (rows, 12)).astype(np.float32)
    targets, weights = np.ascontiguousarray(y.T), np.ascontiguousarray(w.T)
    found, level = np.empty(targets.shape, np.uint8), np.empty(targets.shape, np.float32)
    pointers = (a.ctypes.data for a in (targets, weights, found, level))
    assert native_library().edge_cpu_trellis_search(bits, rows, 12, *pointers, SIMD[simd])
    assert np.array_equal(level.T, code.levels()[windows(found.T, bits)])
    slow = code.levels()[windows(search(y, w, code), bits)]
    got, want = ((w * np.square(v - y)).sum(0) for v in (level.T, slow))
    assert got == pytest.approx(want, rel=1e-4)
    assert (search(y, w, code) == found.T).mean() > 0.97


def test_what_has_no_search_is_said() -> None:
    assert not native_library().edge_cpu_trellis_search(5, 0, 0, None, None, None, None, 0)


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_chosen_for_less_error_than_the_formats_own(name: str) -> None:
    """The more so where columns differ in size, for a path goes down one of them."""
    fmt, x = get_format(name), matrix(200, 130)
    x[:, ::3] *= 3
    planes = trellis.quantize(x, fmt)
    assert error(x, name, planes) < 0.97 * error(x, name, fmt.encode(x))
    fmt.check_planes(planes, *x.shape)


def test_columns_that_matter_get_the_scales() -> None:
    x = matrix(128, 64)
    x[:, :8] *= 6
    importance = np.ones(64)
    importance[8:] = 1e6
    small = [slice(None), slice(8, None)]
    missed = [
        float(np.square((get_format("tcq2_g64").decode(p, *x.shape) - x)[tuple(small)]).sum())
        for p in (trellis.quantize(x, get_format("tcq2_g64"), i) for i in (importance, None))
    ]
    assert missed[0] < 0.9 * missed[1]


@pytest.mark.parametrize("name", NAMES)
def test_values_on_given_scales_are_the_formats_own(name: str) -> None:
    fmt, x = get_format(name), matrix(60, 66)
    grid = trellis.grid_for(x, fmt)
    native, slow = trellis.encode_on_grid(x, fmt, grid), fmt.encode_on_grid(x, grid)
    assert error(x, name, native) == pytest.approx(error(x, name, slow), rel=1e-3)
    values = fmt.decode(native, *x.shape)
    assert np.array_equal(fmt.decode(trellis.encode_on_grid(values, fmt, grid), *x.shape), values)


def test_a_column_gets_its_nearest_values() -> None:
    code, rng = CODES[4], np.random.default_rng(0)
    wanted, scale = rng.standard_normal(RUN + 20), rng.uniform(0.09, 0.13, RUN + 20)
    found = trellis.nearest_column(wanted / scale, scale, code)
    assert found.dtype == np.float32 and np.square(found - wanted).mean() < 0.008
    assert not trellis.nearest_column(wanted, np.zeros(RUN + 20), code).any()


def importance(rows: int, spread: float = 0.8) -> Array:
    """Of each row: as uneven as those of trained models, 0 in some."""
    rng = np.random.default_rng(9)
    found = np.exp(spread * rng.standard_normal(rows)).astype(np.float32)
    found[::17] = 0
    return found


@pytest.mark.parametrize("name", NAMES)
def test_rows_that_matter_less_take_the_error(name: str) -> None:
    """The codes are the slow search's with the weights of rows in it, and their error so weighted is less."""
    fmt, x, matter = get_format(name), matrix(150, 66), importance(150)
    code, roots = CODES[int(name[3])], trellis.row_roots(matter)
    assert roots is not None
    grid = trellis.grid_for(x, fmt, None, roots)
    planes = trellis.encode_on_grid(x, fmt, grid, roots)
    fmt.check_planes(planes, *x.shape)
    scale = np.repeat(fmt.affine(grid)[0], 64, 1)[:, :66]  # type: ignore[misc]
    wanted = np.square(scale * roots[:, None])
    slow = code.levels()[windows(search(x / scale, wanted / wanted.max(0), code), code.bits)]

    def weighted(values: Array) -> float:
        return float((np.square(values - x) * matter[:, None]).sum(dtype=np.float64))

    found = weighted(fmt.decode(planes, *x.shape))
    assert found == pytest.approx(weighted(slow * scale), rel=0.01)
    assert found < 0.85 * weighted(fmt.decode(trellis.quantize(x, fmt), *x.shape))


def test_roots_are_of_weights_around_1() -> None:
    roots = trellis.row_roots(np.array([0, 1, 4, 3], np.float32))
    assert roots is not None and roots.dtype == np.float32
    assert np.square(roots) == pytest.approx([0, 0.5, 2, 1.5], rel=1e-4)
    assert trellis.row_roots(None) is None and trellis.row_roots(np.zeros(5, np.float32)) is None


def test_a_column_knows_how_its_rows_matter() -> None:
    code, rng = CODES[4], np.random.default_rng(0)
    wanted, matter = rng.standard_normal(RUN), importance(RUN)
    scale = np.full(RUN, 0.11)
    errors = [
        float((np.square(trellis.nearest_column(wanted / scale, scale, code, roots) - wanted) * matter).sum())
        for roots in (trellis.row_roots(matter), None)
    ]
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("rows", [40, 600], ids=["one piece", "several"])
def test_gptq_loses_less_where_rows_matter(rows: int) -> None:
    """sum over rows of their importance * e H e; also without inputs, as an embedding's."""
    w, inputs, fmt, matter = matrix(rows, 96), made_statistics(96), get_format("tcq3_g64"), importance(rows)
    knowing = AlgorithmOptions(rows=matter)
    for known, moment in ((inputs, inputs.hessian), (None, np.eye(96))):
        lost = []
        for options in (knowing, PLAIN):
            planes = get_algorithm("gptq").quantize(w, fmt, known, options)
            e = (fmt.decode(planes, *w.shape) - w).astype(np.float64)
            lost.append(float((((e @ moment) * e).sum(1) * matter).sum()))
        assert lost[0] < 0.87 * lost[1]


@pytest.mark.parametrize("name", NAMES)
def test_gptq_loses_less_than_rounding_and_than_integers_of_more_bytes(name: str) -> None:
    """By the output error, on correlated inputs: at least a third less than int{bits}_g64 by GPTQ."""
    w, inputs = matrix(150, 128), made_statistics(128)
    integer = f"int{name[3]}_g64"

    def loss(algorithm: str, fmt: str) -> float:
        planes = get_algorithm(algorithm).quantize(w, get_format(fmt), inputs, PLAIN)
        return output_error(get_format(fmt).decode(planes, *w.shape) - w, inputs)

    gptq = loss("gptq", name)
    assert gptq < 0.85 * loss("rtn", name)
    assert gptq < 0.67 * loss("gptq", integer)
    assert get_format(name).nbytes(150, 128) < get_format(integer).nbytes(150, 128)


def test_gptq_is_the_same_on_any_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    w, inputs, fmt = matrix(600, 64), made_statistics(64), get_format("tcq3_g64")
    before = torch.get_num_threads()
    made = []
    for cores in (1, 2):
        torch.set_num_threads(cores)
        made.append(get_algorithm("gptq").quantize(w, fmt, inputs, PLAIN))
    torch.set_num_threads(before)
    assert all(np.array_equal(made[0][plane], made[1][plane]) for plane in made[0])


@pytest.mark.parametrize(
    "algorithm", ["rtn", "gptq", "awq", "awq+gptq", "smoothquant", "hqq", "int8_outlier", "nf4"]
)
@pytest.mark.parametrize("known", [True, False])
def test_every_algorithm_takes_them(algorithm: str, known: bool) -> None:
    w, inputs, fmt = matrix(40, 96), made_statistics(96), get_format("tcq4_g64")
    planes = get_algorithm(algorithm).quantize(w, fmt, inputs if known else None, PLAIN)
    fmt.check_planes(planes, *w.shape)
    missed = output_error(fmt.decode(planes, *w.shape) - w, inputs)
    assert missed < 0.02 * output_error(w, inputs)


def test_awq_scales_the_columns_of_large_inputs() -> None:
    inputs = made_statistics(64)
    large = np.ones(64, np.float32)
    large[:4] = 20
    loud = InputStatistics(
        inputs.count, inputs.hessian * np.outer(large, large), inputs.absmax * large, inputs.mean_abs * large,
        inputs.rows * large,
    )  # fmt: skip
    awq = get_algorithm("awq")
    assert isinstance(awq, ChannelScaler)
    scale = awq.scale_inputs([matrix(64, 64)], [get_format("tcq3_g64")], loud, PLAIN)
    assert np.median(scale[:4]) > 1.3 * np.median(scale[4:])


def test_the_code_is_known_by_the_format() -> None:
    assert trellis_of(get_format("tcq2_g64")) is CODES[2] and trellis_of(get_format("int2_g64")) is None


def test_training_through_the_rounding_is_refused() -> None:
    with pytest.raises(Unsupported, match="tcq3_g64 has no grid to train on"):
        FakeQuantizer(get_format("tcq3_g64"))
