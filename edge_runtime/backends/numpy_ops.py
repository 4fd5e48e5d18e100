"""The meaning of each op in numpy: pure functions over f32 rows (tokens, width)."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from edge_runtime.engine.formats import Array, get_format

# Attention scores of so many queries at once: bounds the memory of a long prompt
QUERY_BLOCK = 128

_erfc = np.frompyfunc(math.erfc, 1, 1)


def norm(
    x: Array, weight: Array, bias: Array | None, eps: float, kind: Literal["rms", "layer"], group: int
) -> Array:
    """x (tokens, width), normalised in runs of `group` values (0 = the row); weight and bias have as many.

    NaN where squares are beyond f32, which would give zeros.
    """
    runs: Array = x.reshape(len(x), -1, group or x.shape[1])
    if kind == "layer":
        runs = runs - runs.mean(axis=-1, keepdims=True, dtype=np.float32)
    square = np.square(runs).mean(axis=-1, keepdims=True, dtype=np.float32)
    square = np.where(np.isfinite(square), square, np.float32(np.nan))
    out: Array = runs / np.sqrt(square + np.float32(eps)) * weight
    if bias is not None:
        out = out + bias
    return out.reshape(x.shape)


def rope(x: Array, positions: Array, inv_freq: Array, head_dim: int, scale: float) -> Array:
    """Rotate value i of each head with value i + n, for i < n = len(inv_freq) (half-split order)."""
    n = len(inv_freq)
    # The angle is rounded to f32, as in the models' own code; its sine and cosine are exact to f32
    angle = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)
    cos = (np.cos(angle) * scale).astype(np.float32)[:, None]  # (tokens, 1, n)
    sin = (np.sin(angle) * scale).astype(np.float32)[:, None]
    heads = x.reshape(len(x), -1, head_dim)
    out: Array = heads.copy()
    first, second = heads[..., :n], heads[..., n : 2 * n]
    out[..., :n] = first * cos - second * sin
    out[..., n : 2 * n] = second * cos + first * sin
    return out.reshape(x.shape)


def attention(
    q: Array,
    keys: Array,
    values: Array,
    positions: Array,
    first: int,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Array:
    """Causal grouped-query attention of one sequence's tokens.

    q (tokens, heads, head_dim) at `positions` (tokens,); keys and values (n, kv_heads, head_dim) at positions
    first, first + 1, ... Returns (tokens, heads * head_dim). Softmax subtracts the row's maximum. A
    score that is not finite gives NaN.
    """
    tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    share = heads // kv_heads
    k = np.ascontiguousarray(keys.transpose(1, 2, 0))  # (kv_heads, head_dim, n)
    v = np.ascontiguousarray(values.transpose(1, 0, 2))  # (kv_heads, n, head_dim)
    key_positions = first + np.arange(keys.shape[0])
    out: Array = np.empty((tokens, kv_heads, share, head_dim), np.float32)
    for start in range(0, tokens, QUERY_BLOCK):
        block = slice(start, min(start + QUERY_BLOCK, tokens))
        count = block.stop - start
        # Only keys that some query of the block can see
        end = int(positions[block].max()) - first + 1
        begin = 0 if window is None else max(int(positions[block].min()) - window + 1 - first, 0)
        # (kv_heads, count * share, head_dim) @ (kv_heads, head_dim, n)
        grouped = q[block].reshape(count, kv_heads, share, head_dim).transpose(1, 0, 2, 3)
        scores = np.matmul(grouped.reshape(kv_heads, count * share, head_dim), k[..., begin:end])
        scores *= np.float32(scale)
        scores[~np.isfinite(scores)] = np.nan  # before a soft cap or exp(-Inf) loses it
        if softcap is not None:
            scores = capped(scores, softcap)
        distance = positions[block, None] - key_positions[begin:end]
        seen = distance >= 0
        if window is not None:
            seen &= distance < window
        # (kv_heads, count, share, n)
        scores = scores.reshape(kv_heads, count, share, -1)
        scores = np.where(seen[:, None, :], scores, np.float32(-np.inf))
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        mixed = np.matmul(scores.reshape(kv_heads, count * share, -1), v[:, begin:end])
        out[block] = mixed.reshape(kv_heads, count, share, head_dim).transpose(1, 0, 2, 3)
    return out.reshape(tokens, heads * head_dim)


def activation(x: Array, kind: Literal["silu", "gelu", "gelu_tanh", "relu"]) -> Array:
    """silu x/(1+e^-x); gelu x*Phi(x) exactly, or by its tanh form (Hendrycks & Gimpel 2016); relu."""
    one, half = np.float32(1.0), np.float32(0.5)
    out: Array
    with np.errstate(over="ignore"):  # e^-x = inf and x^3 = inf give the right limits
        match kind:
            case "silu":
                out = x / (one + np.exp(-x))
            case "gelu":
                out = (x * half * _erfc(x * -math.sqrt(0.5))).astype(np.float32)
            case "gelu_tanh":
                inner = np.float32(math.sqrt(2.0 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
                out = half * x * (one + np.tanh(inner))
            case "relu":
                out = np.maximum(x, np.float32(0.0))
    return out


def rounded(x: Array, kind: Literal["fp8_e4m3", "int8"], scale: float | None) -> Array:
    """Finite x (tokens, width) rounded by the codec of the weight format of that name, one row a token."""
    fmt = get_format(f"{kind}_row")
    if scale is None:
        planes = fmt.encode(x)
    else:
        planes = fmt.encode_on_grid(x, {"scale": np.full((len(x), 1), scale, np.float32)})
    return fmt.decode(planes, *x.shape)


def capped(x: Array, cap: float) -> Array:
    """cap * tanh(x / cap): bounds |x| smoothly (Gemma 2)."""
    out: Array = np.float32(cap) * np.tanh(x / np.float32(cap))
    return out
