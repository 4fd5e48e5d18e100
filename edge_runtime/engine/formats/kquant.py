"""Two-level integers, the exact homes of llama.cpp's k-quants: `q2_k` to `q6_k`.

A super-block of 256 weights along a row has one f16 `super` scale (and `super_min`); each group of 16 or 32
has a small whole number against it:

    q2_k, groups of 16:  (super * s) * u - super_min * m    s, m in 0..15 in one byte
    q3_k, groups of 16:  (super * s) * (u - 4)              s an int8
    q4_k, groups of 32:  (super * s) * u - super_min * m    s, m in 0..255
    q5_k, groups of 32:  the same with 5-bit codes
    q6_k, groups of 16:  (super * s) * (u - 32)             s an int8

in f32, in this order, as gguf.quants decodes Q2_K to Q6_K (ggml's ggml-quants.c): products are exact, the
difference is rounded once. GGUF keeps s and m of Q3_K to Q5_K in 6 bits, ours have 8; every GGUF block has
its exact planes here, and our own fit uses the finer steps. A last super-block or group may be partial.

Own fit: the range of a group is [low, high], widened to include 0. super_min is the f16 at or above the
greatest -low / m_max of the super-block and m = ceil(-low / super_min); super is the f16 at or above the
greatest wanted scale / s_max and s = ceil(wanted / super), so that every range is covered. Formats without
minima take the signed scale of least magnitude that covers the range.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from edge_runtime.engine.formats import codes, scaled
from edge_runtime.engine.formats.integer import code_planes
from edge_runtime.engine.formats.record import Array, Format, Plane, Planes, register

SUPER = 256  # weights of a super-block


def _blocks(per_group: Array, count: int) -> Array:
    """(rows, groups) as (rows, super-blocks, count), padded with 0."""
    rows, groups = per_group.shape
    return np.pad(per_group, ((0, 0), (0, -groups % count))).reshape(rows, -1, count)


def _spread(plane: Array, count: int, groups: int) -> Array:
    """A plane per super-block as f32 per group: (rows, groups)."""
    return np.repeat(plane.astype(np.float32), count, axis=1)[:, :groups]


@dataclass(frozen=True)
class _Level:
    """How the whole numbers of a format's groups are chosen: against an f16 per super-block, up to `most`."""

    name: str
    count: int  # groups of a super-block
    most: int

    def fit(self, wanted: Array) -> tuple[Array, Array]:
        """(whole numbers f32 (rows, groups), f16 (rows, super-blocks)) of numbers of any sign; |number| is
        rounded up."""
        size = np.abs(wanted)
        top = scaled.f16_scale(self.name, _blocks(size, self.count).max(axis=2) / np.float32(self.most))
        unit = _spread(top, self.count, wanted.shape[1])
        with np.errstate(over="ignore"):
            steps = np.ceil(size / np.where(unit == 0, np.float32(np.inf), unit))
        whole: Array = np.copysign(np.minimum(steps, self.most), wanted)
        return whole, top


def _signed(bits: int) -> Format:
    name, group = f"q{bits}_k", 16
    top = (1 << (bits - 1)) - 1
    stored = code_planes(bits, top + 1)
    level = _Level(name, SUPER // group, 127)

    def scales(grid: Planes) -> Array:
        s = grid["scale"].astype(np.float32)
        s *= _spread(grid["super"], level.count, s.shape[1])
        return s

    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        s, sup = level.fit(scaled.nearest_scale(low, high, -top - 1, top))
        return {"scale": s.astype(np.int8), "super": sup}

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scaled.check_scales(name, grid, "super")
        u = scaled.centred_codes(x, scales(grid), group, top)
        return {**codes.join(stored, u), "scale": grid["scale"], "super": grid["super"]}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        return codes.decode_centred(stored, planes, scales(planes), group, (rows, cols), top + 1)

    return Format(
        name,
        (*stored, Plane("scale", "i8", group), Plane("super", "f16", SUPER)),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        lambda values, planes: scaled.centred_bound(values, scales(planes), group, top),
        "int",
        on_grid,
        grid_for,
        lambda grid: scaled.unshifted(scales(grid)),
        np.arange(-top - 1, top + 1, dtype=np.float32),
    )


def _with_minima(bits: int, group: int, most: int) -> Format:
    name = f"q{bits}_k"
    top = (1 << bits) - 1
    stored = code_planes(bits, 0)
    level = _Level(name, SUPER // group, most)
    parts, unite, divide = _in_one_byte() if most == 15 else _in_two_bytes()
    shared = tuple(Plane(plane, encoding, group) for plane, encoding in parts)

    def affine(grid: Planes) -> tuple[Array, Array]:
        s, m = (a.astype(np.float32) for a in divide(grid))
        s *= _spread(grid["super"], level.count, s.shape[1])
        m *= _spread(grid["super_min"], level.count, m.shape[1])
        return s, np.float32(0) - m

    def grid_for(low: Array, high: Array) -> dict[str, Array]:
        low, high = np.minimum(low, np.float32(0)), np.maximum(high, np.float32(0))
        m, super_min = level.fit(-low)
        with np.errstate(over="ignore"):
            span = high + m * _spread(super_min, level.count, m.shape[1])
        s, sup = level.fit(span / np.float32(top))
        return {
            **unite(np.abs(s).astype(np.uint8), np.abs(m).astype(np.uint8)),
            "super": sup,
            "super_min": super_min,
        }

    def on_grid(x: Array, grid: Planes) -> dict[str, Array]:
        scaled.check_scales(name, grid, "super", "super_min")
        u = scaled.shifted_codes(x, *affine(grid), group, top)
        return {**codes.join(stored, u), **{p.name: grid[p.name] for p in own}}

    def decode(planes: Planes, rows: int, cols: int) -> Array:
        return codes.decode_shifted(stored, planes, *affine(planes), group, (rows, cols))

    own = (*shared, Plane("super", "f16", SUPER), Plane("super_min", "f16", SUPER))
    return Format(
        name,
        (*stored, *own),
        lambda x: on_grid(x, grid_for(*scaled.extent(x, group))),
        decode,
        lambda values, planes: scaled.shifted_bound(values, *affine(planes), group, top),
        "int",
        on_grid,
        grid_for,
        affine,
        np.arange(top + 1, dtype=np.float32),
    )


# Planes of a group's s and m as (name, encoding), how they are made and how they are read.
_Sharing = tuple[
    tuple[tuple[str, str], ...],
    Callable[[Array, Array], dict[str, Array]],
    Callable[[Planes], tuple[Array, Array]],
]


def _in_one_byte() -> _Sharing:
    return (
        (("scale_min", "u4u4"),),
        lambda s, m: {"scale_min": s | (m << np.uint8(4))},
        lambda grid: (grid["scale_min"] & np.uint8(15), grid["scale_min"] >> np.uint8(4)),
    )


def _in_two_bytes() -> _Sharing:
    return (
        (("scale", "u8"), ("min", "u8")),
        lambda s, m: {"scale": s, "min": m},
        lambda grid: (grid["scale"], grid["min"]),
    )


register(_with_minima(2, 16, 15))
register(_signed(3))
register(_with_minima(4, 32, 255))
register(_with_minima(5, 32, 255))
register(_signed(6))
