"""Nonnegative least squares against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest

from edge_runtime.cli.least_squares import nonnegative

nnls = pytest.importorskip("scipy.optimize", reason="SciPy is the reference").nnls


@pytest.mark.parametrize("seed", range(40))
def test_the_solution_is_scipy_s(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, cols = int(rng.integers(3, 60)), int(rng.integers(1, 30))
    a = rng.standard_normal((rows, cols)) * 10.0 ** rng.integers(-6, 6, cols)
    b = a @ np.maximum(0.0, rng.standard_normal(cols)) + rng.standard_normal(rows)
    x = nonnegative(a, b)
    known, distance = nnls(a / np.linalg.norm(a, axis=0), b)
    assert (x >= 0).all()
    assert np.linalg.norm(a @ x - b) == pytest.approx(distance, rel=1e-9, abs=1e-9 * np.linalg.norm(b))
    if rows > cols:  # else there are many
        np.testing.assert_allclose(x * np.linalg.norm(a, axis=0), known, rtol=1e-6, atol=1e-9)


def test_unknowns_that_are_in_no_equation_are_zero() -> None:
    a = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    np.testing.assert_allclose(nonnegative(a, a @ [3.0, 5.0, 7.0]), [3.0, 0.0, 7.0])
    assert not nonnegative(np.zeros((2, 2)), np.ones(2)).any()


def test_what_would_be_negative_is_none_and_twins_share() -> None:
    np.testing.assert_array_equal(nonnegative(np.array([[1.0], [1.0]]), np.array([-1.0, -2.0])), [0.0])
    twins = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    found = nonnegative(twins, np.array([2.0, 4.0, 6.0]))
    assert (found >= 0).all() and found.sum() == pytest.approx(2.0)
