"""Matrices of whole-number codes: value = (code - zero) * scale, for every group of columns of a row.

What GPTQ, AWQ, compressed-tensors, LLM.int8() and the simple GGUF types store. Their groups may be larger
than ours: a scale is then repeated, which changes no value. Our f16 scales hold a bf16 or f32 scale that f16
has too; another is rounded to f16, and Home says how far.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from builders.sources.matrix import Home, Matrix
from edge_runtime.engine.formats import FORMATS, Array

GROUPS = (128, 64, 32)  # columns that share a scale in our formats, the cheapest first
_WORST_ROUNDING = 2.0**-10  # of a scale to f16; more means that f16 ends there


class Integers(Matrix):
    """bits: of a code; group: columns that share a scale; read_scale: f32 (rows, groups); read_zero: the code
    of the value 0, i16 (rows, groups), None for the middle one; read: the codes, u8 (rows, cols) from 0 to
    2^bits - 1; order as in Matrix."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        bits: int,
        group: int,
        read_scale: Callable[[], Array],
        read_zero: Callable[[], Array] | None,
        read: Callable[[], Array],
        order: Array | None = None,
    ) -> None:
        super().__init__(shape)
        self.bits, self.group, self.order = bits, group, order
        self._read, self._read_scale, self._read_zero = read, read_scale, read_zero

    def read_codes(self) -> Array:
        return self._read()

    def read_grid(self) -> tuple[Array, Array | None]:
        """Scales, and zero points where they are not all the middle code."""
        zero = None if self._read_zero is None else self._read_zero()
        plain = zero is None or bool((zero == 1 << (self.bits - 1)).all())
        return self._read_scale(), None if plain else zero

    @property
    def scale(self) -> Array:
        scale: Array = self.grid[0]
        return scale

    @property
    def zero(self) -> Array | None:
        zero: Array | None = self.grid[1]
        return zero

    def ordered_values(self, start: int, stop: int) -> Array:
        out = self.codes[start:stop].astype(np.float32)
        if self.zero is None:
            out -= np.float32(1 << (self.bits - 1))
        else:
            out -= self._spread(self.zero[start:stop].astype(np.float32))
        out *= self._spread(self.scale[start:stop])
        return out

    def exact_home(self) -> Home | None:
        if self.bits == 8 and self.zero is None and self.scale.shape[1] == 1:
            return Home("int8_row")
        stem = f"int{self.bits}_g{self._target}"
        names = (stem, f"{stem}_zp") if self.zero is None else (f"{stem}_zp",)
        name = next((n for n in names if n in FORMATS), None)
        if name is None or self._rounding > _WORST_ROUNDING:
            return None
        return Home(name, self._rounding, "its scales are not f16 numbers" if self._rounding else "")

    def exact_planes(self, home: Home) -> dict[str, Array]:
        if self.bits == 8:  # not by rounding: int8 formats never write -128, but they hold it
            q = (self.codes ^ np.uint8(128)).view(np.int8)
            return {
                "q": q,
                "scale": self.scale if home.format == "int8_row" else self._ours(self.scale, "<f2"),
            }
        grid = {"scale": self._ours(self.scale, "<f2")}
        if home.format.endswith("_zp"):
            zero = self.zero if self.zero is not None else np.full(self.scale.shape, 1 << (self.bits - 1))
            grid["zero"] = self._ours(zero, "u1")
        return self.on_grid(home.format, grid)

    def without_home(self) -> str:
        if self._target == 0:
            return f"{self.bits} bits in groups of {self.group} have no format here"
        if self._rounding > _WORST_ROUNDING:
            return "its scales are beyond f16"
        return f"{self.bits} bits with zero points have no format here"

    @cached_property
    def _target(self) -> int:
        """Our group: the largest that divides the checkpoint's, 0 when none does."""
        if self.group >= self.shape[1]:
            return GROUPS[0]
        return next((g for g in GROUPS if self.group % g == 0), 0)

    @cached_property
    def _rounding(self) -> float:
        """Greatest relative error of a scale as f16, of those that are not 0."""
        with np.errstate(over="ignore", under="ignore"):
            near = self.scale.astype(np.float16).astype(np.float64)
        wide = self.scale.astype(np.float64)
        off = np.abs(near - wide) / np.where(wide == 0, 1, np.abs(wide))
        return float(off.max(initial=0.0))

    def _spread(self, plane: Array) -> Array:
        """(rows, groups) to one entry per column, or to what broadcasts so."""
        return plane if plane.shape[1] == 1 else np.repeat(plane, self.group, axis=1)[:, : self.shape[1]]

    def _ours(self, plane: Array, dtype: str) -> Array:
        """(rows, groups) of the checkpoint to (rows, groups) of ours, as a plane of that dtype."""
        columns = -(-self.shape[1] // self._target)
        times = columns if plane.shape[1] == 1 else self.group // self._target
        return np.ascontiguousarray(np.repeat(plane.astype(dtype), times, axis=1)[:, :columns])
