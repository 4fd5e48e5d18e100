"""The quality report of a build: planes as they lie in the unfinished file, held against the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from builders.device_code import DeviceCode
from builders.evaluate import EvaluationText, compare_models
from builders.known_answer import REFERENCE_LIMIT
from builders.parts import Checkpoint, Part
from builders.rotate import RotatedWeights
from builders.runner import backend_here, checkpoint_runner, engine_runner, formats_of
from builders.task import Task
from builders.watcher import Watcher
from builders.weights import EngineWeights, StoredPlanes
from edge_runtime.engine.manifest import Quality, TaskQuality
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile
from edge_runtime.errors import BackendUnavailable

EVAL_BACKENDS = ("reference", "native")


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: a part's plan for a profile and its stored planes, against its checkpoint; with the
    device code of an engine for a GPU."""

    checkpoint: Checkpoint
    part: Part
    profile: Profile
    plan: Plan
    stored: StoredPlanes
    code: DeviceCode | None = None


def measure_quality(
    subject: Subject, text: EvaluationText, eval_backend: str, sqnr_db: Mapping[str, float]
) -> Quality:
    """Figures on the text. eval_backend: "reference" computes with f32 activations, "native" as a backend of
    this machine does. Raises BackendUnavailable where none can run the engine.

    Bytes, and bits per weight of them: matrices, scales included, padding not, as `--bits` counts them; what
    memory holds is the plan's to say.
    """
    program, plan = subject.part.program, subject.plan
    restore = subject.part.weights.unturned if isinstance(subject.part.weights, RotatedWeights) else None
    engine = EngineWeights(program, plan.tensors, subject.stored.of)
    if eval_backend == "native":
        backend = backend_here(subject.profile, program, formats_of(plan), subject.code)
        if backend.name == "reference":
            raise BackendUnavailable(
                "--eval-backend native: no native backend here runs this engine; use --eval-backend reference"
            )
        longest = max(map(len, text.windows))
        with engine_runner(
            backend, program, plan, subject.stored.of, context=longest, code=subject.code
        ) as runner:
            found = compare_models(subject.checkpoint.weights, engine, plan.kv, text, runner, restore)
    else:
        found = compare_models(subject.checkpoint.weights, engine, plan.kv, text, restore=restore)
    matrices = {n for n, s in program.tensors.items() if s.role != "vector"}
    nbytes = sum(subject.stored.true_nbytes(n) for n in matrices)
    return Quality(
        text=text.name,
        tokens=found.tokens,
        backend=backend.name if eval_backend == "native" else "reference",
        perplexity=found.perplexity,
        perplexity_f32=found.perplexity_f32,
        kl_mean=found.kl_mean,
        kl_p99=found.kl_p99,
        top1_agreement=found.top1_agreement,
        bits_per_weight=8.0 * nbytes / sum(program.tensors[n].size for n in matrices),
        bytes=nbytes,
        sqnr_db=dict(sqnr_db),
        layer_cosine=found.layer_cosine,
    )


def measure_task(subject: Subject, task: Task, with_f32: bool | None, watcher: Watcher) -> TaskQuality:
    """Accuracy of the engine, and of the f32 checkpoint where `with_f32` (None: where the model is small)."""
    program, plan = subject.part.program, subject.plan
    if with_f32 is None:
        with_f32 = sum(spec.size for spec in program.tensors.values()) <= REFERENCE_LIMIT
    watcher.phase("task", len(task) * (2 if with_f32 else 1))
    sizes = {"context": task.context, "places": task.places}
    backend = backend_here(subject.profile, program, formats_of(plan), subject.code)
    with engine_runner(backend, program, plan, subject.stored.of, **sizes, code=subject.code) as runner:
        right = task.answered(runner, lambda what: watcher.step(f"engine {what}"))
    right_f32 = None
    if with_f32:
        exact = subject.checkpoint.program
        plain = backend_here(subject.profile, exact, dict.fromkeys(exact.tensors, "f32"))
        with checkpoint_runner(plain, subject.checkpoint.weights, plan, **sizes) as runner:
            right_f32 = task.answered(runner, lambda what: watcher.step(f"f32 {what}"))
    return TaskQuality(
        name=task.name,
        cases=len(task),
        accuracy=sum(right) / len(task),
        accuracy_f32=None if right_f32 is None else sum(right_f32) / len(task),
        backend=backend.name,
    )
