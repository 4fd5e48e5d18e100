"""Fake quantization in torch: a matrix takes the values that a Format would give it, and still learns.

Forward: every weight becomes the value that `fmt.decode(fmt.encode_on_grid(W, grid))` has, bit for bit, by
the same f32 operations in the same order. Backward: the straight-through estimator (Bengio et al. 2013,
arXiv 1308.3432), with the mask of PACT (Choi et al. 2018): the gradient passes where the value lies inside
the grid's range, and is 0 where it was clipped. With `learn`, scales of symmetric whole-number formats are
parameters as well, with the gradient of LSQ (Esser et al. 2020, arXiv 1902.08153, equations 3 and 5).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from edge_runtime.engine.formats import ENCODINGS, Array, Format, scaled
from edge_runtime.errors import BadConfig, Unsupported, nearest

Fit = Literal["minmax", "mse"]
FITS: tuple[Fit, ...] = get_args(Fit)
# Shares of a group's range that `mse` tries; the least squared error wins. 2 bits want about half of it.
SHRINKS = tuple(np.linspace(1.0, 0.35, 14).tolist())
LEAST_SCALE = 2.0**-14  # a learned scale stays a normal f16: at 0 it would have no gradient for ever
_CASTS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16, "fp8_e5m2": torch.float8_e5m2}


@dataclass(frozen=True, slots=True)
class Grid:
    """A grid as torch reads it: f32 (rows or 1, groups), None where a format has no such thing.

    `outliers`: numbers of columns that are kept in f16, whatever the scale (LLM.int8()).
    """

    scale: Tensor
    shift: Tensor | None = None
    zero: Tensor | None = None
    outliers: Tensor | None = None

    @staticmethod
    def of(fmt: Format, planes: Mapping[str, Array], device: torch.device | None = None) -> Grid:
        assert fmt.affine is not None  # a FakeQuantizer has one
        scale, shift = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in fmt.affine(planes))
        zero, index = planes.get("zero"), planes.get("index")
        if zero is not None:
            return Grid(scale, zero=torch.from_numpy(zero.astype(np.float32)).to(device))
        if index is not None:
            used = torch.from_numpy(index[0].astype(np.int64)).to(device)
            return Grid(scale, outliers=used[used >= 0])
        return Grid(scale, shift if bool(shift.any()) else None)


@dataclass(frozen=True, slots=True)
class Rounded:
    """Groups (rows, groups, span): `quotients` as they were divided, the nearest `levels`, their values, and
    whether the quotient lay `inside` the levels."""

    quotients: Tensor
    levels: Tensor
    values: Tensor
    inside: Tensor


class Levels:
    """Rounds quotients to a format's levels as its codec does: whole numbers half to even, a table to the
    lower of two equally near values, floats to the one whose last mantissa bit is 0."""

    def __init__(self, fmt: Format) -> None:
        levels = fmt.levels
        assert levels is not None  # a FakeQuantizer has them
        self.least, self.greatest = float(levels[0]), float(levels[-1])
        self.whole = bool(np.array_equal(levels, np.arange(levels[0], levels[-1] + 1)))
        self.signed_zero = not self.whole and fmt.kind != "table"
        self._levels = torch.from_numpy(levels.copy())
        self._thresholds = torch.from_numpy(_thresholds(levels, to_even=fmt.kind != "table"))

    def nearest(self, y: Tensor) -> Tensor:
        if self.whole:
            return torch.round(y).clamp(self.least, self.greatest) + 0.0  # -0 becomes 0, as in a code
        thresholds, levels = self._thresholds.to(y.device), self._levels.to(y.device)
        found = levels[torch.bucketize(y.contiguous(), thresholds)]
        return torch.copysign(found, y) if self.signed_zero else found

    def round(self, groups: Tensor, grid: Grid) -> Rounded:
        """f32 groups (rows, groups, span) on a grid; a scale of 0 gives the value of level 0."""
        scale = grid.scale[..., None]
        divisor = torch.where(scale == 0, math.inf, scale)
        if grid.zero is not None:
            zero = grid.zero[..., None]
            y = groups / divisor
            code = (torch.round(y) + zero).clamp(self.least, self.greatest)
            quotients, levels = y + zero, code
            values = (code - zero) * scale
        else:
            quotients = (groups if grid.shift is None else groups - grid.shift[..., None]) / divisor
            levels = self.nearest(quotients)
            values = levels * scale
            if grid.shift is not None:
                values = values + grid.shift[..., None]
        inside = (quotients >= self.least) & (quotients <= self.greatest)
        return Rounded(quotients, levels, values, inside)


class FakeQuantizer:
    """One matrix (rows, cols) in training. `planes` is the grid of codec planes that `__call__` rounds to;
    `fit` makes it anew from the weights. Formats without scales (f16, bf16, fp8_e5m2) need no grid.

    `scale` is the learned scale, f32 (rows, groups), or None. Raises Unsupported for a format that cannot be
    trained so, BadConfig for an unknown `method`.
    """

    def __init__(self, fmt: Format, method: Fit = "mse", *, learn: bool = False) -> None:
        if method not in FITS:
            raise BadConfig(f"unknown way to fit a grid {method!r}; {nearest(method, FITS)}")
        if fmt.grid_for is None and fmt.name not in _CASTS:
            raise Unsupported(f"{fmt.name} has no grid to train on; use one of the formats with scales")
        if learn and not learnable(fmt):
            raise Unsupported(
                f"the scales of {fmt.name} cannot be learned: that needs whole-number codes around 0 and one "
                "stored scale a group (int4_g64, int8_row, …)"
            )
        self.format = fmt
        self.method = method
        self.learn = learn
        self.planes: dict[str, Array] = {}
        self.scale: Tensor | None = None
        self._levels = Levels(fmt) if fmt.grid_for is not None else None
        self._grid: Grid | None = None

    def fit(self, weight: Tensor) -> None:
        """The grid for these f32 weights (rows, cols). A learned scale begins there and is then its own."""
        if self._levels is None:
            return
        planes = fit_grid(self.format, self._levels, weight.detach(), self.method)
        self.use(planes, weight.device)
        if self.learn and self._grid is not None:
            self.scale = self._grid.scale.clone().requires_grad_(True)

    def use(self, planes: Mapping[str, Array], device: torch.device | None = None) -> None:
        """Take a grid as it is: every plane but the codes."""
        self.planes = {p.name: planes[p.name] for p in self.format.grid_planes if p.name in planes}
        self._grid = Grid.of(self.format, self.planes, device)

    def __call__(self, weight: Tensor) -> Tensor:
        """The weights (rows, cols) as the format has them, differentiable."""
        if self._levels is None:
            cast: Tensor = _Cast.apply(weight, _CASTS[self.format.name])
            return cast
        assert self._grid is not None  # the caller has called fit or use
        span = self.format.span(weight.shape[1])
        if self.scale is not None:
            learned: Tensor = _Learned.apply(weight, self.scale, span, self._levels, self._stored)
            return learned
        fixed: Tensor = _Fixed.apply(weight, span, self._levels, self._grid)
        return fixed

    def encode(self, weight: Tensor) -> dict[str, Array]:
        """The codec's planes of the weights on the grid as it is now: what an engine stores."""
        values = weight.detach().cpu().numpy()
        if self._levels is None:
            return self.format.encode(values)
        if self.scale is not None:
            scale = self.format.grid_planes[0]
            stored = self._stored(self.scale.detach()).cpu().numpy()
            self.planes = {scale.name: stored.astype(ENCODINGS[scale.encoding].dtype)}
        return self.format.encode_on_grid(values, self.planes)

    def _stored(self, scale: Tensor) -> Tensor:
        """A learned scale as its plane holds it, f32, its sign kept and never 0."""
        kept = torch.copysign(scale.abs().clamp_min(LEAST_SCALE), scale)
        return kept.half().float() if self.format.grid_planes[0].encoding == "f16" else kept


