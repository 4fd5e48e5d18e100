"""A second, slow walk over a Program in f64 loops: what the reference backend is held to."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import (
    Activation,
    Add,
    Attention,
    Embed,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.program import Program

ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
}


def naive_attention(
    q: Array, k: Array, v: Array, positions: Array, scale: float, window: int | None, softcap: float | None
) -> Array:
    """q (tokens, heads, dim), k and v (n, kv_heads, dim) at positions 0, 1, ...; one score at a time."""
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    out = np.zeros((len(q), q.shape[1] * q.shape[2]))
    for t, position in enumerate(positions):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            scores, seen = [], []
            for j in range(len(k)):
                if j <= position and (window is None or position - j < window):
                    s = scale * float(q[t, h] @ k[j, g])
                    scores.append(s if softcap is None else softcap * math.tanh(s / softcap))
                    seen.append(j)
            weights = [math.exp(s - max(scores)) for s in scores]
            mixed = sum(w * v[j, g] for w, j in zip(weights, seen, strict=True)) / sum(weights)
            out[t, h * q.shape[2] : (h + 1) * q.shape[2]] = mixed
    return out


def naive_logits(program: Program, weights: dict[str, Array], tokens: Array) -> Array:
    """One sequence in f64, without cache, pages or batches."""
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    b: dict[str, Array] = {}
    positions = np.arange(len(tokens))
    for op in program.ops:
        match op:
            case Embed():
                b[op.out] = w[op.weight][tokens] * op.scale
            case Norm():
                x = b[op.x].reshape(len(tokens), -1, op.group or b[op.x].shape[1])
                x = x - x.mean(-1, keepdims=True) if op.kind == "layer" else x
                x = x / np.sqrt((x**2).mean(-1, keepdims=True) + op.eps) * w[op.weight]
                b[op.out] = (x + (w[op.bias] if op.bias else 0)).reshape(len(tokens), -1)
            case Linear():
                b[op.out] = b[op.x] @ w[op.weight].T + (w[op.bias] if op.bias else 0)
            case Rope():
                n = w[op.inv_freq].shape[1]
                x = b[op.x].reshape(len(tokens), -1, op.head_dim).copy()
                z = (x[..., :n] + 1j * x[..., n : 2 * n]) * op.scale
                z = z * np.exp(1j * positions[:, None] * w[op.inv_freq])[:, None]
                x[..., :n], x[..., n : 2 * n] = z.real, z.imag
                b[op.x] = x.reshape(len(tokens), -1)
            case KvAppend():
                shape = (len(tokens), program.cache[op.layer].kv_heads, -1)
                b[f"k{op.layer}"], b[f"v{op.layer}"] = b[op.k].reshape(shape), b[op.v].reshape(shape)
            case Attention():
                q = b[op.q].reshape(len(tokens), op.heads, -1)
                k, v = b[f"k{op.layer}"], b[f"v{op.layer}"]
                b[op.out] = naive_attention(q, k, v, positions, op.scale, op.window, op.softcap)
            case Activation():
                x = np.vectorize(ACTIVATIONS[op.kind])(b[op.x])
                b[op.out] = x * b[op.up] if op.up else x
            case Add():
                b[op.out] = b[op.a] + op.scale * b[op.b]
            case Logits():
                x = op.scale * (b[op.x] @ w[op.weight].T + (w[op.bias] if op.bias else 0))
                return op.softcap * np.tanh(x / op.softcap) if op.softcap else x
    raise AssertionError("a program ends with logits")
