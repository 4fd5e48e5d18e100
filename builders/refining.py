"""Losses of a build refined by trials of whole plans, where the model is small enough to try them."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from builders.calibrating import Calibrations
from builders.parts import Part
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.refine import Question, refine
from builders.sensitivity import Sensitivity
from builders.watcher import Watcher


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a build chooses values, by name."""

    algorithm: str
    observer: str | None = None
    feedback: bool = False


def refined(
    question: Question,
    part: Part,
    found: Sensitivity,
    calibrations: Calibrations,
    rounding: Rounding,
    watcher: Watcher,
) -> Sensitivity:
    """`refine.refine` with trials of the calibrated language part, as many as are affordable; `found` where
    none are, or where KL was not measured. A build that was killed goes on with the figures that it has."""
    if found.unit != "kl":
        return found
    from builders.trials import Trials, affordable  # they need torch

    algorithm = get_algorithm(rounding.algorithm)
    windows = calibrations.windows(part)
    most, few = affordable(question.program, windows, algorithm, feedback=rounding.feedback)
    options = AlgorithmOptions(rounding.observer, calibrations.device)
    trials = Trials(part, algorithm, options, calibrations, windows[:few], rounding.feedback)
    # figures of before rows of trellis formats were weighted are none of this build's
    subject = {"rounding": asdict(rounding), "device": calibrations.device, "windows": few, "rows": True}
    notes = calibrations.notes(subject)
    try:
        return refine(question, found, trials.kl, most, notes=notes, watcher=watcher)
    finally:
        notes.close()
