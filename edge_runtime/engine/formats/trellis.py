"""Trellis-coded quantization: `tcq4_g64`, `tcq3_g64` and `tcq2_g64`, of 4, 3 and 2 bits a weight.

A code does not name a value by itself: the value of a weight depends on its code and on those of the weights
before it, down the rows of its column, which reach 12 bits back. So a few codes choose among 4096 values and
neighbours correct each other's errors (trellis-coded quantization, Marcellin & Fischer 1990; the bitshift
trellis is QTIP's, Tseng et al. 2024, which EXL3 uses too). For values of a normal distribution the mean
square error of 4 bits is 0.0052 where 16 freely chosen levels give 0.0095, of 3 bits 0.0194 (0.0345), of 2
bits 0.073 (0.118); no code of 4, 3 and 2 bits can give less than 0.0039, 0.0156 and 0.0625.

    window_r = code_r | code_(r-1) << bits | code_(r-2) << 2 bits | ...    of 12 bits
    value_r  = level(window_r) * (scale * super)                           each product rounded to f32

Columns are cut into runs of 128 rows, the last one shorter. A run is a circle: the row before its first is
its last, where rows are counted in whole panels of 16 and those beyond the matrix have the code 0.

`level` is computed, not looked up in 4096 entries, so that processors decode 64 weights with a few shuffles
of bytes: see `TrellisCode`. Scales are E4M3 for 64 weights along a row, times one f32 for the tensor.

Which codes give the least error is a shortest path (Viterbi): `search`, of which kernels/cpu/trellis.cpp is
the fast one that the builder uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from edge_runtime.engine.formats import codes, scaled
from edge_runtime.engine.formats.microscaling import tensor_grid, tensor_scales
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register
from edge_runtime.engine.formats.trellis_tables import TABLES
from edge_runtime.errors import ValueOutOfRange

GROUP = 64  # weights of a row that share a scale
RUN = 128  # rows of a circle
PANEL = 16  # rows that a run is counted in
WINDOW = 12  # bits that a value depends on
ZERO = 64  # what the sum of the three parts is more than twice the level
_CHAINS = 64  # searched together
_BIAS = np.float32(1e9)  # above every path's error, in squared levels


@dataclass(frozen=True)
class TrellisCode:
    """The levels of windows: with a, b and c the window's nibbles, lowest first, and s = b ^ mix1[c],

    2 level + 64 = sum0[a ^ mix0[s]] + sum1[mix2[a ^ mix3[c]] ^ b] + sum2[s]    in 0..127

    `mix` (4, 16) are permutations, drawn at random; `sums` (3, 16) whole numbers modulo 256, fitted to normal
    values (bench/trellis_tables.py). `deviation`: the standard deviation, in levels, of the normal
    distribution that it fits best.
    """

    bits: int
    mix: Array
    sums: Array
    deviation: float

    @property
    def states(self) -> int:
        """What is remembered of the rows before: all but a window's newest code."""
        return 1 << (WINDOW - self.bits)

    @property
    def memory(self) -> int:
        """Rows before its own that a value depends on."""
        return WINDOW // self.bits - 1

    def levels(self) -> Array:
        """f32 (4096,) by window."""
        return _levels(self.bits)


CODES = {bits: TrellisCode(bits, *table) for bits, table in TABLES.items()}


@lru_cache(maxsize=len(TABLES))
def _levels(bits: int) -> Array:
    mix, sums = CODES[bits].mix, CODES[bits].sums
    window = np.arange(1 << WINDOW)
    a, b, c = window & 15, window >> 4 & 15, window >> 8
    s = b ^ mix[1][c]
    total = sums[0][a ^ mix[0][s]] + sums[1][mix[2][a ^ mix[3][c]] ^ b] + sums[2][s]
    found: Array = ((total % 256).astype(np.float32) - np.float32(ZERO)) / np.float32(2)
    found.setflags(write=False)
    return found


