"""Orthogonal matrices that spread outliers over all channels, for rotations that are merged into weights.

Hadamard matrices (entries +-1 over sqrt(n)) by Sylvester's doubling from 1 or from Paley's constructions
(Paley 1933): order q + 1 for a prime q = 3 mod 4, 2(q + 1) for a prime q = 1 mod 4, which gives 12, 20, 24,
28, 36, 44, 60 and their doubles. Sizes that have none of these, n = h * m with the largest such h, take the
Kronecker product of the Hadamard matrix of h with a random orthogonal one of m. Random signs of the rows, by
seed, as QuaRot's (Ashkboos et al. 2024).
"""

from __future__ import annotations

import math

import numpy as np

from edge_runtime.engine.formats import Array

_LARGEST_BASE = 256  # orders beyond which only doubling is tried


def rotation(n: int, seed: int) -> Array:
    """A random orthogonal matrix f64 (n, n), the same for the same seed."""
    rng = np.random.default_rng(seed)
    h = next(h for h in range(n, 0, -1) if n % h == 0 and _order_exists(h))
    q = np.kron(hadamard(h) / math.sqrt(h), _orthogonal(n // h, rng))
    signs: Array = rng.integers(0, 2, (n, 1)) * 2.0 - 1.0
    return signs * q


def hadamard(n: int) -> Array:
    """A Hadamard matrix, f64 (n, n) of +-1, of an order that `_order_exists`."""
    base, doubled = _base(n)
    h = _paley(base)
    for _ in range(doubled):
        h = np.block([[h, h], [h, -h]])
    return h


def _order_exists(n: int) -> bool:
    return _base(n)[0] > 0


def _base(n: int) -> tuple[int, int]:
    """(order of a Paley matrix or 1, doublings) that make n; (0, 0) where none does."""
    doubled = 0
    while True:
        if n == 1 or (n <= _LARGEST_BASE and n % 4 == 0 and (_prime(n - 1) or _second_kind(n))):
            return n, doubled
        if n % 2:
            return 0, 0
        n, doubled = n // 2, doubled + 1


def _second_kind(n: int) -> bool:
    return (n // 2 - 1) % 4 == 1 and _prime(n // 2 - 1)


def _prime(n: int) -> bool:
    return n > 1 and all(n % k for k in range(2, math.isqrt(n) + 1))


def _paley(n: int) -> Array:
    if n == 1:
        return np.ones((1, 1))
    if _prime(n - 1):  # the first kind: I + S, S skew
        s = _bordered(n - 1)
        s[1:, 0] = -1
        return np.eye(n) + s
    c = _bordered(n // 2 - 1)  # the second kind: C symmetric, of order n/2
    return np.kron(c, [[1.0, 1.0], [1.0, -1.0]]) + np.kron(np.eye(n // 2), [[1.0, -1.0], [-1.0, -1.0]])


def _bordered(q: int) -> Array:
    """Jacobsthal's matrix of quadratic residues mod q, with a row and a column of ones: (q + 1, q + 1)."""
    residues = {k * k % q for k in range(1, q)}
    character = np.array([0.0] + [1.0 if k in residues else -1.0 for k in range(1, q)])
    found = np.ones((q + 1, q + 1))
    found[0, 0] = 0
    found[1:, 1:] = character[(np.arange(q)[:, None] - np.arange(q)) % q]
    return found


def _orthogonal(n: int, rng: np.random.Generator) -> Array:
    """Uniform over orthogonal matrices (Mezzadri 2007)."""
    q, r = np.linalg.qr(rng.normal(size=(n, n)))
    found: Array = q * np.sign(np.diagonal(r))
    return found
