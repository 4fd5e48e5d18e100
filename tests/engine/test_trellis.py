"""Trellis formats against their definition, written once more without numpy, and against what theory says."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from edge_runtime.engine.formats import ENCODINGS, FORMATS, codes, get_format
from edge_runtime.engine.formats.trellis import (
    CODES,
    RUN,
    TrellisCode,
    runs,
    search,
    trellis_of,
    wanted_scales,
    windows,
)
from edge_runtime.engine.formats.trellis_tables import TABLES
from edge_runtime.errors import ValueOutOfRange

NAMES = ("tcq2_g64", "tcq3_g64", "tcq4_g64")
# Mean square errors for values of a normal distribution: of the best levels of a scalar quantizer (Max 1960),
# and what no code of that many bits can fall below (Shannon), 4^-bits.
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497}
FOUND = {2: 0.0745, 3: 0.0200, 4: 0.0054}  # of the codes here, with some room


def matrix(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, cols)) * np.exp(0.5 * rng.standard_normal((rows, 1)))
    return x.astype(np.float32)


def e4m3(code: int) -> float:
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    value = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -value if sign else value


def slow_decode(name: str, planes: dict[str, np.ndarray], rows: int, cols: int) -> list[list[float]]:
    """One weight at a time, from the bytes, by the docstring of trellis.py."""
    bits = int(name[3])
    low = 4 if bits == 4 else 2
    mix, sums, _ = TABLES[bits]

    def code(r: int, c: int) -> int:
        if r >= rows:
            return 0
        per = 8 // low
        u = int(planes["q"][r][c // per]) >> (c % per * low) & ((1 << low) - 1)
        return u | (int(planes["high"][r][c // 8]) >> c % 8 & 1) << 2 if bits == 3 else u

    out = []
    for r in range(rows):
        row = []
        first = r // 128 * 128
        circle = -(-(min(first + 128, rows) - first) // 16) * 16
        for c in range(cols):
            window = 0
            for back in range(12 // bits):
                window += code(first + (r - first - back) % circle, c) << (bits * back)
            n0, n1, n2 = window % 16, window // 16 % 16, window // 256
            s = n1 ^ int(mix[1][n2])
            total = int(sums[0][n0 ^ int(mix[0][s])]) + int(sums[2][s])
            total += int(sums[1][int(mix[2][n0 ^ int(mix[3][n2])]) ^ n1])
            scale = np.float32(e4m3(int(planes["scale"][r][c // 64]))) * planes["super"][0, 0]
            row.append(float(np.float32((total % 256 - 64) / 2) * scale))
        out.append(row)
    return out


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (17, 65), (150, 9), (128, 66)])
def test_values_are_those_of_the_definition(name: str, rows: int, cols: int) -> None:
    """Any bytes are codes; scales of both signs."""
    rng = np.random.default_rng(rows)
    planes = {
        p.name: rng.integers(0, 256, p.shape(rows, cols)).astype(ENCODINGS[p.encoding].dtype)
        for p in FORMATS[name].planes
    }
    planes["scale"] &= np.uint8(0xBF)  # finite
    planes["super"] = np.array([[0.37]], np.float32)
    assert FORMATS[name].decode(planes, rows, cols).tolist() == slow_decode(name, planes, rows, cols)


@pytest.mark.parametrize("bits", CODES)
def test_tables_are_permutations_and_sums_of_seven_bits(bits: int) -> None:
    code = CODES[bits]
    assert all(sorted(row) == list(range(16)) for row in code.mix.tolist())
    level = code.levels()
    assert level.shape == (4096,) and level.min() >= -32 and level.max() <= 31.5
    # kernels multiply 127 * 127 * 2, which must stay below 2^15
    assert set((2 * level + 64).astype(int)) <= set(range(128))


@pytest.mark.parametrize("bits", CODES)
def test_normal_values_lose_less_than_by_any_levels(bits: int) -> None:
    """Scales as the deviation says: no choice of them is needed for what theory speaks of."""
    code = CODES[bits]
    x = np.random.default_rng(5).standard_normal((RUN, 40)).astype(np.float32)
    found = code.levels()[windows(search(x * np.float32(code.deviation), np.ones_like(x), code), bits)]
    error = np.square(found / code.deviation - x).mean()
    assert 4.0**-bits < error < FOUND[bits] < 0.64 * LLOYD_MAX[bits]


def exhaustive(y: np.ndarray, code: TrellisCode) -> float:
    """The least squared error of all codes of a few rows, those up to a whole panel being 0."""
    rows = len(y)
    tried = np.array(list(itertools.product(range(1 << code.bits), repeat=rows)), np.uint8).T
    missed = code.levels()[windows(tried, code.bits)] - y[:, None]
    return float(np.square(missed, dtype=np.float64).sum(0).min())


@pytest.mark.parametrize("bits", CODES)
def test_the_path_found_is_the_best_of_all(bits: int) -> None:
    code, rows = CODES[bits], 12 // bits
    y = np.random.default_rng(1).normal(0, code.deviation, (rows, 20)).astype(np.float32)
    found = code.levels()[windows(search(y, np.ones_like(y), code), bits)]
    for chain in range(20):
        got = float(np.square(found[:, chain] - y[:, chain], dtype=np.float64).sum())
        assert got == pytest.approx(exhaustive(y[:, chain], code), rel=1e-4)


@pytest.mark.parametrize("bits", CODES)
def test_the_circle_closes_well(bits: int) -> None:
    """A run costs what as many rows cost in the middle of an endless one: closing it takes nothing away."""
    code = CODES[bits]
    y = np.random.default_rng(2).normal(0, code.deviation, (RUN, 60)).astype(np.float32)
    error = np.square(code.levels()[windows(search(y, np.ones_like(y), code), bits)] - y).mean(1)
    ends = np.r_[error[:4], error[-4:]].mean()
    assert ends == pytest.approx(error[4:-4].mean(), rel=0.25)


def test_weights_say_which_rows_matter() -> None:
    code = CODES[2]
    y = np.random.default_rng(3).normal(0, code.deviation, (64, 30)).astype(np.float32)
    weight = np.ones_like(y)
    weight[::2] = 9
    even = np.square(code.levels()[windows(search(y, weight, code), 2)] - y)[::2].mean()
    alike = np.square(code.levels()[windows(search(y, np.ones_like(y), code), 2)] - y)[::2].mean()
    assert even < 0.7 * alike


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(1, 5), (16, 64), (40, 130), (150, 70)])
def test_errors_stay_within_the_bound(name: str, shape: tuple[int, int]) -> None:
    fmt, x = get_format(name), matrix(*shape)
    x[0, 0] = 40.0  # beyond every level of what its group's deviation asks for
    planes = fmt.encode(x)
    assert {n: a.shape for n, a in planes.items()} == fmt.shapes(*shape)
    error = np.abs(fmt.decode(planes, *shape).astype(np.float64) - x)
    assert (error <= fmt.bound(x, planes)).all()


@pytest.mark.parametrize("name", NAMES)
def test_values_on_the_grid_keep_their_values(name: str) -> None:
    fmt, x = get_format(name), matrix(150, 66)
    planes = fmt.encode(x)
    values = fmt.decode(planes, *x.shape)
    again = fmt.encode_on_grid(values, {n: planes[n] for n in ("scale", "super")})
    assert np.array_equal(fmt.decode(again, *x.shape), values)


@pytest.mark.parametrize("name", NAMES)
def test_zeros_decode_to_zero(name: str) -> None:
    fmt = get_format(name)
    planes = fmt.encode(np.zeros((20, 130), np.float32))
    assert not fmt.decode(planes, 20, 130).any()
    assert not planes["scale"].any() and not planes["super"].any()


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_whole_runs_stand_alone(name: str) -> None:
    fmt, x = get_format(name), matrix(300, 40)
    planes = fmt.encode(x)
    whole = fmt.decode(planes, *x.shape)
    assert fmt.run == RUN and runs(300) == [(0, 128), (128, 256), (256, 300)]
    for ids in ([299], [0, 127, 128, 290], [5, 5, 260]):
        assert np.array_equal(fmt.decode_ids(planes, 300, 40, np.array(ids)), whole[ids])


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_codes_and_an_eighth_of_a_bit(name: str) -> None:
    assert get_format(name).nbytes(256, 1024) == 256 * 1024 * (int(name[3]) + 0.125) / 8 + 4


def test_groups_differ_in_scale_and_outliers_are_held() -> None:
    code = CODES[4]
    x = matrix(16, 128)
    x[:, 64:] *= 7
    x[3, 5] = 90.0
    scale = wanted_scales(x, code)
    assert (scale[:, 1] > 3 * scale[:, 0])[np.arange(16) != 3].all()
    assert x[3, 5] <= scale[3, 0] * code.levels().max() * 1.2


@pytest.mark.parametrize("name", NAMES)
def test_damaged_values_and_scales_are_refused(name: str) -> None:
    fmt = get_format(name)
    x = matrix(4, 64)
    x[1, 2] = np.nan
    with pytest.raises(ValueOutOfRange, match="NaN or Inf"):
        fmt.encode(x)
    grid = {"scale": np.full((4, 1), 0x7F, np.uint8), "super": np.ones((1, 1), np.float32)}
    with pytest.raises(ValueOutOfRange, match="scale is NaN or Inf"):
        fmt.encode_on_grid(matrix(4, 64), grid)
    with pytest.raises(ValueOutOfRange, match="'scale'"):
        fmt.encode_on_grid(matrix(4, 64), {"super": grid["super"]})


def test_only_trellis_formats_have_a_trellis() -> None:
    found = {name: trellis_of(fmt) for name, fmt in FORMATS.items()}
    assert {name for name, code in found.items() if code is not None} == set(NAMES)
    assert all(found[name] is CODES[int(name[3])] for name in NAMES)


def test_codes_of_three_bits_lie_in_two_planes() -> None:
    fmt, x = get_format("tcq3_g64"), matrix(20, 30)
    planes = fmt.encode(x)
    code = codes.split(fmt.codes, planes, 30)
    assert code.max() == 7 and [p.name for p in fmt.codes] == ["q", "high"]