def trellis_of(fmt: Format) -> TrellisCode | None:
    """The code of a trellis format, None of any other."""
    return CODES[int(fmt.name[3])] if fmt.planes[0].encoding.startswith("tcq") else None


def runs(rows: int) -> list[tuple[int, int]]:
    """(first, end) rows of the circles of a matrix."""
    return [(at, min(at + RUN, rows)) for at in range(0, rows, RUN)]


def windows(code: Array, bits: int) -> Array:
    """Codes u8 (rows, cols) -> the windows u16 that their values depend on."""
    out = np.empty(code.shape, np.uint16)
    for first, end in runs(len(code)):
        circle = np.pad(code[first:end], ((0, -(end - first) % PANEL), (0, 0))).astype(np.uint16)
        window = circle.copy()
        for back in range(1, WINDOW // bits):
            window |= np.roll(circle, back, axis=0) << np.uint16(bits * back)
        out[first:end] = window[: end - first]
    return out


def search(targets: Array, weights: Array, code: TrellisCode) -> Array:
    """Codes u8 (rows, chains) whose levels miss f32 targets (rows, chains) least: the sum over each run of
    weights * (target - level)^2, weights f32 (rows, chains) not negative.

    Two passes: from any state, started half way round, for the state that the circle closes in; then the best
    path from it to it. That is the best of all but for a rare better closing state.
    """
    out = np.empty(targets.shape, np.uint8)
    for first, end in runs(len(targets)):
        for at in range(0, targets.shape[1], _CHAINS):
            part = (slice(first, end), slice(at, at + _CHAINS))
            out[part] = _circle(targets[part].T, weights[part].T, code).T
    return out


def _circle(y: Array, w: Array, code: TrellisCode) -> Array:
    """(chains, rows of one run) -> codes."""
    chains, rows = y.shape
    steps = -(-rows // PANEL) * PANEL
    y, w = (np.pad(x, ((0, 0), (0, steps - rows))) for x in (y, w))
    half = steps // 2
    order = [(half + t) % steps for t in range(steps)]
    metric = np.zeros((chains, code.states), np.float32)
    backs = [_step(metric, y[:, r], w[:, r], r >= rows, code) for r in order]
    state = metric.argmin(1)
    for back in reversed(backs[steps - half :]):  # to where row 0 begins
        state = _before(state, back, code)
    closing = state
    metric.fill(_BIAS)
    metric[np.arange(chains), closing] = 0
    backs = [_step(metric, y[:, r], w[:, r], r >= rows, code) for r in range(steps)]
    found = np.empty((chains, steps), np.uint8)
    state = closing
    for r in reversed(range(steps)):
        found[:, r] = state & ((1 << code.bits) - 1)
        state = _before(state, backs[r], code)
    return found[:, :rows]


def _step(metric: Array, y: Array, w: Array, beyond: bool, code: TrellisCode) -> Array:
    """One row: the errors of the best paths to every state, in place, and each path's oldest code u8.

    A state is the newest codes, the last one in the lowest bits; of its predecessors only the oldest code,
    which it forgets, differs.
    """
    choices, states = 1 << code.bits, code.states
    level = code.levels().reshape(choices, states)  # by the code forgotten, and the new state
    before = metric.reshape(-1, choices, states // choices, 1)
    least = np.full(metric.shape, 4 * _BIAS, np.float32)
    cost = np.empty_like(least)
    bits, tails = cost.view(np.int32), cost.reshape(len(cost), -1, choices)
    for oldest in range(choices):
        np.subtract(y[:, None], level[oldest], out=cost)
        cost *= cost
        cost *= w[:, None]
        tails += before[:, oldest]
        bits &= -choices  # the lowest bits are too small to matter: the least error has its code in them
        bits |= oldest
        np.minimum(cost, least, out=least)
    back: Array = (least.view(np.int32) & (choices - 1)).astype(np.uint8)
    np.bitwise_and(least.view(np.int32), -choices, out=metric.view(np.int32))
    metric -= metric.min(1, keepdims=True)
    if beyond:
        metric[:, np.arange(states) % choices != 0] = _BIAS
    return back


def _before(state: Array, back: Array, code: TrellisCode) -> Array:
    """The states that the best paths to `state` (chains,) came from."""
    oldest = back[np.arange(len(state)), state].astype(state.dtype)
    found: Array = (oldest << (WINDOW - 2 * code.bits)) | (state >> code.bits)
    return found


def wanted_scales(x: Array, code: TrellisCode) -> Array:
    """f32 (rows, groups) that suit the values of each group: their deviation, or what holds the largest."""
    square = np.square(scaled.grouped(x, GROUP), dtype=np.float32)
    count = np.minimum(GROUP, x.shape[1] - GROUP * np.arange(square.shape[1], dtype=np.float32))
    deviation = np.sqrt(square.sum(2) / count) / np.float32(code.deviation)
    largest = np.float32(code.levels().max())
    found: Array = np.maximum(deviation, scaled.absmax(x, GROUP) / (np.float32(1.1) * largest))
    return found


def _trellis(code: TrellisCode) -> Format:
    name = f"tcq{code.bits}_g{GROUP}"
    low = 4 if code.bits == 4 else 2
    stored: tuple[Plane, ...] = (Plane("q", f"tcq{code.bits}", 1),)
    if low != code.bits:
        stored += (Plane("high", f"u{code.bits - low}", 1),)

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scale = tensor_scales(grid)
        if not np.isfinite(scale).all():
            raise ValueOutOfRange(f"{name}: a given scale is NaN or Inf, expected finite scales")
        divisor = scaled.spread(np.where(scale == 0, np.float32(np.inf), scale), GROUP, x.shape)
        share = scaled.spread(scale / max(scale.max(), scaled.TINY), GROUP, x.shape)
        with np.errstate(over="ignore", under="ignore"):
            found = search(x / divisor, np.broadcast_to(np.square(share), x.shape), code)
        return {**codes.join(stored, found), "scale": grid["scale"], "super": grid["super"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        window = windows(codes.split(stored, planes, cols), code.bits)
        value: Array = code.levels()[window]
        value *= scaled.spread(tensor_scales(planes), GROUP, (rows, cols))
        return value

    def fit(x: Array) -> dict[str, Array]:
        return tensor_grid(wanted_scales(x, code))

    return Format(
        name,
        (*stored, Plane("scale", "e4m3", GROUP), Plane("super", "f32", "tensor")),
        lambda x: on_grid(x, fit(x)),
        decode,
        lambda values, planes: _bound(values, planes, code),
        "int",
        on_grid,
        affine=lambda grid: scaled.unshifted(tensor_scales(grid)),
        run=RUN,
    )


def _bound(values: Array, planes: Planes, code: TrellisCode) -> Array:
    """A run's squared error is at most that of taking each row's best code in turn, whatever came before, and
    of any codes where the circle closes; so no weight's error is larger than the root of it."""
    stored = scaled.spread(tensor_scales(planes).astype(np.float64), GROUP, values.shape)
    scale = np.broadcast_to(stored, values.shape)
    y = values / np.where(scale == 0, np.inf, scale)
    level = np.sort(code.levels().reshape(code.states, -1).astype(np.float64), axis=1)
    gaps = np.diff(level, axis=1).max() / 2
    inside = np.maximum(np.maximum(level[:, 0].max() - y, y - level[:, -1].min()), gaps)
    furthest = np.maximum(level.max() - y, y - level.min())
    bound = np.empty(values.shape)
    for first, end in runs(len(values)):
        worst = inside[first:end] * scale[first:end]
        closing = slice(max(0, len(worst) - code.memory), len(worst))
        worst[closing] = (furthest * scale)[first:end][closing]
        bound[first:end] = np.sqrt(np.square(worst).sum(0))
    dead = scale == 0
    bound = np.where(dead, np.abs(values), bound * (1 + 2.0**-10))
    return bound + np.abs(values) * 2.0**-20 + 2.0**-149


for _code in CODES.values():
    register(_trellis(_code))
