"""Matrices of E2M1 codes: NVFP4 (E4M3 scales of 16 over one f32) and MXFP4 (powers of two for 32).

NVFP4 checkpoints divide by weight_global_scale, our format multiplies with its inverse. That rounds
otherwise now and then, by at most 2^-22 of a value: Home says where it does.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import numpy as np

from builders.sources.matrix import Home, Matrix
from edge_runtime.engine.formats import Array, nibbles
from edge_runtime.engine.formats.fp8 import E4M3
from edge_runtime.engine.formats.microscaling import E2M1_VALUES

_E4M3_VALUES = E4M3.table()


class Floats4(Matrix):
    """scale: E4M3 codes (rows, cols / 16) with `shared` the f32 that they are divided by, or E8M0 codes
    (rows, cols / 32) with None; read: the codes, two a byte, the first in the low half, (rows, cols / 2)."""

    def __init__(
        self, shape: tuple[int, int], *, scale: Array, shared: float | None, read: Callable[[], Array]
    ) -> None:
        super().__init__(shape)
        self.scale, self.shared = scale, shared
        self._read = read

    def read_codes(self) -> Array:
        return self._read()

    def ordered_values(self, start: int, stop: int) -> Array:
        values = E2M1_VALUES[nibbles.split(self.codes[start:stop], self.shape[1])]
        scales = self._scales[start:stop]
        return values * np.repeat(scales, self.shape[1] // scales.shape[1], axis=1)

    def exact_home(self) -> Home:
        if self.shared is None:
            return Home("mxfp4_g32")
        wide = self._scales.astype(np.float64)
        ours = (_E4M3_VALUES[self.scale] * self._super).astype(np.float64)
        off = np.abs(ours - wide) / np.where(wide == 0, 1, wide)
        error = float(off.max())
        return Home("nvfp4_g16", error, "the inverse of its weight_global_scale is rounded" if error else "")

    def exact_planes(self, home: Home) -> dict[str, Array]:
        planes = {"q": self.codes, "scale": self.scale}
        return planes if self.shared is None else planes | {"super": self._super.reshape(1, 1)}

    @cached_property
    def _scales(self) -> Array:
        """f32 (rows, groups)."""
        if self.shared is None:
            return np.ldexp(np.float32(1), self.scale.astype(np.int32) - 127).astype(np.float32)
        return _E4M3_VALUES[self.scale] / np.float32(self.shared)

    @cached_property
    def _super(self) -> Array:
        """The f32 next to 1 / shared with which the scales come out best: (1,)."""
        near = np.float32(1) / np.float32(self.shared)
        tried = np.array([near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf))])
        codes = _E4M3_VALUES[np.unique(self.scale)]
        want = codes / np.float32(self.shared)
        worst = [np.abs(codes * one - want).max(initial=0) for one in tried.astype(np.float32)]
        return tried[[int(np.argmin(worst))]].astype(np.float32)
