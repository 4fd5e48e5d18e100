"""NF4 matrices of bitsandbytes: value = NF4[code] * absmax, its blocks running over the flat tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from builders.sources.matrix import Home, Matrix
from edge_runtime.engine.formats import Array
from edge_runtime.engine.formats.nf4 import NF4

GROUP = 64  # of our formats
SECOND = 8  # absmaxes that share a second scale in nf4_g64_dq
NESTED = 256  # absmaxes that share one in bitsandbytes


@dataclass(frozen=True, slots=True)
class Nested:
    """Double quantization: absmax = DYNAMIC[codes] * scale + offset; codes u8 (blocks,), scale f32 of 256."""

    codes: Array
    scale: Array
    offset: float


class NormalFloats(Matrix):
    """read_absmax: f32, one of every `block` values of the flat tensor, and how it is stored where that is by
    the standard map; read: the codes, u8 (rows, cols)."""

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        block: int,
        read_absmax: Callable[[], tuple[Array, Nested | None]],
        read: Callable[[], Array],
    ) -> None:
        super().__init__(shape)
        self.block = block
        self._read, self._read_absmax = read, read_absmax

    def read_codes(self) -> Array:
        return self._read()

    def read_grid(self) -> tuple[Array, Nested | None]:
        return self._read_absmax()

    @property
    def absmax(self) -> Array:
        absmax: Array = self.grid[0]
        return absmax

    @property
    def nested(self) -> Nested | None:
        nested: Nested | None = self.grid[1]
        return nested

    def ordered_values(self, start: int, stop: int) -> Array:
        cols = self.shape[1]
        scale = self.absmax[np.arange(start * cols, stop * cols) // self.block]
        return NF4[self.codes[start:stop]] * scale.reshape(stop - start, cols)

    def exact_home(self) -> Home | None:
        if self.shape[1] % self.block or self.block % GROUP:
            return None
        return Home("nf4_g64_dq" if self._fits_double() else "nf4_g64_f32")

    def exact_planes(self, home: Home) -> dict[str, Array]:
        rows, cols = self.shape
        if home.format == "nf4_g64_f32":
            scale = np.repeat(self.absmax.reshape(rows, -1), self.block // GROUP, axis=1)
            grid = {"scale": np.ascontiguousarray(scale)}
        else:
            nested = self.nested
            assert nested is not None  # exact_home proved it
            firsts = (
                np.arange(rows)[:, None] * (cols // GROUP) + np.arange(-(-cols // GROUP // SECOND)) * SECOND
            )
            grid = {
                "scale": nested.codes.reshape(rows, -1),
                "scale2": nested.scale[firsts // NESTED],
                "offset": np.full((1, 1), nested.offset, np.float32),
            }
        return self.on_grid(home.format, grid)

    def without_home(self) -> str:
        if self.block % GROUP:
            return f"NF4 in blocks of {self.block} has no format here"
        return f"NF4 blocks of {self.block} lie across the ends of rows"

    def _fits_double(self) -> bool:
        """Whether no 8 groups of a row lie across the end of 256 absmaxes of the flat tensor."""
        groups = self.shape[1] // GROUP
        whole = groups in (1, 2, 4) or groups % SECOND == 0
        return self.nested is not None and self.block == GROUP and whole
