"""A checkpoint in training under fake quantization: f32 weights by checkpoint name, and what they become.

Quantization is of whole checkpoint tensors, before they are cut into a program's (fused projections) or
shared (a tied head), so that one grid serves wherever the tensor goes, as it will in the engine.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builders.archs import read_program
from builders.fake_quant import FakeQuantizer, Fit
from builders.role_formats import Formats
from builders.sources import Source, open_source
from builders.torch_program import TorchProgram
from builders.weights import CheckpointWeights
from edge_runtime.engine.formats import Array, Planes, get_format
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig

SCALE_SHARE = 0.1  # of the learning rate, for learned scales: each moves a whole group


class QatModel:
    """Trainable tensors of an open checkpoint, and the program that runs on their fake-quantized values.

    `tensors`: f32 parameters by checkpoint name; learned scales as `scale:NAME`. `program` is the student
    after `requantize`, `teacher` the checkpoint as it is.
    """

    def __init__(
        self, source: Source, formats: Formats, fit: Fit = "mse", *, learn_scales: bool = False
    ) -> None:
        architecture = read_program(source.config)
        self.weights = CheckpointWeights(architecture, source)  # proves that the folder is whole
        self._sources = architecture.sources
        self._program: Program = architecture.program
        self.tensors: dict[str, Tensor] = {}
        self.quantizers: dict[str, FakeQuantizer] = {}
        for name, made in self._sources.items():
            if made.constant is not None or made.key in self.tensors:
                continue
            fmt = formats.of_role(self._program.tensors[name].role)
            self.tensors[made.key] = torch.from_numpy(source.tensor(made.key)).requires_grad_(True)
            if fmt != "f32":
                learn = learn_scales and fmt == formats.weights
                self.quantizers[made.key] = FakeQuantizer(get_format(fmt), fit, learn=learn)
        self.fit()
        for key, quantizer in self.quantizers.items():
            if quantizer.scale is not None:
                self.tensors[f"scale:{key}"] = quantizer.scale
        self._now: dict[str, Tensor] = {}
        self.program = TorchProgram(self._program, self._weight)

    @property
    def context(self) -> int:
        return self._program.max_context

    def optimizer(self, rate: float) -> torch.optim.AdamW:
        scales = [t for name, t in self.tensors.items() if name.startswith("scale:")]
        others = [t for name, t in self.tensors.items() if not name.startswith("scale:")]
        groups: list[dict[str, Any]] = [{"params": others}]
        if scales:
            groups.append({"params": scales, "share": SCALE_SHARE})
        return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0)

    def fit(self) -> None:
        """Grids anew from the weights as they are; scales that learn are the optimizer's after the first."""
        for key, quantizer in self.quantizers.items():
            if quantizer.scale is None:
                quantizer.fit(self.tensors[key])

    def requantize(self) -> None:
        """The values that the next run of `program` sees; gradients of it go through to `tensors`."""
        self._now = {
            key: self.quantizers[key](tensor) if key in self.quantizers else tensor
            for key, tensor in self.tensors.items()
            if not key.startswith("scale:")
        }

    def grids(self) -> dict[str, Tensor]:
        """Grid planes by `NAME#PLANE`, as bytes-exact tensors."""
        found = {}
        for key, quantizer in self.quantizers.items():
            for plane, data in quantizer.planes.items():
                found[f"{key}#{plane}"] = torch.from_numpy(data.copy())
        return found

    def use_grids(self, grids: dict[str, Tensor]) -> None:
        for key, quantizer in self.quantizers.items():
            names = [plane.name for plane in quantizer.format.grid_planes]
            if quantizer.planes:
                quantizer.use({n: grids[f"{key}#{n}"].numpy() for n in names})

    @torch.no_grad()
    def encode(self) -> dict[str, tuple[str, Planes]]:
        """Checkpoint name -> format and codec planes of every quantized tensor, as trained."""
        return {
            key: (quantizer.format.name, quantizer.encode(self.tensors[key]))
            for key, quantizer in self.quantizers.items()
        }

    def plain(self) -> dict[str, Array]:
        """f32 tensors that are not quantized, by checkpoint name."""
        names = [n for n in self.tensors if n not in self.quantizers and not n.startswith("scale:")]
        return {name: self.tensors[name].detach().numpy() for name in names}

    def _weight(self, name: str) -> Tensor:
        made, spec = self._sources[name], self._program.tensors[name]
        if made.constant is not None:
            return torch.from_numpy(self.weights(name))
        values = self._now[made.key].reshape(-1, spec.cols)
        if made.rows is not None:
            values = self._now[made.key][slice(*made.rows)].reshape(-1, spec.cols)
        if made.columns is not None:
            values = values[:, torch.from_numpy(made.columns.astype("int64"))]
        return values + made.offset if made.offset else values


def teacher_of(weights: CheckpointWeights) -> TorchProgram:
    """The checkpoint as it is, all of it in f32."""
    values: dict[str, Tensor] = {}

    def weight(name: str) -> Tensor:
        if name not in values:
            values[name] = torch.from_numpy(weights(name))
        return values[name]

    return TorchProgram(weights.program, weight)


def open_model(folder: Path) -> Source:
    """The checkpoint to train. Raises BadCheckpoint; BadConfig for an engine."""
    if folder.suffix == ".edge":
        raise BadConfig(f"{folder} is an engine, whose weights are rounded for good; give the model folder")
    return open_source(folder)
