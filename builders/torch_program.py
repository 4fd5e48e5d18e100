"""A Program's meaning in torch: for calibration, evaluation and training, on CPU or CUDA, differentiable.

`edge_runtime/backends/reference.py` is the same meaning in numpy; both are held together by a test. Sequences
are taken as a batch of equal length, whole from position 0 or (with `Past`) piece by piece, and keys and
values stay f32 and dense: no pages.
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
    Gather,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
    Round,
)
from edge_runtime.engine.program import Program
from edge_runtime.errors import Unsupported

Weight = Callable[[str], Tensor]  # f32 (rows, cols) of a tensor of the program, on the device
Buffers = MutableMapping[str, Tensor]  # name -> (batch, tokens, width)
Hook = Callable[[Linear, Tensor], Tensor]  # sees and may replace what a linear reads


class Past:
    """Keys and values of a batch so far, by cache slot: (batch, capacity, width), `tokens` of it filled."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.tokens = 0
        self._slots: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values with the new ones (batch, n, width) behind."""
        if layer not in self._slots:
            wide = [t.new_empty(t.shape[0], self.capacity, t.shape[2]) for t in (k, v)]
            self._slots[layer] = wide[0], wide[1]
        stop = self.tokens + k.shape[1]
        for kept, new in zip(self._slots[layer], (k, v), strict=True):
            kept[:, self.tokens : stop] = new
        keys, values = self._slots[layer]
        return keys[:, :stop], values[:, :stop]


class TorchProgram:
    """Runs ops of one Program over a batch of token sequences.

    `keys` and `values` of the cache slots live from a KvAppend to the last attention that reads them in the
    same call of `run`.
    """

    def __init__(self, program: Program, weight: Weight, *, checked: bool = False) -> None:
        """Raises BadConfig for a program that is not sound; `checked` ones are not looked at again."""
        if not checked:
            program.check()
        self.program = program
        self.weight = weight

    def run(
        self,
        ops: Iterable[AnyOp],
        buffers: Buffers,
        tokens: Tensor | None = None,
        hook: Hook | None = None,
        past: Past | None = None,
    ) -> None:
        """Run ops in order on `buffers`, in place; tokens (batch, length) are needed by an embedding.

        `hook(op, x)` is called before every linear with its input and gives the one to use.
        """
        cache: dict[int, tuple[Tensor, Tensor]] = {}
        for op in ops:
            self._run(op, buffers, cache, tokens, hook, past)

    def hidden(self, tokens: Tensor, hook: Hook | None = None, past: Past | None = None) -> Tensor:
        """Inputs of the logits, (batch, length, hidden), of token ids (batch, length).

        With `past` the tokens continue it, and it holds them afterwards.
        """
        buffers: Buffers = {}
        self.run(self.program.body, buffers, tokens, hook, past)
        if past is not None:
            past.tokens += tokens.shape[1]
        return buffers[self.program.heads[0].x]

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., vocab) of hidden rows (..., hidden)."""
        heads = self.program.heads
        blocks = [self.product(op, hidden) * op.scale for op in heads]
        z = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=-1)
        softcap = heads[0].softcap
        return z if softcap is None else softcap * torch.tanh(z / softcap)

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (batch, length, vocab) of token ids (batch, length)."""
        return self.logits(self.hidden(tokens))

    def product(self, op: Linear | Logits, x: Tensor) -> Tensor:
        """weight @ x + bias of rows x (..., cols); what trains adapters has its own."""
        return F.linear(x, self.weight(op.weight), self._vector(op.bias))

    def embedded(self, op: Embed, tokens: Tensor) -> Tensor:
        """Rows of the embedding, (..., hidden), unscaled; zeros for tokens of other blocks."""
        table = self.weight(op.weight)
        if self.program.tensors[op.weight].rows == self.program.vocab_size:
            return F.embedding(tokens, table)
        row = tokens - op.first
        here = (row >= 0) & (row < len(table))
        rows = F.embedding(torch.where(here, row, 0), table) if len(table) else table.new_zeros(())
        return torch.where(here[..., None], rows, 0.0)

    def _vector(self, name: str | None) -> Tensor | None:
        return None if name is None else self.weight(name)[0]

    def _run(
        self,
        op: AnyOp,
        b: Buffers,
        cache: dict[int, tuple[Tensor, Tensor]],
        tokens: Tensor | None,
        hook: Hook | None,
        past: Past | None,
    ) -> None:
        match op:
            case Embed():
                assert tokens is not None  # a caller's mistake, not a user's
                rows = self.embedded(op, tokens) * op.scale
                b[op.out] = rows if op.first == 0 else b[op.out] + rows
            case Norm():
                b[op.out] = _norm(b[op.x], self.weight(op.weight)[0], self._vector(op.bias), op)
            case Linear():
                x = b[op.x] if hook is None else hook(op, b[op.x])
                b[op.out] = self.product(op, x)
            case Rope():
                start = 0 if past is None else past.tokens
                b[op.x] = _rope(b[op.x], self.weight(op.inv_freq)[0], op, start)
            case KvAppend():
                k, v = b[op.k], b[op.v]
                cache[op.layer] = (k, v) if past is None else past.append(op.layer, k, v)
            case Attention():
                b[op.out] = _attention(b[op.q], *cache[op.layer], op)
            case Activation():
                out = _ACTIVATIONS[op.kind](b[op.x])
                b[op.out] = out if op.up is None else out * b[op.up]
            case Add():
                b[op.out] = b[op.a] + op.scale * b[op.b]
            case Gather():
                b[op.out] = b[op.x][..., self.weight(op.order)[0].long()]
            case Round():
                b[op.out] = _Rounded.apply(b[op.x], op.format, op.scale)
            case Logits():
                if op.first == 0:  # and those of all blocks
                    b["logits"] = self.logits(b[op.x])
            case Input():
                if op.out not in b:
                    raise Unsupported(f"this program begins with rows of {op.out!r}, which were not given")


class _Rounded(torch.autograd.Function):
    """Activations in the values of a format, as `numpy_ops.rounded`; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: object, x: Tensor, kind: str, scale: float | None) -> Tensor:
        largest = 448.0 if kind == "fp8_e4m3" else 127.0
        if scale is None:
            s = x.abs().amax(-1, keepdim=True) / largest
            s = torch.where(s == 0, torch.inf, s.clamp_min(2.0**-126))
        else:
            s = x.new_full((1,), scale)
        y = (x / s).clamp(-largest, largest)
        y = y.to(torch.float8_e4m3fn).to(x.dtype) if kind == "fp8_e4m3" else y.round()
        return torch.where(torch.isinf(s), 0.0, y * s)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


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


