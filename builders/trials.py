"""Plans tried out: the language part rounded whole, as the build would, and its KL to the f32 model.

Figures of tensors one at a time do not know of one another; this one does. It is over the first windows of
the calibration text, never the text that builds are measured on, with f32 activations and an f32 cache. All
rounded tensors lie in memory: it is for small models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from builders.calibrating import Calibrations
from builders.divergence import Answers, load_head
from builders.encoding import encode
from builders.parts import Part
from builders.quantize import Algorithm, AlgorithmOptions
from builders.quantizing import inputs_of, scaled_part
from builders.segment_runner import SegmentRunner, batches
from builders.segments import cut
from builders.statistics import InputStatistics
from builders.torch_device import Workers, repeatable
from builders.watcher import Watcher
from builders.weights import Weights
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program

TRIAL_FLOPS = 1e12  # of all trials of a build: half a minute of two cores; fixed, so that builds repeat
MOST = 12  # of them, of a model that is small enough
FEW = 6  # that shall be possible, else fewer windows are judged
LEAST_TOKENS = 256  # that a plan is judged on
_BLOCK = 1 << 20  # logits that a worker compares at once, in f64
# Passes through all matrices of a trial, 2 operations a weight and token each
PLAIN_PASSES = 2
FEEDBACK_PASSES = 8  # both models through a segment once for every group of linears in it, and once more
SWEEPS = 8  # times that a calibrated algorithm goes through rows * cols^2 of a matrix


@dataclass(frozen=True, slots=True)
class Trials:
    """Builds of one part with one algorithm. windows: token ids (windows, length) that they are judged on."""

    part: Part
    algorithm: Algorithm
    options: AlgorithmOptions
    calibrations: Calibrations
    windows: Array
    feedback: bool
    _exact: list[Array] = field(default_factory=list)  # the f32 model's rows before the logits, once known

    def kl(self, plan: Plan) -> float:
        """KL(f32 || rounded as `plan` says), the mean over all tokens in nats. Raises ValueOutOfRange."""
        part = scaled_part(self.part, plan, self.algorithm, self.options, self.calibrations)
        options = self.options
        if self.algorithm.CALIBRATED:
            formats = {chosen.format for chosen in plan.tensors.values()}
            options = replace(options, row_importance=self.calibrations.row_importance(part, formats))
        values = self._values(part, plan, options)
        device = self.options.device
        with repeatable(device) as workers:
            exact, rounded = self.part.model, _Changed(part.model, values)
            if not self._exact:
                self._exact.append(_hidden(exact, self.windows, device, workers))
            found = _hidden(rounded, self.windows, device, workers)
            rows = [torch.from_numpy(r).to(device, copy=True) for r in (self._exact[0], found)]
            wanted = Answers(exact.program, load_head(exact, device), rows[0], _BLOCK)
            return wanted.kl(load_head(rounded, device), rows[1], workers.map)

    def _values(self, part: Part, plan: Plan, options: AlgorithmOptions) -> dict[str, Array]:
        """f32 (rows, cols) of every tensor that is no vector, as it would be read from the engine."""
        known = partial(inputs_of, part, calibrations=self.calibrations)
        found: dict[str, Array] = {}

        def choose(name: str, inputs: InputStatistics | None) -> Array:
            spec, fmt = part.program.tensors[name], get_format(plan.tensors[name].format)
            made = encode(part, name, fmt, self.algorithm, inputs, options)
            found[name] = fmt.decode(made.planes, spec.rows, spec.cols)
            return found[name]

        if self.feedback:
            self.calibrations.in_order(part, choose, known, Watcher(), len(self.windows))
        for name, spec in part.program.tensors.items():
            if spec.role != "vector" and name not in found:
                choose(name, known(name) if self.algorithm.CALIBRATED else None)
        return found


def affordable(program: Program, windows: Array, algorithm: Algorithm, *, feedback: bool) -> tuple[int, int]:
    """(trials, windows of them) within TRIAL_FLOPS, of token ids (windows, length); no trial where FEW of
    LEAST_TOKENS tokens cost more."""
    count, length = windows.shape
    specs = [s for s in program.tensors.values() if s.role != "vector"]
    passes = FEEDBACK_PASSES if feedback else PLAIN_PASSES
    window = 2.0 * sum(s.size for s in specs) * passes * length
    rounding = float(SWEEPS * sum(s.size * s.cols for s in specs)) if algorithm.CALIBRATED else 0.0
    few = min(count, int((TRIAL_FLOPS / FEW - rounding) // window))
    if few < 1 or few * length < min(LEAST_TOKENS, windows.size):
        return 0, 0
    return min(MOST, int(TRIAL_FLOPS // (few * window + rounding))), few


class _Changed:
    """Weights with some tensors replaced."""

    def __init__(self, base: Weights, values: Mapping[str, Array]) -> None:
        self.program = base.program
        self._base, self._values = base, values

    def __call__(self, name: str) -> Array:
        return self._values[name] if name in self._values else self._base(name)

    def block(self, name: str, start: int, stop: int) -> Array:
        return self._values[name][start:stop] if name in self._values else self._base.block(name, start, stop)

    def rows(self, name: str, ids: Array) -> Array:
        return self._values[name][ids] if name in self._values else self._base.rows(name, ids)


def _hidden(weights: Weights, windows: Array, device: str, workers: Workers) -> Array:
    """Rows before the logits, f32 (tokens, hidden)."""
    segments, rows = cut(weights.program), None
    spans = batches(weights.program, len(windows), windows.shape[1], device)
    for i in range(len(segments)):
        runner = SegmentRunner(weights, segments, i, device)

        def run(span: tuple[int, int], runner: SegmentRunner = runner, rows: Array | None = rows) -> Array:
            some = slice(*span)
            found: Array = runner.run(windows[some], None if rows is None else rows[some]).cpu().numpy()
            return found

        rows = np.concatenate(list(workers.map(run, spans)))
    assert rows is not None  # a program has a segment before its logits
    return rows.reshape(-1, rows.shape[-1])