def learnable(fmt: Format) -> bool:
    """Whether LSQ can learn its scales: whole-number levels around 0, one float scale a group or row."""
    shared = fmt.grid_planes
    return (
        fmt.kind == "int"
        and fmt.levels is not None
        and float(fmt.levels[0]) < 0
        and bool((np.diff(fmt.levels) == 1).all())
        and len(shared) == 1
        and shared[0].encoding in ("f16", "f32")
    )


def fit_grid(fmt: Format, levels: Levels, weight: Tensor, method: Fit) -> dict[str, Array]:
    """Grid planes for f32 weights (rows, cols): `minmax` covers each group's range; `mse` takes the share of
    the range, out of SHRINKS, with the least sum of squared errors in the group. Outlier columns are those of
    the format's own fit."""
    assert fmt.grid_for is not None  # a FakeQuantizer has checked it
    if any(plane.derived for plane in fmt.grid_planes):  # which columns are outliers only the codec knows
        planes = fmt.encode(weight.cpu().numpy())
        return {plane.name: planes[plane.name] for plane in fmt.grid_planes}
    span = fmt.span(weight.shape[1])
    low, high = scaled.extent(weight.cpu().numpy(), span)
    if method == "minmax":
        return fmt.grid_for(low, high)
    groups = grouped(weight, span)
    best = np.ones_like(low)
    least = torch.full(low.shape, math.inf, device=weight.device)
    for shrink in map(np.float32, SHRINKS):
        grid = Grid.of(fmt, fmt.grid_for(low * shrink, high * shrink), weight.device)
        error = (levels.round(groups, grid).values - groups).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        best[better.cpu().numpy()] = shrink
    return fmt.grid_for(low * best, high * best)


