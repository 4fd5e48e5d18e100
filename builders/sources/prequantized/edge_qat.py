"""Folders that builders.qat wrote: f32 weights on the grid of a format, and the very planes beside them.

edge_qat.json: {"schema": 1, "formats": {tensor: format}}. edge_qat.safetensors: `TENSOR#PLANE`, the codec's
planes. model.safetensors has the same values in f32, for every other reader; both must agree to the bit.
"""

from __future__ import annotations

from typing import Literal

import msgspec
import numpy as np

from builders.model_config import ModelConfig
from builders.sources.matrix import Home, Matrix
from builders.sources.shards import Shards
from edge_runtime.engine.formats import Array, Format, get_format
from edge_runtime.errors import BadCheckpoint, BadConfig, ValueOutOfRange

CONFIG, PLANES = "edge_qat.json", "edge_qat.safetensors"
SCHEMA = 1


class TrainedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Format of every trained tensor, by checkpoint name."""

    schema: Literal[1]
    formats: dict[str, str]


class Trained(Matrix):
    """A matrix as training left it: planes of `fmt`, read when they are asked for."""

    def __init__(self, key: str, fmt: Format, shards: Shards) -> None:
        shape = shards.entry(key).shape
        if len(shape) != 2:
            raise BadCheckpoint(f"tensor {key!r} has shape {shape}, {CONFIG} needs a matrix")
        super().__init__((shape[0], shape[1]))
        self._key, self._format, self._shards = key, fmt, shards

    def exact_home(self) -> Home:
        return Home(self._format.name)

    def exact_planes(self, home: Home) -> dict[str, Array]:
        """Raises BadCheckpoint where model.safetensors has other values than the planes."""
        planes = self._planes()
        if not np.array_equal(self._format.decode(planes, *self.shape), self._shards.tensor(self._key)):
            raise BadCheckpoint(
                f"tensor {self._key!r} of model.safetensors is not what {PLANES} holds: it was changed after "
                f"the training; make the folder again, or delete {CONFIG} to take it as plain weights"
            )
        return planes

    def read_codes(self) -> Array:
        """f32 values: they stand for the codes here."""
        return self._format.decode(self._planes(), *self.shape)

    def ordered_values(self, start: int, stop: int) -> Array:
        return np.array(self.codes[start:stop], np.float32)

    def _planes(self) -> dict[str, Array]:
        planes = {p.name: self._shards.raw(f"{self._key}#{p.name}") for p in self._format.planes}
        try:
            self._format.check_planes(planes, *self.shape)
        except ValueOutOfRange as error:
            raise BadCheckpoint(f"{PLANES}: tensor {self._key!r}: {error}") from None
        return planes


def read(config: ModelConfig, shards: Shards, notices: list[str]) -> dict[str, Matrix]:
    """Every trained tensor. Raises BadCheckpoint naming the tensor, BadConfig naming the key."""
    config.ignore(*config.values)  # the strict reading below names a stranger
    values = {key: value for key, value in config.values.items() if key != "quant_method"}
    try:
        found = msgspec.convert(values, TrainedConfig)
    except msgspec.ValidationError as error:
        raise BadConfig(f"{CONFIG}: {error}") from None
    planes = set(shards.include(PLANES))
    matrices: dict[str, Matrix] = {}
    for key, name in found.formats.items():
        if key not in shards or key in planes:
            raise BadCheckpoint(f"{CONFIG} names tensor {key!r}, which model.safetensors lacks")
        try:
            fmt = get_format(name)
        except BadConfig as error:
            raise BadConfig(f"{CONFIG}: tensor {key!r}: {error}") from None
        wanted = {f"{key}#{p.name}" for p in fmt.planes}
        if not wanted <= planes:
            raise BadCheckpoint(f"{PLANES} lacks {min(wanted - planes)!r}, which {name} needs")
        planes -= wanted
        shards.taken |= wanted | {key}
        matrices[key] = Trained(key, fmt, shards)
    if planes:
        raise BadCheckpoint(f"{PLANES} holds {min(planes)!r}, of which {CONFIG} does not speak")
    return matrices
