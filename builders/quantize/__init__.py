"""Algorithms: how values are chosen for a format. The file name is the name; the result is a Format's planes.

An algorithm module has `quantize(weights, fmt, inputs, options) -> planes`, and says two things of itself:
`ROW_WISE`, whether rows may be quantized in blocks, so that a large matrix never lies in memory whole; and
`CALIBRATED`, whether it needs statistics of the inputs. One that also scales channels has `scale_inputs`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast, runtime_checkable

from builders.statistics import InputStatistics
from edge_runtime.engine.formats import Array, Format
from edge_runtime.errors import BadConfig, Unsupported, nearest

# By name, as a plan may be asked for where torch, which some of them need, is missing
_MADE_FOR = {"nf4": "nf4_g64_dq", "fp8": "fp8_e4m3_row", "int8_outlier": "int8_row_o128"}


@dataclass(frozen=True, slots=True)
class AlgorithmOptions:
    """What the user may set: observer None means the algorithm's own choice; device is torch's.

    row_importance: tensor -> f32 (rows,), how much each row matters, where that is known (row_importance.py);
    rows: that of the tensor at hand.
    """

    observer: str | None = None
    device: str = "cpu"
    row_importance: Mapping[str, Array] = field(default_factory=dict)
    rows: Array | None = None


class Algorithm(Protocol):
    ROW_WISE: bool
    CALIBRATED: bool

    def quantize(
        self, weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
    ) -> dict[str, Array]:
        """Planes of `fmt` for f32 weights (rows, cols). Raises ValueOutOfRange.

        `inputs` is None where nothing is known of them (an embedding, or no calibration): an algorithm then
        does the best it can without.
        """
        ...


@runtime_checkable
class ChannelScaler(Protocol):
    """An algorithm that moves magnitude between inputs and weights before it rounds."""

    def scale_inputs(
        self,
        weights: Sequence[Array],
        formats: Sequence[Format],
        inputs: InputStatistics,
        options: AlgorithmOptions,
        ties: Array | None = None,
    ) -> Array:
        """s f32 (cols,), positive: columns of all `weights` (rows, cols) that read the same inputs are
        multiplied by s, and the inputs divided by it. Columns with the same number in `ties` (cols,) get the
        same s (query heads that share a key/value head)."""
        ...


def algorithms() -> list[str]:
    """Names of all algorithms, by file name."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


def default_format(name: str) -> str | None:
    """What matrices get where no format is asked for, of an algorithm that is made for one; else None."""
    return _MADE_FOR.get(name.rpartition("+")[2])


def get_algorithm(name: str) -> Algorithm:
    """The algorithm of that name, or of "FIRST+LAST": channel scales of the first, rounding of the last.

    Raises BadConfig naming the nearest valid one, Unsupported where it needs torch and there is none.
    """
    first, plus, last = name.partition("+")
    if not plus:
        return _load(name)
    scaler, rounder = _load(first), _load(last)
    if not isinstance(scaler, ChannelScaler) or isinstance(rounder, ChannelScaler):
        raise BadConfig(
            f"algorithm {name!r}: the first must scale channels and the last must not, as in 'awq+gptq'"
        )
    return Combined(scaler, rounder)


def _load(name: str) -> Algorithm:
    if name not in algorithms():
        raise BadConfig(f"unknown algorithm {name!r}; {nearest(name, algorithms())}")
    try:
        return cast(Algorithm, importlib.import_module(f"{__name__}.{name}"))
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise Unsupported(
            f"algorithm {name!r} needs torch, which is not installed; pip install 'edge-runtime[calibrate]', "
            "or use 'rtn' or 'hqq'"
        ) from None


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """Channel scales of one algorithm, rounding of another."""

    scaler: ChannelScaler
    rounder: Algorithm
    CALIBRATED = True

    @property
    def ROW_WISE(self) -> bool:
        return self.rounder.ROW_WISE

    def scale_inputs(
        self,
        weights: Sequence[Array],
        formats: Sequence[Format],
        inputs: InputStatistics,
        options: AlgorithmOptions,
        ties: Array | None = None,
    ) -> Array:
        return self.scaler.scale_inputs(weights, formats, inputs, options, ties)

    def quantize(
        self, weights: Array, fmt: Format, inputs: InputStatistics | None, options: AlgorithmOptions
    ) -> dict[str, Array]:
        return self.rounder.quantize(weights, fmt, inputs, options)
