"""The end-to-end tuning that a build was asked for: what it needs, and what it makes of the planes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from builders.calibrating import CalibrationRequest, Calibrations
from builders.parts import Checkpoint, Part
from builders.watcher import Watcher
from edge_runtime.engine.formats import Array, Planes, get_format
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig


def require_tuning(program: Program, steps: int, request: CalibrationRequest) -> None:
    """Raises BadConfig for what cannot be meant, Unsupported without torch or the device, BuildError without
    the memory that it takes: before any long work."""
    if steps < 1:
        raise BadConfig(f"--tune is {steps}, expected at least 1 step")
    if request.corpus.samples < 2:
        raise BadConfig(
            "--tune keeps some windows of the calibration text for judging; give --samples 2 or more"
        )
    from builders.torch_device import resolve_device

    found = resolve_device(request.device)
    from builders.tune import require_memory

    require_memory(program, found)


@dataclass(slots=True)
class Tuning:
    """Tunes the language part of one build. `kl`: before and after, once it is done; nats."""

    steps: int
    target: Checkpoint
    plan: Plan
    calibrations: Calibrations
    watcher: Watcher
    kl: dict[str, float] = field(default_factory=dict)

    def __call__(self, part: Part, planes: Mapping[str, Planes]) -> Mapping[str, dict[str, Array]]:
        """Better planes of the tensors that changed, none where tuning did not help."""
        from builders.tune import TuneOptions, tune

        options = TuneOptions(self.steps, self.calibrations.seed, self.calibrations.device)
        found = tune(
            self.target.weights,
            part.program,
            planes,
            {name: get_format(chosen.format) for name, chosen in self.plan.tensors.items()},
            self.calibrations.windows(part),
            self.calibrations.folder(part.name),
            options,
            self.watcher,
        )
        self.kl = {"before": found.before, "after": found.after}
        return found.planes

    @property
    def notices(self) -> list[str]:
        if not self.kl:
            return []
        before, after = self.kl["before"], self.kl["after"]
        if after < before:
            return [f"tuning: KL on windows kept for judging fell from {before:.4g} to {after:.4g}"]
        return [
            f"tuning did not help (KL {before:.4g}, after it {after:.4g}); values are the algorithm's: give "
            "more --samples, or leave --tune away"
        ]
