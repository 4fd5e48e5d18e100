"""Limits that the user sets on an engine's quality: a build that breaks one writes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from edge_runtime.engine.manifest import Quality
from edge_runtime.errors import BadConfig, QualityLimit


@dataclass(frozen=True, slots=True)
class Limits:
    """max_kl: mean KL to f32, nats. max_ppl_increase: percent of perplexity above f32. min_accuracy: share of
    the task's cases, 0 to 1. None sets no limit.
    """

    max_kl: float | None = None
    max_ppl_increase: float | None = None
    min_accuracy: float | None = None

    def check(self, *, measured: bool, task: bool) -> None:
        """Raise BadConfig for a limit that is no limit, or that nothing is measured for."""
        for option, value in (("--max-kl", self.max_kl), ("--max-ppl-increase", self.max_ppl_increase)):
            if value is not None and (not measured or not value >= 0):
                raise BadConfig(f"{option} {value:g} needs 0 or more, and no --no-eval")
        if self.min_accuracy is not None and (not task or not 0 <= self.min_accuracy <= 1):
            raise BadConfig(
                f"--min-accuracy {self.min_accuracy:g} needs 0 to 1, and a --task to measure it on"
            )

    def broken(self, quality: Quality) -> list[str]:
        """One clause for every limit that the figures break."""
        found = []
        if self.max_kl is not None and not quality.kl_mean <= self.max_kl:
            found.append(
                f"KL to f32 is {quality.kl_mean:.5f} nats on {quality.text}, "
                f"at most {self.max_kl:g} is allowed"
            )
        rise = ppl_increase(quality)
        if self.max_ppl_increase is not None and not rise <= self.max_ppl_increase:
            found.append(
                f"perplexity rises by {rise:.2f}% on {quality.text}, "
                f"at most {self.max_ppl_increase:g}% is allowed"
            )
        task = quality.task
        if self.min_accuracy is not None and task is not None and not task.accuracy >= self.min_accuracy:
            found.append(
                f"accuracy is {task.accuracy:.4f} on {task.name}, at least {self.min_accuracy:g} is wanted"
            )
        return found


def ppl_increase(quality: Quality) -> float:
    """Percent by which perplexity rises above f32's."""
    return 100.0 * (quality.perplexity / quality.perplexity_f32 - 1.0)


def figures(quality: Quality) -> dict[str, float]:
    """The figures that limits are set on, and those beside them in a table of engines."""
    found = {
        "ppl_increase": ppl_increase(quality),
        "kl_mean": quality.kl_mean,
        "top1_agreement": quality.top1_agreement,
        "bits_per_weight": quality.bits_per_weight,
    }
    return found if quality.task is None else found | {"accuracy": quality.task.accuracy}


def broken_limits(quality: Quality) -> QualityLimit:
    """The error for the limits that an engine of this quality breaks; `report_of` finds the quality in it."""
    return QualityLimit(
        f"{'; '.join(quality.broken)}; nothing was written; use a format with more bits or smaller groups, "
        "or --force to write it all the same",
        figures(quality),
        quality,
    )


def report_of(error: QualityLimit) -> Quality | None:
    """All that was measured of the engine that was not written."""
    return error.report if isinstance(error.report, Quality) else None
