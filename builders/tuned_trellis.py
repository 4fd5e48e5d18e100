"""A matrix of a trellis format in training: codes are the best path for latent numbers, found in every step.

No weight of a trellis has a nearest level of its own: codes of a column are a shortest path, and a small
change may move many. Gradients pass the search straight, as they pass a rounding (tuned_tensor.py), and codes
must not lag behind: of what a search in every step gains, one in eight steps leaves two fifths. The search
weighs errors by the roots of the mean squares of their gradients, AdamW's own measure of a step: with the
squares themselves, or with scales alone, KL falls by half as much or less.

Scales are E4M3 and may miss a learned one by 6%: when they settle, latent numbers take that up. Where
searches would take too long, codes stay, and scales learn alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from builders import trellis
from builders.fake_quant import grouped
from edge_runtime.engine.formats import Array, Format, codes
from edge_runtime.engine.formats.fp8 import E4M3
from edge_runtime.engine.formats.microscaling import tensor_grid, tensor_scales
from edge_runtime.engine.formats.trellis import GROUP, TrellisCode, windows

_SHARE = 0.3  # of the deviation of levels, as in tuned_tensor.py
_LEAST = 1 / 16  # of a scale that is learned: none becomes 0 or negative
_FLOOR = 1e-3  # of the mean square: weights whose gradients were 0 so far have some weight too


class TunedTrellis:
    """`grid`: the planes beside the codes; `unit`: levels that a latent number of 1 is."""

    def __init__(
        self, fmt: Format, code: TrellisCode, planes: Mapping[str, Array], values: Tensor, *, learns: bool
    ) -> None:
        """planes as an algorithm chose them; values f32 (rows, cols): what they decode to. learns: whether
        codes do."""
        self._format, self._code, self._cols = fmt, code, values.shape[1]
        self._take({p.name: planes[p.name] for p in fmt.grid_planes}, values.device)
        self._codes = codes.split(fmt.codes, planes, self._cols)
        self._levels = torch.from_numpy(code.levels()[windows(self._codes, code.bits)]).to(values.device)
        # The distance of evenly spaced levels that would have this code's error for normal values
        own = 12**0.5 * 1.1 * 2.0**-code.bits
        self.unit = max(own, _SHARE) * code.deviation
        self._latent = self._levels / self.unit
        self._factor = torch.ones_like(self._scale)
        self.latents, self.factors = [self._latent] if learns else [], [self._factor]

    def values(self, squares: Tensor | None = None) -> Tensor:
        self._factor.clamp_(min=_LEAST)
        scale = self._scale * self._factor
        if self.latents:
            ends = self._code.levels()
            self._latent.clamp_(float(ends.min()) / self.unit, float(ends.max()) / self.unit)
            _, self._levels = self._path(self._latent * self.unit, scale, squares)
        return self._levels * self._spread(scale)

    def pull(self, gradient: Tensor) -> None:
        if self.latents:
            self._latent.grad = gradient * self._spread(self._scale * self._factor)
        if self.factors:
            each = gradient * self._levels * self._spread(self._scale)
            self._factor.grad = grouped(each, GROUP).sum(-1)

    def settle(self) -> None:
        before = self._scale * self._factor
        self.use(self._held())
        self._latent *= self._spread(_quotient(before, self._scale))

    def use(self, grid: dict[str, Array]) -> None:
        """Settle on a grid: planes other than the codes."""
        self._take(grid, self._latent.device)
        self._factor.fill_(1.0)
        self.factors = []

    def planes(self, squares: Tensor | None = None) -> dict[str, Array]:
        grid, found = self._held(), self._codes
        if self.latents:
            scale = torch.from_numpy(tensor_scales(grid)).to(self._latent.device)
            moved = self._spread(_quotient(self._scale * self._factor, scale))
            found, _ = self._path(self._latent * self.unit * moved, scale, squares)
        return {**codes.join(self._format.codes, found), **grid}

    def _path(self, wanted: Tensor, scale: Tensor, squares: Tensor | None) -> tuple[Array, Tensor]:
        """Codes and levels nearest to those wanted. Before gradients are known, all errors of values weigh
        the same."""
        if squares is None:
            weight = self._spread(scale).square()
        else:
            weight = (squares / squares.mean().clamp_min(1e-30) + _FLOOR).sqrt()
        weight /= weight.amax(0).clamp_min(1e-30)  # of each column, which stands alone
        found, levels = trellis.best_paths(wanted.cpu().numpy(), weight.cpu().numpy(), self._code)
        return found, torch.from_numpy(levels).to(self._latent.device)

    def _held(self) -> dict[str, Array]:
        """The grid that the format holds nearest to the one that was learned."""
        if bool((self._factor == 1).all()):
            return self.grid
        wanted, unit = (self._scale * self._factor).cpu().numpy(), self.grid["super"]
        room = float(wanted.max()) <= float(unit[0, 0]) * E4M3.largest
        return tensor_grid(wanted, unit if room else None)

    def _take(self, grid: dict[str, Array], device: torch.device) -> None:
        self.grid = grid
        self._scale = torch.from_numpy(tensor_scales(grid)).to(device)

    def _spread(self, scale: Tensor) -> Tensor:
        """The scale of every value (rows, cols)."""
        return scale.repeat_interleave(GROUP, 1)[:, : self._cols]


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    """a / b, 0 where b is."""
    return a / torch.where(b == 0, torch.inf, b)
