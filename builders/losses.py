"""What a format costs in answers, tensor by tensor: measured sensitivities, or a model where there are none.

Without calibration, a tensor's loss is the relative squared error of Gaussian values in the format, times the
tensor's share of the whole. The share goes with the square root of its size: per weight the small matrices
(keys and values of grouped heads) matter more, per tensor the large ones do. The head counts fourfold, for
every answer passes through it. The scale, in nats, is that of round-to-nearest int4_g32 on small models; only
ratios matter to the choice of weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import msgspec
import numpy as np

from builders.sensitivity import Sensitivity
from builders.vocabulary_blocks import for_program, joined
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, nearest

ROLE_WEIGHT = {"matrix": 1.0, "embedding": 1.0, "head": 4.0}
NATS = 10.0  # loss of a model whose every tensor has a relative squared error of 1, were it to stay linear
# Nats of KL of a K,V cache pair, pages of 16: the median of planner, stories260K and llama2xs in
# bench/results/cpu-2026-11-24-kv-quality.json (bench/kv_quality.py measures them).
KV_LOSSES = {
    "f32,f32": 0.0,
    "f16,f16": 1.35e-6,
    "f16,int8": 6.80e-6,
    "f16,fp8": 1.30e-4,
    "f16,int4": 1.21e-3,
    "int8c,f16": 5.07e-5,
    "int8c,int8": 6.06e-5,
    "int8c,fp8": 2.10e-4,
    "int8c,int4": 1.27e-3,
    "int8,f16": 1.50e-3,
    "int8,int8": 1.46e-3,
    "int8,fp8": 1.70e-3,
    "int8,int4": 2.62e-3,
    "int4c,f16": 4.93e-3,
    "int4c,int8": 5.15e-3,
    "int4c,fp8": 5.19e-3,
    "int4c,int4": 6.73e-3,
    "fp8,f16": 1.00e-2,
    "fp8,int8": 9.76e-3,
    "fp8,fp8": 1.01e-2,
    "fp8,int4": 1.17e-2,
    "int4,f16": 2.20e-1,
    "int4,int8": 2.23e-1,
    "int4,fp8": 2.25e-1,
    "int4,int4": 2.38e-1,
}


@lru_cache(maxsize=256)
def gaussian_error(fmt: str) -> float:
    """Relative squared error of normal values (of a weight's usual size) in a format."""
    values = np.random.default_rng(0).standard_normal((32, 1024), dtype=np.float32) * np.float32(0.02)
    record = get_format(fmt)
    found = record.decode(record.encode(values), *values.shape)
    return float(
        np.square(found - values, dtype=np.float64).sum() / np.square(values, dtype=np.float64).sum()
    )


@dataclass(frozen=True, slots=True)
class Losses:
    """Predicted loss of each (tensor, format) and cache pair, in one unit.

    unit: "nats, modelled", or the sensitivity file's: "kl" in nats, "hessian" a relative output error.
    tensors: how many were measured, blocks of a vocabulary counted as one.
    """

    unit: str
    shares: Mapping[str, float]  # of each tensor, where nothing is measured
    measured: Sensitivity | None = None
    tensors: int = 0

    def of(self, tensor: str, fmt: str) -> float | None:
        """The loss of a tensor in a format; None where a sensitivity file does not say."""
        if self.measured is not None:
            return self.measured.losses.get(tensor, {}).get(fmt)
        return NATS * gaussian_error(fmt) * self.shares[tensor]

    def knows(self, tensor: str) -> bool:
        return self.measured is None or tensor in self.measured.losses

    def kv(self, k: str, v: str) -> float:
        """The loss of a cache pair; of one that nobody measured, that of its worse half twice over."""
        pair = f"{k},{v}"
        given = {} if self.measured is None else self.measured.kv_losses or {}
        if pair in given:
            return given[pair]
        nats = KV_LOSSES.get(pair)
        if nats is None:
            halves = [
                loss for name, loss in KV_LOSSES.items() if name.split(",")[0] == k or name == f"{v},{v}"
            ]
            nats = max(halves, default=max(KV_LOSSES.values()))
        return nats * self._per_nat()

    def _per_nat(self) -> float:
        """Units of the losses a nat: "hessian" adds up relative errors of all its tensors."""
        if self.measured is None or self.measured.unit == "kl":
            return 1.0
        return self.tensors / NATS


def losses_of(program: Program, sensitivity: Sensitivity | None, formats: Sequence[str]) -> Losses:
    """Raises BadConfig where a sensitivity file is another model's, or says nothing of a matrix."""
    if sensitivity is None:
        specs = {n: s for n, s in joined(program).tensors.items() if s.role != "vector"}
        weights = {n: {"": ROLE_WEIGHT[s.role] * math.sqrt(s.size)} for n, s in specs.items()}
        total = sum(w[""] for w in weights.values())
        shares = {n: w[""] / total for n, w in for_program(weights, program).items()}
        return Losses("nats, modelled", shares)
    losses = for_program(sensitivity.losses, program)
    for name in losses:
        if name not in program.tensors:
            raise BadConfig(
                f"the sensitivity file has losses of {name!r}, which this model lacks; "
                f"{nearest(name, program.tensors)}"
            )
    for name, spec in program.tensors.items():
        known = losses.get(name, {})
        if spec.role == "matrix" and not set(known) & set(formats):
            raise BadConfig(
                f"the sensitivity file has no loss of {name!r} in any of {', '.join(formats)}; "
                "measure it again with these formats, or choose others with --formats"
            )
    return measured_losses(program, sensitivity)


def measured_losses(program: Program, sensitivity: Sensitivity) -> Losses:
    """As measured, by the program's names of its tensors."""
    losses = for_program(sensitivity.losses, program)
    tensors = len(for_program(sensitivity.losses, joined(program)))
    return Losses(sensitivity.unit, {}, msgspec.structs.replace(sensitivity, losses=losses), tensors)
