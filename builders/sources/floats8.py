"""Matrices of E4M3 codes with f32 scales: one in all, one a row, or one a block of rows and columns."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from builders.sources.matrix import Home, Matrix
from edge_runtime.engine.formats import Array
from edge_runtime.engine.formats.fp8 import E4M3

GROUP = 128  # of fp8_e4m3_g128
_VALUES = E4M3.table()


class Floats8(Matrix):
    """value = E4M3[code] * scale; scale f32 (row blocks, column blocks), each of `block` = (rows, columns)
    values; read: the codes, u8 (rows, cols)."""

    def __init__(
        self, shape: tuple[int, int], *, block: tuple[int, int], scale: Array, read: Callable[[], Array]
    ) -> None:
        super().__init__(shape)
        self.block, self.scale = block, scale
        self._read = read

    def read_codes(self) -> Array:
        return self._read()

    def ordered_values(self, start: int, stop: int) -> Array:
        scale = self._of_rows()[start:stop]
        if scale.shape[1] > 1:
            scale = np.repeat(scale, self.block[1], axis=1)[:, : self.shape[1]]
        return _VALUES[self.codes[start:stop]] * scale

    def exact_home(self) -> Home | None:
        if self.scale.size == 1:
            return Home("fp8_e4m3_tensor")
        if self.scale.shape[1] == 1:
            return Home("fp8_e4m3_row")
        return Home("fp8_e4m3_g128") if self.block[1] % GROUP == 0 else None

    def exact_planes(self, home: Home) -> dict[str, Array]:
        if home.format == "fp8_e4m3_tensor":
            return {"q": self.codes, "scale": self.scale.reshape(1, 1)}
        scale = self._of_rows()
        if home.format == "fp8_e4m3_g128":
            scale = np.repeat(scale, self.block[1] // GROUP, axis=1)[:, : -(-self.shape[1] // GROUP)]
        return {"q": self.codes, "scale": np.ascontiguousarray(scale)}

    def without_home(self) -> str:
        return f"FP8 in blocks of {self.block[0]} x {self.block[1]} has no format here"

    def _of_rows(self) -> Array:
        """Scales of every row: (rows, column blocks)."""
        return np.repeat(self.scale, self.block[0], axis=0)[: self.shape[0]]
