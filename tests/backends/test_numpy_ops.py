"""The numpy meaning of each op against naive f64 loops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from naive_walk import ACTIVATIONS, naive_attention

from edge_runtime.backends import numpy_ops


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention(window: int | None, softcap: float | None, kv_heads: int) -> None:
    rng = np.random.default_rng(3)
    q = rng.standard_normal((6, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 11, kv_heads, 8)).astype(np.float32)
    positions = np.array([10, 0, 3, 9, 4, 7])  # any order
    got = numpy_ops.attention(q, k, v, positions, 0, scale=0.9, window=window, softcap=softcap)
    want = naive_attention(q, k, v, positions, 0.9, window, softcap)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5)


def test_attention_of_a_window_may_start_late() -> None:
    rng = np.random.default_rng(4)
    q = rng.standard_normal((2, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 20, 2, 8)).astype(np.float32)
    positions = np.array([18, 19])
    whole = numpy_ops.attention(q, k, v, positions, 0, scale=0.5, window=3, softcap=None)
    part = numpy_ops.attention(q, k[16:], v[16:], positions, 16, scale=0.5, window=3, softcap=None)
    np.testing.assert_allclose(part, whole, rtol=1e-6, atol=1e-7)


def test_attention_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    q = rng.standard_normal((7, 4, 8)).astype(np.float32)
    k, v = rng.standard_normal((2, 7, 2, 8)).astype(np.float32)
    whole = numpy_ops.attention(q, k, v, np.arange(7), 0, scale=0.5, window=None, softcap=None)
    monkeypatch.setattr(numpy_ops, "QUERY_BLOCK", 3)
    blocks = numpy_ops.attention(q, k, v, np.arange(7), 0, scale=0.5, window=None, softcap=None)
    np.testing.assert_allclose(blocks, whole, rtol=1e-5, atol=1e-6)


def test_attention_survives_large_scores() -> None:
    q = np.full((1, 1, 4), 1e4, np.float32)
    k = np.stack([np.full((1, 4), 1e4), np.full((1, 4), -1e4)]).astype(np.float32)
    v = np.array([[[1.0, 2.0, 3.0, 4.0]], [[9.0, 9.0, 9.0, 9.0]]], np.float32)
    got = numpy_ops.attention(q, k, v, np.array([1]), 0, scale=1.0, window=None, softcap=None)
    np.testing.assert_array_equal(got, v[0])


@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("group", [0, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_norm(kind: Any, group: int, bias: bool) -> None:
    rng = np.random.default_rng(6)
    x = (3 + 2 * rng.standard_normal((5, 12))).astype(np.float32)
    n = group or 12
    weight, shift = rng.standard_normal((2, n)).astype(np.float32)
    got = numpy_ops.norm(x, weight, shift if bias else None, 1e-3, kind, group)
    want = np.zeros((5, 12))
    for t in range(5):
        for start in range(0, 12, n):
            run = x[t, start : start + n].astype(np.float64)
            if kind == "layer":
                run = run - run.mean()
            run = run / math.sqrt(float(np.mean(run**2)) + 1e-3) * weight
            want[t, start : start + n] = run + shift if bias else run
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_rope_is_a_rotation_of_pairs() -> None:
    rng = np.random.default_rng(7)
    x = rng.standard_normal((4, 2 * 10)).astype(np.float32)  # two heads of 10, of which 6 values rotate
    positions = np.array([0, 1, 63, 100000], np.int32)
    inv_freq = np.array([1.0, 0.1, 0.001], np.float32)
    got = numpy_ops.rope(x, positions, inv_freq, 10, 1.25).reshape(4, 2, 10)
    heads = x.reshape(4, 2, 10)
    pairs = heads[..., :3].astype(np.float64) + 1j * heads[..., 3:6]
    angle = np.float32(positions)[:, None] * inv_freq
    turned = pairs * 1.25 * np.exp(1j * angle.astype(np.float64))[:, None]
    np.testing.assert_allclose(got[..., :3], turned.real, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(got[..., 3:6], turned.imag, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(got[..., 6:], heads[..., 6:])


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activation(kind: Any) -> None:
    x = np.linspace(-12, 12, 241, dtype=np.float32)
    got = numpy_ops.activation(x, kind)
    want = [ACTIVATIONS[kind](float(v)) for v in x]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=2e-6)
    limits = numpy_ops.activation(np.array([-1e30, 1e30], np.float32), kind)
    np.testing.assert_array_equal(limits, np.array([0.0, 1e30], np.float32))
