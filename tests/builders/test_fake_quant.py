"""Fake quantization: the codec's values to the bit, the straight-through gradient, LSQ as in the paper."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from builders.fake_quant import SHRINKS, FakeQuantizer, learnable  # noqa: E402
from edge_runtime.engine.formats import FORMATS, get_format, scaled  # noqa: E402
from edge_runtime.engine.formats.trellis import trellis_of  # noqa: E402
from edge_runtime.errors import BadConfig, Unsupported  # noqa: E402

TRAINED = sorted(name for name, fmt in FORMATS.items() if name != "f32" and trellis_of(fmt) is None)
WITH_GRID = sorted(name for name, fmt in FORMATS.items() if fmt.grid_for is not None)


def values(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    """Heavy tails, zeros of both signs, and a row of nothing else."""
    x = (np.random.default_rng(seed).standard_t(4, (rows, cols)) * 0.05).astype(np.float32)
    x[0, :3] = 0.0, -0.0, 1e-30
    x[1] = 0
    return x


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a.view(np.uint32), b.view(np.uint32))


@pytest.mark.parametrize("method", ["minmax", "mse"])
@pytest.mark.parametrize("name", TRAINED)
def test_the_values_are_the_codecs_to_the_bit(name: str, method: str) -> None:
    fmt = get_format(name)
    for shape in ((5, 256), (4, 300), (3, 33)):
        weights = torch.from_numpy(values(*shape))
        quantizer = FakeQuantizer(fmt, method)
        quantizer.fit(weights)
        planes = fmt.encode_on_grid(weights.numpy(), quantizer.planes) if fmt.on_grid else None
        planes = planes or fmt.encode(weights.numpy())
        got = quantizer(weights).numpy()
        assert same_bits(got, fmt.decode(planes, *shape))
        assert {k: v.tobytes() for k, v in quantizer.encode(weights).items()} == {
            k: v.tobytes() for k, v in planes.items()
        }


@pytest.mark.parametrize("name", WITH_GRID)
def test_ties_and_values_beyond_the_range_go_where_the_codec_puts_them(name: str) -> None:
    fmt = get_format(name)
    low, high = np.float32([[-1.0]]), np.float32([[1.0]])
    grid = fmt.grid_for(low, high)
    if fmt.plane("index") is not None:
        grid["index"] = np.full(fmt.plane("index").shape(1, 64), -1, np.int32)  # no outlier columns
    scale, shift = (float(a[0, 0]) for a in fmt.affine(grid))
    middles = (fmt.levels[:-1].astype(np.float64) + fmt.levels[1:]) / 2 * scale + shift
    near = middles.astype(np.float32)
    points = [near, np.nextafter(near, np.float32(9)), np.nextafter(near, np.float32(-9)), -near]
    points += [np.float32([-30, 30]), (fmt.levels * np.float32(scale) + np.float32(shift))]
    span = fmt.span(64)
    for piece in np.array_split(np.concatenate(points), -(-sum(map(len, points)) // span)):
        row = np.zeros((1, span), np.float32)
        row[0, : len(piece)] = piece
        quantizer = FakeQuantizer(fmt)
        quantizer.use(grid)
        want = fmt.decode(fmt.encode_on_grid(row, grid), 1, span)
        assert same_bits(quantizer(torch.from_numpy(row)).numpy(), want)


@pytest.mark.parametrize(
    "name", ["int2_g32", "int4_g32_zp", "int4_g32_min", "nf4_g64", "fp8_e4m3_row", "q4_k"]
)
def test_the_gradient_passes_inside_the_range_and_stops_where_a_value_was_clipped(name: str) -> None:
    fmt = get_format(name)
    x = values(4, 256, seed=3)
    quantizer = FakeQuantizer(fmt)
    low, high = scaled.extent(x, fmt.span(256))
    grid = fmt.grid_for(low * np.float32(0.4), high * np.float32(0.4))  # clips the tails
    quantizer.use(grid)
    weights = torch.from_numpy(x).requires_grad_(True)
    upstream = torch.from_numpy(np.random.default_rng(1).normal(0, 1, x.shape).astype(np.float32))
    (quantizer(weights) * upstream).sum().backward()
    # Straight through (Bengio et al. 2013) inside [first level, last level], by the affine form, in f64
    scale, shift = (np.repeat(a.astype(np.float64), fmt.span(256), axis=1)[:, :256] for a in fmt.affine(grid))
    ends = np.stack([fmt.levels[0] * scale + shift, fmt.levels[-1] * scale + shift])
    inside = (x >= ends.min(0)) & (x <= ends.max(0))
    edge = np.isclose(x, ends[0], rtol=1e-5, atol=1e-7) | np.isclose(x, ends[1], rtol=1e-5, atol=1e-7)
    edge |= scale == 0  # a group of zeros alone: nothing is clipped
    got = weights.grad.numpy()
    assert np.array_equal(got[~edge], (upstream.numpy() * inside)[~edge])
    assert 0.02 < 1 - inside[2:].mean() < 0.6  # some were clipped indeed


def test_learned_scales_have_the_gradient_of_the_paper() -> None:
    fmt = get_format("int3_g32")
    x = values(3, 80, seed=5)
    quantizer = FakeQuantizer(fmt, learn=True)
    quantizer.fit(torch.from_numpy(x))
    with torch.no_grad():
        quantizer.scale.mul_(0.7)
    weights = torch.from_numpy(x).requires_grad_(True)
    upstream = np.random.default_rng(2).normal(0, 1, x.shape).astype(np.float32)
    (quantizer(weights) * torch.from_numpy(upstream)).sum().backward()
    # Esser et al. 2020: v = x / s; round(v) - v inside, -Q_N or Q_P outside; times 1 / sqrt(N * Q_P)
    stored = quantizer.scale.detach().half().double().numpy()
    stored[1] = 2.0**-14  # the row of zeros: the least scale that stays alive
    wanted = np.zeros(stored.shape)
    for row in range(3):
        for group in range(3):
            part = slice(32 * group, min(32 * group + 32, 80))
            for v, g in zip(x[row, part] / stored[row, group], upstream[row, part], strict=True):
                slope = -4.0 if v < -4 else 3.0 if v > 3 else np.rint(v) - v
                wanted[row, group] += g * slope
    wanted /= np.sqrt(32 * 3)
    assert np.allclose(quantizer.scale.grad.numpy(), wanted, rtol=1e-4, atol=1e-5)


def test_learned_scales_are_encoded_as_they_were_seen() -> None:
    fmt = get_format("int4_g64")
    weights = torch.from_numpy(values(4, 128, seed=6))
    quantizer = FakeQuantizer(fmt, learn=True)
    quantizer.fit(weights)
    with torch.no_grad():
        quantizer.scale[0, 0] = 0.0  # stays alive
        quantizer.scale[2] *= -1.37
    seen = quantizer(weights).detach().numpy()
    assert same_bits(seen, fmt.decode(quantizer.encode(weights), 4, 128))
    assert np.abs(seen[0]).max() > 0


def test_mse_takes_the_best_share_of_every_groups_range() -> None:
    fmt = get_format("int2_g64")
    x = values(6, 128, seed=7)
    quantizer = FakeQuantizer(fmt, "mse")
    quantizer.fit(torch.from_numpy(x))
    low, high = scaled.extent(x, 64)

    def errors(grid: dict[str, np.ndarray]) -> np.ndarray:
        decoded = fmt.decode(fmt.encode_on_grid(x, grid), *x.shape)
        return np.square(decoded - x, dtype=np.float64).reshape(6, 2, 64).sum(-1)

    tried = [errors(fmt.grid_for(low * np.float32(s), high * np.float32(s))) for s in SHRINKS]
    assert np.allclose(errors(quantizer.planes), np.min(tried, axis=0), rtol=1e-5)
    assert errors(quantizer.planes).sum() < 0.8 * tried[0].sum()


def test_what_cannot_be_trained_is_said() -> None:
    with pytest.raises(Unsupported, match="scales of nf4_g64 cannot be learned"):
        FakeQuantizer(get_format("nf4_g64"), learn=True)
    with pytest.raises(BadConfig, match="minmax"):
        FakeQuantizer(get_format("int4_g64"), "minmx")  # type: ignore[arg-type]
    assert learnable(get_format("int8_row")) and not learnable(get_format("int4_g64_zp"))
