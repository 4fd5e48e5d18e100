"""A quantized tensor in training: its values follow from latent levels and factors of its scales.

A value is (level * scale + shift) * factor: level the nearest to a latent number y of the weight, factor that
of its group. Latent numbers are held in units of the distance of levels, or, where levels are many, of a
share of how far the tensor's are spread: a step of the optimizer then means the same in every format and
tensor, and tensors of 8 bits move far enough to make up for what those of 3 bits cannot hold. Gradients pass
the rounding straight (Bengio et al. 2013, arXiv 1308.3432), and y is kept within the levels; that of a factor
is the sum over its group of gradient * value. Trellis formats: tuned_trellis.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from builders.fake_quant import Levels, flat, grouped
from builders.grids import affine, grid_for, has_grid, levels_of, range_of
from builders.tuned_trellis import TunedTrellis
from edge_runtime.engine.formats import Array, Format
from edge_runtime.engine.formats.trellis import trellis_of

_SHARE = 0.3  # of the deviation of a tensor's levels, about the distance of levels of 4 bits


class TunedTensor(Protocol):
    """What the tuner asks of a tensor. `latents` and `factors`: parameters, with `.grad` after `pull`."""

    latents: list[Tensor]
    factors: list[Tensor]

    def values(self, squares: Tensor | None = None) -> Tensor:
        """f32 (rows, cols) as they are now. squares: mean squares of the latents' gradients, as AdamW keeps
        them; None before its first step."""
        ...

    def pull(self, gradient: Tensor) -> None:
        """Set the gradients of the parameters from that of the values (rows, cols)."""
        ...

    def settle(self) -> None:
        """Give the scales the values that the format can hold; factors are 1 and do not learn from now on."""
        ...

    def planes(self, squares: Tensor | None = None) -> dict[str, Array]:
        """Codec planes nearest to the values as they are now. Raises ValueOutOfRange."""
        ...


class TunedMatrix:
    """A matrix in a format with a grid. `grid`: planes beside the codes; `span`: columns of a group; `unit`:
    levels that a latent number of 1 is."""

    def __init__(self, fmt: Format, planes: Mapping[str, Array], values: Tensor) -> None:
        """planes as an algorithm chose them; values f32 (rows, cols): what they decode to."""
        self._format = fmt
        self._cols = values.shape[1]
        self.span = fmt.span(self._cols)
        self._levels = Levels(fmt)
        self._take({p.name: planes[p.name] for p in fmt.grid_planes}, values.device)
        groups = grouped(values, self.span)
        divisor = torch.where(self._scale == 0, torch.inf, self._scale)[..., None]
        levels = self._levels.nearest((groups - self._shift[..., None]) / divisor)
        distance = (self._levels.greatest - self._levels.least) / (len(levels_of(fmt)) - 1)
        self.unit = max(distance, _SHARE * float(levels.std(correction=0)))
        self._latent = levels / self.unit
        self._factor = torch.ones_like(self._scale)
        self.latents, self.factors = [self._latent], [self._factor]

    def values(self, squares: Tensor | None = None) -> Tensor:
        self._latent.clamp_(self._levels.least / self.unit, self._levels.greatest / self.unit)
        return flat(self._on_grid() * self._factor[..., None], self._cols)

    def pull(self, gradient: Tensor) -> None:
        g = grouped(gradient, self.span)
        self._latent.grad = g * (self._scale * self._factor)[..., None]
        if self.factors:
            self._factor.grad = (g * self._on_grid()).sum(-1).sum_to_size(self._factor.shape)

    def settle(self) -> None:
        self.use(self._held())

    def use(self, grid: dict[str, Array]) -> None:
        """Settle on a grid: planes other than the codes."""
        self._take(grid, self._latent.device)
        self._factor.fill_(1.0)
        self.factors = []

    def planes(self, squares: Tensor | None = None) -> dict[str, Array]:
        return self._format.encode_on_grid(self.values().cpu().numpy(), self._held())

    def _held(self) -> dict[str, Array]:
        """The grid that the format holds nearest to the one that was learned."""
        if bool((self._factor == 1).all()):
            return self.grid
        scale, shift = ((t * self._factor).cpu().numpy() for t in (self._scale, self._shift))
        return grid_for(self._format, *range_of(scale, shift, levels_of(self._format)))

    def _take(self, grid: dict[str, Array], device: torch.device) -> None:
        self.grid = grid
        scale, shift = (np.array(a, np.float32) for a in affine(self._format, grid))
        self._scale, self._shift = (torch.from_numpy(a).to(device) for a in (scale, shift))

    def _on_grid(self) -> Tensor:
        """(rows, groups, span) with factors 1."""
        levels = self._levels.nearest(self._latent * self.unit)
        return levels * self._scale[..., None] + self._shift[..., None]


class TunedVector:
    """A vector that is stored as it is (1, n): gains of norms, biases. It moves in units of its own size."""

    def __init__(self, fmt: Format, values: Tensor) -> None:
        self._format, self._start = fmt, values
        size = values.square().mean().sqrt()
        self._unit = torch.where(size == 0, 1.0, size)
        self._moved = torch.zeros_like(values)
        self.latents: list[Tensor] = []
        self.factors = [self._moved]

    def values(self, squares: Tensor | None = None) -> Tensor:
        return self._start + self._unit * self._moved

    def pull(self, gradient: Tensor) -> None:
        self._moved.grad = gradient * self._unit

    def settle(self) -> None:
        """Nothing to do: every value can be held."""

    def planes(self, squares: Tensor | None = None) -> dict[str, Array]:
        return self._format.encode(self.values().cpu().numpy())


def tuned_tensor(
    fmt: Format, role: str, planes: Mapping[str, Array], values: Tensor, *, searches: bool = True
) -> TunedTensor | None:
    """How a tensor is tuned, or None where it stays: a matrix whose format has no scales to choose. searches:
    whether codes of trellis formats learn too."""
    if role == "vector":
        return TunedVector(fmt, values)
    code = trellis_of(fmt)
    if code is not None:
        return TunedTrellis(fmt, code, planes, values, learns=searches)
    return TunedMatrix(fmt, planes, values) if has_grid(fmt) else None
