"""A Program's meaning in torch: for calibration, evaluation and training, on CPU or CUDA, differentiable.

`edge_runtime/backends/reference.py` is the same meaning in numpy; both are held together by a test. Sequences
are taken as a batch of equal length from position 0, and keys and values stay f32: no pages, no cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, MutableMapping

import torch
import torch.nn.functional as F
from torch import Tensor

from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.program import Program
from edge_runtime.errors import Unsupported

Weight = Callable[[str], Tensor]  # f32 (rows, cols) of a tensor of the program, on the device
Buffers = MutableMapping[str, Tensor]  # name -> (batch, tokens, width)
Hook = Callable[[Linear, Tensor], Tensor]  # sees and may replace what a linear reads


class TorchProgram:
    """Runs ops of one Program over a batch of token sequences.

    `keys` and `values` of the cache slots live from a KvAppend to the last attention that reads them in the
    same call of `run`.
    """

    def __init__(self, program: Program, weight: Weight) -> None:
        program.check()
        self.program = program
        self.weight = weight

    def run(
        self, ops: Iterable[AnyOp], buffers: Buffers, tokens: Tensor | None = None, hook: Hook | None = None
    ) -> None:
        """Run ops in order on `buffers`, in place; tokens (batch, length) are needed by an embedding.

        `hook(op, x)` is called before every linear with its input and gives the one to use.
        """
        cache: dict[int, tuple[Tensor, Tensor]] = {}
        for op in ops:
            self._run(op, buffers, cache, tokens, hook)

    def hidden(self, tokens: Tensor, hook: Hook | None = None) -> Tensor:
        """Inputs of the logits, (batch, length, hidden), of token ids (batch, length)."""
        buffers: Buffers = {}
        self.run(self.program.ops[:-1], buffers, tokens, hook)
        return buffers[self._head.x]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab) of hidden rows (..., hidden)."""
        op = self._head
        z = self.product(op, hidden) * op.scale
        return z if op.softcap is None else op.softcap * torch.tanh(z / op.softcap)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocab) of token ids (batch, length)."""
        return self.logits(self.hidden(tokens))

    def product(self, op: Linear | Logits, x: Tensor) -> Tensor:
        """weight @ x + bias of rows x (..., cols); what trains adapters has its own."""
        return F.linear(x, self.weight(op.weight), self._vector(op.bias))

    def embedded(self, op: Embed, tokens: Tensor) -> Tensor:
        """Rows of the embedding, (..., hidden), unscaled."""
        return F.embedding(tokens, self.weight(op.weight))

    @property
    def _head(self) -> Logits:
        op = self.program.ops[-1]
        assert isinstance(op, Logits)  # program.check() proved it
        return op

    def _vector(self, name: str | None) -> Tensor | None:
        return None if name is None else self.weight(name)[0]

    def _run(
        self,
        op: AnyOp,
        b: Buffers,
        cache: dict[int, tuple[Tensor, Tensor]],
        tokens: Tensor | None,
        hook: Hook | None,
    ) -> None:
        match op:
            case Embed():
                assert tokens is not None  # a caller's mistake, not a user's
                b[op.out] = self.embedded(op, tokens) * op.scale
            case Norm():
                b[op.out] = _norm(b[op.x], self.weight(op.weight)[0], self._vector(op.bias), op)
            case Linear():
                x = b[op.x] if hook is None else hook(op, b[op.x])
                b[op.out] = self.product(op, x)
            case Rope():
                b[op.x] = _rope(b[op.x], self.weight(op.inv_freq)[0], op)
            case KvAppend():
                cache[op.layer] = (b[op.k], b[op.v])
            case Attention():
                b[op.out] = _attention(b[op.q], *cache[op.layer], op)
            case Activation():
                out = _ACTIVATIONS[op.kind](b[op.x])
                b[op.out] = out if op.up is None else out * b[op.up]
            case Add():
                b[op.out] = b[op.a] + op.scale * b[op.b]
            case Logits():
                b["logits"] = self.logits(b[op.x])
            case Input():
                if op.out not in b:
                    raise Unsupported(f"this program begins with rows of {op.out!r}, which were not given")


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


def _norm(x: Tensor, weight: Tensor, bias: Tensor | None, op: Norm) -> Tensor:
    runs = x.unflatten(-1, (-1, op.group or x.shape[-1]))
    if op.kind == "layer":
        runs = runs - runs.mean(-1, keepdim=True)
    out = runs * torch.rsqrt(runs.square().mean(-1, keepdim=True) + op.eps) * weight
    if bias is not None:
        out = out + bias
    return out.flatten(-2)


def _rope(x: Tensor, inv_freq: Tensor, op: Rope) -> Tensor:
    """Half-split rotation of the first 2n values of each head; angles are f32 products, as in the runtime."""
    n = inv_freq.shape[0]
    positions = torch.arange(x.shape[1], dtype=torch.float32, device=x.device)
    angle = (positions[:, None] * inv_freq).double()
    cos = (angle.cos() * op.scale).to(x.dtype)[:, None]  # (tokens, 1, n)
    sin = (angle.sin() * op.scale).to(x.dtype)[:, None]
    heads = x.unflatten(-1, (-1, op.head_dim))
    first, second, rest = heads[..., :n], heads[..., n : 2 * n], heads[..., 2 * n :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return turned.flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor, op: Attention) -> Tensor:
    """Causal grouped-query attention of whole sequences, q (batch, tokens, heads * head_dim)."""
    heads, keys, values = (
        t.unflatten(-1, (-1, op.head_dim)).transpose(1, 2) for t in (q, k, v)
    )  # (batch, heads, tokens, head_dim)
    share = op.heads // op.kv_heads
    length = q.shape[1]
    at = torch.arange(length, device=q.device)
    distance = at[:, None] - at
    seen = distance >= 0
    if op.window is not None:
        seen &= distance < op.window
    if op.softcap is None:
        mixed = F.scaled_dot_product_attention(
            heads, keys, values, attn_mask=seen, scale=op.scale, enable_gqa=share > 1
        )
    else:
        keys, values = (t.repeat_interleave(share, dim=1) for t in (keys, values))
        scores = heads @ keys.transpose(-1, -2) * op.scale
        scores = op.softcap * torch.tanh(scores / op.softcap)
        mixed = scores.masked_fill(~seen, -math.inf).softmax(-1) @ values
    return mixed.transpose(1, 2).flatten(-2)
