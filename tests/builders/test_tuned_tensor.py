"""Tensors in training: the codec's values at first and after settling, gradients against torch's own."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from builders.grids import affine, has_grid  # noqa: E402
from builders.tuned_tensor import TunedMatrix, TunedVector, tuned_tensor  # noqa: E402
from edge_runtime.engine.formats import FORMATS, get_format  # noqa: E402
from edge_runtime.engine.formats.trellis import trellis_of  # noqa: E402

WITH_GRID = sorted(name for name, fmt in FORMATS.items() if has_grid(fmt))
TRELLIS = sorted(name for name, fmt in FORMATS.items() if trellis_of(fmt))
WITHOUT = sorted(name for name, fmt in FORMATS.items() if not has_grid(fmt) and name not in TRELLIS)


def weights(rows: int, cols: int, seed: int = 0) -> np.ndarray:
    x = (np.random.default_rng(seed).standard_t(5, (rows, cols)) * 0.05).astype(np.float32)
    x[1] = 0
    return x


def made(name: str, rows: int = 6, cols: int = 300) -> tuple[TunedMatrix, dict[str, np.ndarray], np.ndarray]:
    """(the tensor, its planes, what they decode to)"""
    fmt = get_format(name)
    planes = fmt.encode(weights(rows, cols))
    values = fmt.decode(planes, rows, cols)
    return TunedMatrix(fmt, planes, torch.from_numpy(values.copy())), planes, values


@pytest.mark.parametrize("name", WITH_GRID)
def test_nothing_changes_before_it_learns(name: str) -> None:
    tensor, planes, values = made(name)
    assert np.allclose(tensor.values().numpy(), values, rtol=3e-7, atol=1e-9)
    again = get_format(name).decode(tensor.planes(), *values.shape)
    assert np.array_equal(again, values)
    assert all(np.array_equal(tensor.grid[p], planes[p]) for p in tensor.grid)


@pytest.mark.parametrize("name", WITH_GRID)
def test_gradients_are_those_of_the_formula(name: str) -> None:
    """(nearest(y) * scale + shift) * factor with the straight-through estimator, by autograd."""
    tensor, _, values = made(name)
    fmt, rng = get_format(name), np.random.default_rng(4)
    (latent,), (factor,) = tensor.latents, tensor.factors
    latent += torch.from_numpy(rng.uniform(-0.4, 0.4, tuple(latent.shape)).astype(np.float32))
    factor *= torch.from_numpy(rng.uniform(0.8, 1.25, tuple(factor.shape)).astype(np.float32))
    slope = torch.from_numpy(rng.normal(size=values.shape).astype(np.float32))
    now = tensor.values()
    tensor.pull(slope)

    levels, unit = torch.from_numpy(fmt.levels.copy()), tensor.unit
    y, f = latent.clone().requires_grad_(), factor.clone().requires_grad_()
    scale, shift = (torch.from_numpy(np.array(a, np.float32))[..., None] for a in affine(fmt, tensor.grid))
    near = levels[(y.detach()[..., None] * unit - levels).abs().argmin(-1)]
    near = near + (y - y.detach()) * unit
    found = ((near * scale + shift) * f[..., None]).flatten(1)[:, : values.shape[1]]
    (found * slope).sum().backward()
    assert torch.allclose(now, found, rtol=1e-5, atol=1e-7)
    assert torch.allclose(latent.grad, y.grad / unit, rtol=1e-4, atol=1e-7)
    assert torch.allclose(factor.grad, f.grad, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("name", WITH_GRID)
def test_settled_values_are_what_the_format_holds(name: str) -> None:
    tensor, _, values = made(name)
    fmt = get_format(name)
    tensor.factors[0].mul_(1.07)
    wanted = tensor.values().numpy().copy()
    tensor.settle()
    assert tensor.factors == []
    settled = tensor.values().numpy()
    assert np.array_equal(fmt.decode(tensor.planes(), *values.shape), settled + np.float32(0))
    # A scale of few bits moves by half of its step at most, E8M0 by a half
    coarse = {"mxfp4_g32": 0.5, "nvfp4_g16": 0.0625}.get(name, 0.13 if name.endswith("_k") else 0.01)
    step = float(np.abs(affine(fmt, tensor.grid)[0]).max())
    assert np.abs(settled - wanted).max() <= coarse * np.abs(wanted).max() + 0.6 * step
    other = made(name)[0]
    other.use(tensor.grid)
    assert other.factors == [] and all(np.array_equal(other.grid[p], tensor.grid[p]) for p in tensor.grid)


def test_latents_stay_within_the_levels() -> None:
    tensor = made("int4_g32")[0]
    tensor.latents[0].fill_(40.0)
    tensor.values()
    assert float(tensor.latents[0].max()) * tensor.unit == pytest.approx(7.0)


def test_a_step_means_as_much_in_many_levels_as_in_few() -> None:
    """Units: the distance of levels in 2 to 4 bits, the same share of the values' spread in more."""
    assert made("int3_g32")[0].unit == made("int2_g64")[0].unit == 1.0
    shares = {}
    for name in ("int6_g64", "int8_g64", "int8_row"):
        tensor, _, values = made(name)
        scale = np.repeat(affine(get_format(name), tensor.grid)[0], tensor.span, 1)[:, :300]
        codes = np.divide(values, scale, out=np.zeros_like(values), where=scale != 0)
        shares[name] = tensor.unit / codes.std()
    assert all(share == pytest.approx(0.3, rel=0.05) for share in shares.values()), shares


def test_a_vector_moves_in_units_of_its_size() -> None:
    start = torch.tensor([[3.0, -4.0, 0.0, 0.0]])
    vector = TunedVector(get_format("f32"), start)
    assert torch.equal(vector.values(), start) and vector.latents == []
    vector.pull(torch.ones(1, 4))
    assert torch.allclose(vector.factors[0].grad, torch.full((1, 4), 2.5))
    vector.factors[0] += 1.0
    vector.settle()
    assert np.allclose(get_format("f32").decode(vector.planes(), 1, 4), [[5.5, -1.5, 2.5, 2.5]])
    assert torch.equal(TunedVector(get_format("f32"), torch.zeros(1, 3)).values(), torch.zeros(1, 3))


@pytest.mark.parametrize("name", WITHOUT)
def test_matrices_without_scales_to_choose_stay(name: str) -> None:
    fmt = get_format(name)
    planes = fmt.encode(weights(4, 64))
    assert tuned_tensor(fmt, "matrix", planes, torch.from_numpy(fmt.decode(planes, 4, 64).copy())) is None