def _rope(x: Tensor, inv_freq: Tensor, op: Rope, start: int) -> Tensor:
    """Half-split rotation of the first 2n values of each head; angles are f32 products, as in the runtime.

    x[:, 0] is at position `start`.
    """
    n = inv_freq.shape[0]
    positions = torch.arange(start, start + x.shape[1], dtype=torch.float32, device=x.device)
    angle = (positions[:, None] * inv_freq).double()
    cos = (angle.cos() * op.scale).to(x.dtype)[:, None]  # (tokens, 1, n)
    sin = (angle.sin() * op.scale).to(x.dtype)[:, None]
    heads = x.unflatten(-1, (-1, op.head_dim))
    first, second, rest = heads[..., :n], heads[..., n : 2 * n], heads[..., 2 * n :]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)
    return turned.flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor, op: Attention) -> Tensor:
    """Causal grouped-query attention; q (batch, tokens, heads * head_dim) are the last of k's tokens."""
    heads, keys, values = (
        t.unflatten(-1, (-1, op.head_dim)).transpose(1, 2) for t in (q, k, v)
    )  # (batch, heads, tokens, head_dim)
    share = op.heads // op.kv_heads
    at = torch.arange(k.shape[1], device=q.device)
    distance = at[k.shape[1] - q.shape[1] :, None] - at
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
