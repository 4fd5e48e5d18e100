"""GPTQ against the paper's dense formula, with an explicit inverse Hessian; what follows it only helps."""

from __future__ import annotations

import numpy as np
import pytest
from made_weights import made_statistics

from builders.coder import LevelCoder
from builders.grids import affine, grid_for, has_grid
from builders.observers import minmax, mse
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.statistics import InputStatistics, output_error
from builders.torch_device import Workers
from edge_runtime.engine.formats import FORMATS, Array, Format, get_format
from edge_runtime.errors import NumericError

pytest.importorskip("torch")
gptq = get_algorithm("gptq")
PLAIN, ALONE = AlgorithmOptions(), Workers(None, 1)
WITH_GRID = [name for name, fmt in FORMATS.items() if has_grid(fmt)]


def matrix(rows: int, cols: int, seed: int = 2) -> Array:
    return np.random.default_rng(seed).standard_t(5, (rows, cols)).astype(np.float32) * np.float32(0.05)


def paper(w: Array, fmt: Format, grid: dict[str, Array], hessian: Array, order: Array) -> Array:
    """Section 3.1 and 3.2 of the paper, f64: round a column, spread its error by the inverse of what is left
    of the Hessian, and take the column out of it by Gaussian elimination (equation 3)."""
    h = hessian.astype(np.float64)
    h = h + 0.01 * np.diag(h).mean() * np.eye(len(h))
    inverse = np.linalg.inv(h)
    left, q = w.astype(np.float64), np.empty(w.shape)
    scale, shift = affine(fmt, grid)
    for j in order:
        g = j // fmt.span(w.shape[1])
        s, m = scale[:, min(g, scale.shape[1] - 1)].astype(np.float64), shift[:, min(g, shift.shape[1] - 1)]
        values = fmt.levels.astype(np.float64) * s[:, None] + m[:, None]  # (rows or 1, levels)
        q[:, j] = np.take_along_axis(
            np.broadcast_to(values, (len(w), values.shape[1])),
            np.abs(left[:, j][:, None] - values).argmin(axis=1)[:, None],
            axis=1,
        )[:, 0]
        error = (left[:, j] - q[:, j]) / inverse[j, j]
        left -= error[:, None] * inverse[j]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return q


DENSE = [
    "int4_g32",
    "int3_g64",
    "int4_g32_zp",
    "int4_g32_min",
    "q2_k",
    "q4_k",
    "q6_k",
    "nf4_g64",
    "int8_row",
    "fp8_e4m3_tensor",
    "mxfp4_g32",
    "nvfp4_g16",
]


@pytest.mark.parametrize("name", DENSE)
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_the_papers_dense_formula(name: str, act_order: bool) -> None:
    """200 columns: two blocks, and a partial last group; at least one code in 100 is not the nearest."""
    fmt, w, inputs = get_format(name), matrix(12, 200), made_statistics(200)
    grid = grid_for(fmt, *minmax(w, fmt))
    hessian = gptq.Hessian.of(inputs, "cpu", act_order=act_order)
    got, same = gptq.round_rows(w, LevelCoder(fmt, minmax), grid, hessian, ALONE, refine=False)
    diagonal = np.diag(inputs.hessian)
    order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(200)
    want = paper(w, fmt, grid, inputs.hessian, order)
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)  # levels lie far further apart
    assert all(np.array_equal(same[p], grid[p]) for p in grid)
    nearest = fmt.decode(fmt.encode_on_grid(w, grid), *w.shape)
    assert (np.abs(nearest - got) > 1e-6).mean() > 0.01


@pytest.mark.parametrize("name", WITH_GRID)
def test_less_error_of_outputs_than_the_nearest_levels_in_every_format(name: str) -> None:
    fmt, w, inputs = get_format(name), matrix(24, 160), made_statistics(160)
    planes = gptq.quantize(w, fmt, inputs, PLAIN)
    fmt.check_planes(planes, *w.shape)
    mine = output_error(fmt.decode(planes, *w.shape) - w, inputs)
    grid = grid_for(fmt, *mse(w, fmt, inputs.importance))
    plain = output_error(fmt.decode(fmt.encode_on_grid(w, grid), *w.shape) - w, inputs)
    assert mine < 0.8 * plain