def _thresholds(levels: Array, *, to_even: bool) -> Array:
    """f32 t (n - 1,): a quotient y belongs to level i when exactly i of them lie below it.

    t is the greatest f32 at or below the middle, so that the middle goes down; where it goes up (to_even:
    the level an even number of steps from 0), the f32 before it.
    """
    zero = int(np.abs(levels).argmin())
    middle = (levels[:-1].astype(np.float64) + levels[1:].astype(np.float64)) / 2
    near = middle.astype(np.float32)
    near = np.where(near > middle, np.nextafter(near, np.float32(-np.inf)), near)
    if not to_even:
        return near
    upper_even = (np.arange(1, len(levels)) - zero) % 2 == 0
    return np.where(upper_even, np.nextafter(near, np.float32(-np.inf)), near)


def grouped(x: Tensor, span: int) -> Tensor:
    """(rows, cols) as (rows, groups, span), zero-padded when the last group is partial."""
    return F.pad(x, (0, -x.shape[1] % span)).unflatten(1, (-1, span))


def flat(groups: Tensor, cols: int) -> Tensor:
    return groups.flatten(1)[:, :cols]


class _Fixed(torch.autograd.Function):
    """Rounding to a grid that does not learn."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, span: int, levels: Levels, grid: Grid) -> Tensor:
        found = levels.round(grouped(weight, span), grid)
        inside, values = (flat(t, weight.shape[1]).contiguous() for t in (found.inside, found.values))
        if grid.outliers is not None:
            values[:, grid.outliers] = weight[:, grid.outliers].half().float()
            inside[:, grid.outliers] = True
        ctx.save_for_backward(inside)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


class _Learned(torch.autograd.Function):
    """Rounding to a grid whose scales learn: d value / d scale = level - quotient inside, the end's level
    outside; summed over the group and divided by sqrt(weights of a group * greatest level)."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scale: Tensor, span: int, levels: Levels, stored: Any) -> Tensor:
        found = levels.round(grouped(weight, span), Grid(stored(scale)))
        slope = torch.where(found.inside, found.levels - found.quotients, found.levels)
        ctx.save_for_backward(flat(found.inside, weight.shape[1]), slope)
        ctx.span = span
        ctx.factor = 1.0 / math.sqrt(span * levels.greatest)
        return flat(found.values, weight.shape[1]).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inside, slope = ctx.saved_tensors
        for_scale = (grouped(gradient, ctx.span) * slope).sum(-1) * ctx.factor
        return gradient * inside, for_scale, None, None, None


class _Cast(torch.autograd.Function):
    """Rounding to a float type; every gradient passes."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        return weight.to(dtype).to(torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return gradient, None
