"""Orthogonal matrices that mix many channels at little cost: Hadamard with random signs, for any width.

Width = m * 2^k with m odd: the Kronecker product of a random orthogonal m x m matrix and Sylvester's Hadamard
matrix of 2^k, after random signs (QuaRot, Ashkboos et al. 2024, uses known Hadamard matrices for m; any
orthogonal one keeps the model's meaning). Applied by the fast transform: n log n per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.formats import Array


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """The orthogonal matrix Q = diag(signs) (odd x H), f64: signs (n,), odd (m, m), H 2^k x 2^k."""

    signs: Array
    odd: Array

    @property
    def width(self) -> int:
        return len(self.signs)

    def right(self, rows: Array) -> Array:
        """rows @ Q, f64 (r, n)."""
        m = len(self.odd)
        x = (rows.astype(np.float64) * self.signs).reshape(len(rows), m, -1)
        x = np.einsum("rik,ij->rjk", x, self.odd)
        return _walsh(x).reshape(len(rows), -1)

    def back(self, rows: Array) -> Array:
        """rows @ Q^T, f64 (r, n)."""
        m = len(self.odd)
        x = _walsh(rows.astype(np.float64).reshape(len(rows), m, -1))  # H is symmetric
        x = np.einsum("rjk,ij->rik", x, self.odd)
        turned: Array = x.reshape(len(rows), -1) * self.signs
        return turned


def make_turn(width: int, seed: int) -> Turn:
    """The matrix of a width; the same seed gives the same one."""
    rng = np.random.default_rng((seed, width))
    m = width
    while m % 2 == 0:
        m //= 2
    odd, triangle = np.linalg.qr(rng.normal(size=(m, m)))
    odd = odd * np.sign(np.diagonal(triangle))  # the uniform (Haar) measure: Mezzadri 2007
    return Turn(rng.choice([-1.0, 1.0], width), odd)


def _walsh(x: Array) -> Array:
    """x @ H along the last axis, whose length is a power of two."""
    n = x.shape[-1]
    half = 1
    while half < n:
        pairs = x.reshape(*x.shape[:-1], -1, 2, half)
        x = np.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], axis=-2)
        x = x.reshape(*x.shape[:-3], n)
        half *= 2
    return x / np.sqrt(n)
