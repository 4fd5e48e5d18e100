"""Two models' logits over the same tokens, compared without ever holding them: one pass over the vocabulary.

For each position the softmaxes are taken online (Milakov & Gimelshein 2018): running maximum, sum of
exponentials, and for KL the sum of exp(f) * (f - q), rescaled when the maximum grows. All sums are f64.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.engine.ops import Logits

BLOCK_ITEMS = 1 << 18  # logits of one block; six f64 arrays of this size are alive at once (12 MiB)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Engine against f32 over `tokens` predicted tokens; KL(f32 || engine) in nats.

    layer_cosine: by layer, cosine of the two models' residual streams after it, where it was measured.
    """

    tokens: int
    perplexity: float
    perplexity_f32: float
    kl_mean: float
    kl_p99: float
    top1_agreement: float
    layer_cosine: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Positions:
    """By position, each (n,): KL(f32 || engine) and the two models' losses in nats, same first choice."""

    kl: Array
    loss_f32: Array
    loss: Array
    agrees: Array


class _Softmax:
    """Online log-sum-exp and argmax of (positions,) rows."""

    def __init__(self, positions: int) -> None:
        self.top = np.full(positions, -np.inf)
        self.sum = np.zeros(positions)
        self.best = np.zeros(positions, np.int64)

    def take(self, logits: Array, start: int) -> Array:
        """Add logits (positions, block) of ids from `start`; returns the factor that rescales older sums."""
        at = logits.argmax(axis=1)
        peak = logits[np.arange(len(at)), at]
        self.best = np.where(peak > self.top, at + start, self.best)  # ties keep the lower id
        top = np.maximum(self.top, peak)
        with np.errstate(invalid="ignore"):
            factor = np.where(np.isneginf(self.top), 0.0, np.exp(self.top - top))
        self.top, self.sum = top, self.sum * factor + np.exp(logits - top[:, None]).sum(axis=1)
        return factor

    @property
    def log_sum(self) -> Array:
        return self.top + np.log(self.sum)


def compare(blocks: Iterator[tuple[int, Array, Array]], targets: Array) -> Comparison:
    """Compare blocks (start id, f32 model's logits, engine's logits), each (positions, block), over the whole
    vocabulary; targets (positions,) are the tokens that follow.
    """
    return summarise([measure(blocks, targets)])


def measure(blocks: Iterator[tuple[int, Array, Array]], targets: Array) -> Positions:
    """As `compare`, position by position."""
    n = len(targets)
    f, q = _Softmax(n), _Softmax(n)
    cross = np.zeros(n)  # sum of exp(f - f.top) * (f - q)
    at_f, at_q = np.zeros(n), np.zeros(n)  # logit of the target
    for start, logits_f, logits_q in blocks:
        zf, zq = logits_f.astype(np.float64), logits_q.astype(np.float64)
        cross *= f.take(zf, start)
        q.take(zq, start)
        cross += (np.exp(zf - f.top[:, None]) * (zf - zq)).sum(axis=1)
        here = np.flatnonzero((targets >= start) & (targets < start + zf.shape[1]))
        at_f[here], at_q[here] = zf[here, targets[here] - start], zq[here, targets[here] - start]
    # KL = E_f[f - q] - log Z_f + log Z_q; rounding may leave -1e-16 where both are equal
    kl = np.maximum(cross / f.sum - f.log_sum + q.log_sum, 0.0)
    return Positions(kl, f.log_sum - at_f, q.log_sum - at_q, f.best == q.best)


def summarise(pieces: Sequence[Positions]) -> Comparison:
    """The figures of all positions of all pieces together."""
    kl, loss_f32, loss, agrees = (
        np.concatenate([getattr(piece, name) for piece in pieces])
        for name in ("kl", "loss_f32", "loss", "agrees")
    )
    return Comparison(
        tokens=len(kl),
        perplexity=_perplexity(loss),
        perplexity_f32=_perplexity(loss_f32),
        kl_mean=float(kl.mean()),
        kl_p99=float(np.quantile(kl, 0.99)),
        top1_agreement=float(agrees.mean()),
    )


def _perplexity(losses: Array) -> float:
    """exp of the mean loss (nats), kept finite: a manifest holds numbers only."""
    return float(np.exp(min(losses.mean(), 700.0)))


def logits(op: Logits, x: Array, weight: Array, bias: Array | None) -> Array:
    """Logits of a block of the vocabulary: x (positions, hidden), weight (block, hidden), bias (block,)."""
    z = x @ weight.T
    if bias is not None:
        z = z + bias
    z = z * np.float32(op.scale)
    if op.softcap is not None:
        z = np.float32(op.softcap) * np.tanh(z / np.float32(op.softcap))
    return np.asarray(z, np.float32)
