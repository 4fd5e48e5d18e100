"""The second moment and other statistics of a linear's inputs, added up batch by batch in torch.

Products are f32 (of one batch), sums over batches f64, and only the upper triangle is made, in bands of rows.
Bands and batches have fixed sizes and a fixed order, so the result does not depend on how many workers there
are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from builders.statistics import SAMPLE_ROWS
from builders.torch_device import Workers
from edge_runtime.engine.formats import Array

BAND = 512  # rows of the moment that one piece of work adds to


class Moments:
    """Of inputs of width n. `sample` (k,) are the numbers of the tokens whose inputs are kept, ascending."""

    def __init__(self, width: int, sample: Array, device: str) -> None:
        self.width, self.count = width, 0
        self._bands = [
            torch.zeros(min(BAND, width - a), width - a, dtype=torch.float64, device=device)
            for a in range(0, width, BAND)
        ]
        self._absmax = torch.zeros(width, device=device)
        self._magnitude = torch.zeros(width, dtype=torch.float64, device=device)
        self._sample = sample
        self._rows = np.empty((len(sample), width), np.float32)

    def add(self, x: Tensor, workers: Workers) -> None:
        """Take f32 inputs (tokens, n); they follow those taken before."""
        size = x.abs()
        self._absmax = torch.maximum(self._absmax, size.amax(0))
        self._magnitude += size.sum(0, dtype=torch.float64)

        def band(i: int) -> None:
            a = i * BAND
            self._bands[i] += x[:, a : a + BAND].T @ x[:, a:]

        for _ in workers.map(band, range(len(self._bands))):
            pass
        first, last = np.searchsorted(self._sample, [self.count, self.count + len(x)])
        here = torch.from_numpy(self._sample[first:last] - self.count).to(x.device)
        self._rows[first:last] = x[here].cpu().numpy()
        self.count += len(x)

    def packed(self) -> dict[str, Array]:
        """Arrays to be stored: hessian f32 (n (n + 1) / 2,), the rows of its upper triangle one by one;
        absmax and mean_abs f32 (n,); rows f16 (k, n), or f32 where f16 cannot hold them.

        The sums are given up.
        """
        triangle = np.empty(self.width * (self.width + 1) // 2, np.float32)
        at = 0
        while self._bands:
            band = (self._bands.pop(0) / self.count).float().cpu().numpy()
            for i, row in enumerate(band):
                triangle[at : at + len(row) - i] = row[i:]
                at += len(row) - i
        big = float(np.abs(self._rows).max(initial=0.0)) > 65504.0
        return {
            "hessian": triangle,
            "absmax": self._absmax.cpu().numpy(),
            "mean_abs": (self._magnitude / self.count).float().cpu().numpy(),
            "rows": self._rows if big else self._rows.astype(np.float16),
        }


def sample_tokens(tokens: int, seed: int) -> Array:
    """Numbers of the tokens whose inputs are kept: the same for every linear, ascending int64."""
    rng = np.random.default_rng((seed, 2))
    return np.sort(rng.choice(tokens, min(SAMPLE_ROWS, tokens), replace=False)).astype(np.int64)
