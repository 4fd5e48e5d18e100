"""The op table: what a Program may say. Each op is one frozen record over named buffers.

A buffer holds one f32 row per token of the step: (tokens, width). `out` may name the buffer it reads only
where the op says "in place". Weight names refer to `Program.tensors`. The numpy meaning of each op is
`edge_runtime/backends/reference.py`; no model name survives here.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Op(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="op"):
    """Base of all ops."""


class Embed(Op, frozen=True, kw_only=True, tag="embed"):
    """out[t] = weight[token_id[t] - first] * scale, for the tokens that weight has rows of.

    A vocabulary may lie in several matrices, one block of ids after another: an op for each, in order, all
    with one `out` and `scale`. The rows of out whose tokens are in other blocks stay as they are.
    """

    out: str
    weight: str
    scale: float = 1.0
    first: int = 0


class Input(Op, frozen=True, kw_only=True, tag="input"):
    """out[t] = the step's input row t, f32. Begins a Program in place of an embedding."""

    out: str


class Norm(Op, frozen=True, kw_only=True, tag="norm"):
    """Normalise each run of `group` values (0 = the whole row), then scale by weight and shift by bias.

    kind "rms": x / sqrt(mean(x^2) + eps) (Zhang & Sennrich 2019); "layer": (x - mean) / sqrt(var + eps).
    weight has `group` (or the row's) entries. In place allowed.
    """

    x: str
    out: str
    weight: str
    eps: float
    kind: Literal["rms", "layer"] = "rms"
    group: int = 0
    bias: str | None = None


class Linear(Op, frozen=True, kw_only=True, tag="linear"):
    """out[t] = weight (rows, cols) @ x[t] + bias."""

    x: str
    out: str
    weight: str
    bias: str | None = None


class Rope(Op, frozen=True, kw_only=True, tag="rope"):
    """Rotary embedding (Su et al. 2021), half-split order, in place on heads of `head_dim`.

    The first 2*len(inv_freq) values of each head rotate, by angle position * inv_freq[i]; cos and sin are
    multiplied by `scale` (yarn / longrope attention factor). `inv_freq` names an f32 tensor.
    """

    x: str
    inv_freq: str
    head_dim: int
    scale: float = 1.0


class KvAppend(Op, frozen=True, kw_only=True, tag="kv_append"):
    """Store the step's keys and values (tokens, kv_heads*head_dim) in cache slot `layer`, quantized."""

    k: str
    v: str
    layer: int


class Attention(Op, frozen=True, kw_only=True, tag="attention"):
    """Causal attention of q (tokens, heads*head_dim) over cache slot `layer`; grouped when heads > kv_heads.

    score = scale * q.k, softcap c: c*tanh(score/c); `window` w: key j is seen from position i when i - j < w.
    """

    q: str
    out: str
    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class Activation(Op, frozen=True, kw_only=True, tag="activation"):
    """out = f(x), or f(x) * gate_with when `up` names a second buffer (gated unit). In place on x allowed."""

    x: str
    out: str
    kind: Literal["silu", "gelu", "gelu_tanh", "relu"]
    up: str | None = None


class Add(Op, frozen=True, kw_only=True, tag="add"):
    """out = a + scale * b. In place on a allowed."""

    a: str
    b: str
    out: str
    scale: float = 1.0


class Gather(Op, frozen=True, kw_only=True, tag="gather"):
    """out[t][j] = x[t][order[j]]: a permutation or a choice of channels.

    `order` names an f32 vector of whole numbers below the width of x; their values are checked when an engine
    is loaded.
    """

    x: str
    out: str
    order: str


class Round(Op, frozen=True, kw_only=True, tag="round"):
    """out = x rounded to an activation format: code(x / s) * s, nearest even, saturating. In place allowed.

    fp8_e4m3 ends at 448, int8 at 127. s is `scale`, or for None the token's absmax / 448 or / 127: the codec
    and the scales of the weight formats `fp8_e4m3_row` and `int8_row`.
    """

    x: str
    out: str
    format: Literal["fp8_e4m3", "int8"]
    scale: float | None = None


class Logits(Op, frozen=True, kw_only=True, tag="logits"):
    """For the step's chosen rows: logits = softcap(scale * (weight @ x + bias)). Ends a Program.

    Those of the ids from `first` on, as many as weight has rows: where the vocabulary lies in several
    matrices a Program ends with an op for each, in order, that differ in weight, bias and first alone.
    """

    x: str
    weight: str
    scale: float = 1.0
    softcap: float | None = None
    bias: str | None = None
    first: int = 0


AnyOp = (
    Embed | Input | Norm | Linear | Rope | KvAppend | Attention | Activation | Add | Gather | Round | Logits
)


def reads(op: AnyOp) -> tuple[str, ...]:
    """Names of the buffers an op reads."""
    match op:
        case Embed(first=0) | Input():
            return ()
        case Embed():
            return (op.out,)
        case Norm() | Linear() | Logits() | Rope() | Gather() | Round():
            return (op.x,)
        case KvAppend():
            return (op.k, op.v)
        case Attention():
            return (op.q,)
        case Activation():
            return (op.x,) if op.up is None else (op.x, op.up)
        case Add():
            return (op.a, op.b)


def writes(op: AnyOp) -> tuple[str, ...]:
    """Names of the buffers an op writes."""
    match op:
        case KvAppend() | Logits():
            return ()
        case Rope():
            return (op.x,)
        case _:
            return (op.out,)


def weights(op: AnyOp) -> tuple[str, ...]:
    """Names of the tensors an op reads."""
    names: tuple[str | None, ...]
    match op:
        case Embed():
            names = (op.weight,)
        case Norm() | Linear() | Logits():
            names = (op.weight, op.bias)
        case Rope():
            names = (op.inv_freq,)
        case Gather():
            names = (op.order,)
        case _:
            names = ()
    return tuple(n for n in names if n is not None)
