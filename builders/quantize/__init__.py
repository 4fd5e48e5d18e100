"""Algorithms: how values are chosen for a format. The file name is the name; the result is a Format's planes.

An algorithm module has `quantize(weights f32 (rows, cols), fmt) -> planes` and `ROW_WISE`: whether rows may
be quantized in blocks, so that a large matrix never lies in memory whole.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Protocol, cast

from edge_runtime.engine.formats import Array, Format
from edge_runtime.errors import BadConfig, nearest


class Algorithm(Protocol):
    ROW_WISE: bool

    def quantize(self, weights: Array, fmt: Format) -> dict[str, Array]:
        """Planes of `fmt` for f32 weights (rows, cols). Raises ValueOutOfRange."""
        ...


def algorithms() -> list[str]:
    """Names of all algorithms, by file name."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name. Raises BadConfig naming the nearest valid one."""
    if name not in algorithms():
        raise BadConfig(f"unknown algorithm {name!r}; {nearest(name, algorithms())}")
    return cast(Algorithm, importlib.import_module(f"{__name__}.{name}"))