@pytest.mark.parametrize("name", ["int4_g32", "int3_g64_zp", "q3_k", "q4_k", "nf4_g64", "nvfp4_g16"])
def test_refining_never_adds_error_to_a_row(name: str) -> None:
    fmt, w, inputs = get_format(name), matrix(40, 160), made_statistics(160)
    hessian = gptq.Hessian.of(inputs, "cpu")
    h = hessian.matrix.numpy()
    grid = grid_for(fmt, *mse(w, fmt, inputs.importance))
    error = {}
    for refine in (False, True):
        values, kept = gptq.round_rows(w, LevelCoder(fmt, mse), grid, hessian, ALONE, refine=refine)
        e = (fmt.decode(fmt.encode_on_grid(values, kept), *w.shape) - w).astype(np.float64)
        error[refine] = np.einsum("rc,rc->r", e @ h, e)
    assert (error[True] <= error[False] * (1 + 1e-5)).all()
    assert error[True].sum() < 0.97 * error[False].sum()


def test_rows_in_chunks_are_rows_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fmt, w, inputs = get_format("int4_g32"), matrix(23, 96), made_statistics(96)
    whole = gptq.quantize(w, fmt, inputs, PLAIN)
    monkeypatch.setattr(gptq, "_CHUNK", 96 * 5)
    for plane, data in gptq.quantize(w, fmt, inputs, PLAIN).items():
        np.testing.assert_array_equal(data, whole[plane])


def test_channels_that_never_fired_are_rounded_by_themselves() -> None:
    fmt, w, inputs = get_format("int4_g32"), matrix(8, 64), made_statistics(64)
    dead = [3, 40]
    hessian = inputs.hessian.copy()
    hessian[dead] = 0
    hessian[:, dead] = 0
    planes = gptq.quantize(
        w, fmt, InputStatistics(9, hessian, inputs.absmax, inputs.mean_abs, inputs.rows), PLAIN
    )
    scale = np.abs(planes["scale"].astype(np.float32))[:, [0, 1]]
    error = np.abs(fmt.decode(planes, *w.shape) - w)[:, dead]
    inside = np.abs(w[:, dead]) <= 7 * scale
    assert (error[inside] <= scale[inside] * 0.5001).all()
    assert inside.mean() > 0.5


def test_all_inputs_zero_is_the_nearest_level() -> None:
    fmt, w = get_format("int4_g32"), matrix(8, 64)
    zero = np.zeros(64, np.float32)
    silent = InputStatistics(5, np.zeros((64, 64), np.float32), zero, zero, np.zeros((1, 64), np.float32))
    planes = gptq.quantize(w, fmt, silent, PLAIN)
    assert np.square(fmt.decode(planes, *w.shape) - w).mean() < 0.01 * np.square(w).mean()


def test_without_inputs_the_grid_of_least_error() -> None:
    fmt, w = get_format("int4_g32"), matrix(8, 64)
    want = fmt.encode_on_grid(w, grid_for(fmt, *mse(w, fmt, None)))
    got = gptq.quantize(w, fmt, None, PLAIN)
    assert all(np.array_equal(got[p], want[p]) for p in want)


def test_formats_without_scales_are_encoded() -> None:
    for name in ("f32", "bf16", "fp8_e5m2"):
        fmt, w = get_format(name), matrix(4, 64)
        got, want = gptq.quantize(w, fmt, made_statistics(64), PLAIN), fmt.encode(w)
        assert all(np.array_equal(got[p], want[p]) for p in want)


def test_a_damaged_moment_is_named() -> None:
    inputs = made_statistics(8)
    inputs.hessian[:] = np.eye(8) + 3 * np.eye(8)[::-1]  # symmetric, and negative along some directions
    with pytest.raises(NumericError, match="calibrate again"):
        gptq.Hessian.of(inputs, "cpu")


def test_drifted_inputs_move_weights_to_the_f32_models_outputs() -> None:
    """Against least squares on the inputs themselves: W' minimises |W f - W' x|^2 + damping |W' - W|^2."""
    rng = np.random.default_rng(5)
    cols, tokens = 24, 300
    f = rng.normal(size=(tokens, cols)) @ rng.normal(size=(cols, cols))
    x = f + 0.3 * rng.normal(size=f.shape)
    w = matrix(6, cols)
    inputs = InputStatistics(
        tokens,
        (x.T @ x / tokens).astype(np.float32),
        np.abs(x).max(0).astype(np.float32),
        np.abs(x).mean(0).astype(np.float32),
        x[:16].astype(np.float32),
        ((f - x).T @ x / tokens).astype(np.float32),
    )
    damping = 0.01 * np.mean(np.square(x))
    rows = np.concatenate([x / np.sqrt(tokens), np.sqrt(damping) * np.eye(cols)])
    aims = np.concatenate([f @ w.T / np.sqrt(tokens), np.sqrt(damping) * w.T.astype(np.float64)])
    want = np.linalg.lstsq(rows, aims, rcond=None)[0].T
    got = gptq.Hessian.of(inputs, "cpu").target(w, inputs)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()
    assert np.abs(got - w).max() > 0.01 * np.abs(w).max()
