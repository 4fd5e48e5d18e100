"""Trellis tensors in training: values, gradients and searches against the format's own codec and search."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from builders import trellis  # noqa: E402
from builders.tuned_tensor import tuned_tensor  # noqa: E402
from builders.tuned_trellis import TunedTrellis  # noqa: E402
from edge_runtime.engine.formats import get_format  # noqa: E402
from edge_runtime.engine.formats.microscaling import tensor_scales  # noqa: E402
from edge_runtime.engine.formats.trellis import CODES, search, windows  # noqa: E402

NAMES = ("tcq2_g64", "tcq3_g64", "tcq4_g64")
Made = tuple[TunedTrellis, dict[str, np.ndarray], np.ndarray]


def made(name: str, rows: int = 40, cols: int = 130, *, searches: bool = True) -> Made:
    """(the tensor, its planes, what they decode to); a row of zeros among its rows."""
    fmt = get_format(name)
    x = (np.random.default_rng(0).standard_normal((rows, cols)) * 0.05).astype(np.float32)
    x[1] = 0
    planes = trellis.quantize(x, fmt)
    values = fmt.decode(planes, rows, cols)
    tensor = tuned_tensor(fmt, "matrix", planes, torch.from_numpy(values.copy()), searches=searches)
    assert isinstance(tensor, TunedTrellis)
    return tensor, planes, values


def spread(scale: np.ndarray, cols: int = 130) -> np.ndarray:
    return np.repeat(scale, 64, 1)[:, :cols]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("searches", [True, False])
def test_nothing_changes_before_it_learns(name: str, searches: bool) -> None:
    tensor, planes, values = made(name, searches=searches)
    assert np.array_equal(tensor.values().numpy(), values)
    again = get_format(name).decode(tensor.planes(), *values.shape)
    assert np.array_equal(again, values)
    assert all(np.array_equal(tensor.grid[p], planes[p]) for p in ("scale", "super"))
    assert len(tensor.latents) == searches and len(tensor.factors) == 1


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_slow_searchs_by_the_mean_squares(name: str) -> None:
    tensor, planes, values = made(name)
    code, rng = CODES[int(name[3])], np.random.default_rng(4)
    latent = tensor.latents[0]
    latent += torch.from_numpy(rng.normal(0, 0.5, tuple(latent.shape)).astype(np.float32))
    tensor.factors[0].mul_(1.1)
    squares = np.exp(2 * rng.standard_normal(values.shape)).astype(np.float32)
    now = tensor.values(torch.from_numpy(squares)).numpy()
    y = latent.numpy() * np.float32(tensor.unit)
    weight = np.sqrt(squares / squares.mean() + 1e-3)
    weight /= weight.max(0)
    levels = code.levels()[windows(search(y, weight, code), code.bits)]
    scale = spread(tensor_scales(planes) * np.float32(1.1))
    assert now[1].tolist() == [0.0] * 130

    def missed(found: np.ndarray) -> float:
        return float((weight * np.square(found - y))[2:].sum(dtype=np.float64))

    alive = np.where(scale == 0, 1, scale)
    assert missed(now / alive) == pytest.approx(missed(levels), rel=1e-3)
    assert (np.isclose(now, levels * scale, rtol=1e-6))[2:].mean() > 0.9
    alike = tensor.values().numpy()
    assert missed(now / alive) < 0.9 * missed(alike / alive)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """level * scale * factor, levels moving as the latents do."""
    tensor, planes, values = made(name)
    rng = np.random.default_rng(5)
    (latent,), (factor,) = tensor.latents, tensor.factors
    factor *= torch.from_numpy(rng.uniform(0.8, 1.25, tuple(factor.shape)).astype(np.float32))
    slope = torch.from_numpy(rng.normal(size=values.shape).astype(np.float32))
    now = tensor.values()
    tensor.pull(slope)
    scale = torch.from_numpy(tensor_scales(planes))
    divisor = spread(np.where(scale == 0, np.float32(np.inf), scale))
    level = torch.from_numpy(values / divisor)
    y, f = latent.clone().requires_grad_(), factor.clone().requires_grad_()
    moved = level + (y - y.detach()) * tensor.unit
    found = moved * (scale * f).repeat_interleave(64, 1)[:, :130]
    (found * slope).sum().backward()
    assert torch.allclose(now, found, rtol=1e-5, atol=1e-7)
    assert torch.allclose(latent.grad, y.grad / tensor.unit, rtol=1e-4, atol=1e-7)
    assert torch.allclose(factor.grad, f.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1.07, 1.5, 4.0], ids=["by a step", "far", "beyond what super leaves"])
def test_settled_values_are_what_the_format_holds(name: str, factor: float) -> None:
    tensor, planes, values = made(name)
    fmt = get_format(name)
    tensor.factors[0].mul_(factor)
    wanted = tensor.values().numpy().copy()
    held = fmt.decode(tensor.planes(), *values.shape)
    tensor.settle()
    assert tensor.factors == []
    settled = tensor.values().numpy()
    assert np.array_equal(fmt.decode(tensor.planes(), *values.shape), settled)
    fmt.check_planes(tensor.planes(), *values.shape)
    assert (tensor.grid["super"] > planes["super"]).all() == (factor > 2)
    # latents took up what the scales missed: only the search's own error is left, not 6%
    share = np.square(settled - wanted).mean() / np.square(wanted).mean()
    assert share < 1.1 * {2: 0.075, 3: 0.02, 4: 0.0054}[int(name[3])]
    assert np.square(held - settled).mean() < np.square(wanted).mean() * 1e-4
    other = made(name)[0]
    other.use(tensor.grid)
    assert other.factors == [] and all(np.array_equal(other.grid[p], tensor.grid[p]) for p in tensor.grid)


def test_codes_that_do_not_learn_stay_on_other_scales() -> None:
    tensor, planes, values = made("tcq3_g64", searches=False)
    tensor.factors[0].mul_(1.3)
    tensor.pull(torch.ones(values.shape))
    assert tensor.factors[0].grad is not None
    found = tensor.planes()
    assert all(np.array_equal(found[p], planes[p]) for p in ("q", "high"))
    assert np.allclose(tensor_scales(found), 1.3 * tensor_scales(planes), rtol=0.0626)


def test_latents_stay_within_the_levels_and_scales_above_0() -> None:
    tensor, planes, _ = made("tcq4_g64")
    tensor.latents[0].fill_(400.0)
    tensor.factors[0].fill_(-3.0)
    values = tensor.values()
    assert bool(torch.isfinite(values).all()) and float(values.mean()) > 0
    assert float(tensor.latents[0].max()) * tensor.unit == pytest.approx(CODES[4].levels().max())
    assert np.allclose(tensor_scales(tensor.planes()), tensor_scales(planes) / 16, rtol=0.07, atol=1e-5)


def test_a_step_means_as_much_as_in_whole_numbers() -> None:
    """The unit is the distance of even levels of the same error, at 4 bits a share of the deviation."""
    shares = [made(name)[0].unit / CODES[int(name[3])].deviation for name in NAMES]
    assert shares == pytest.approx([0.953, 0.476, 0.3], abs=0.001)
