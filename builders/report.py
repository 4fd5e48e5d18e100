"""What edge-build shows: a progress bar on stderr, the plan's table, the final report; both as plain data."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

import msgspec

from builders.fitting import Change, bits_per_weight
from builders.limits import ppl_increase, report_of
from builders.pipeline import Report
from builders.planner import Plans, Request
from builders.watcher import Watcher
from edge_runtime.cli.output import Answer, Progress, progress, size, table
from edge_runtime.engine.manifest import LANGUAGE, DeviceCodeEntry, Manifest, PartEntry, Quality, TaskQuality
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import QualityLimit, Unsupported

_ROWS = (
    ("weights", "weights"),
    ("kv", "KV cache"),
    ("buffers", "buffers"),
    ("draft", "draft"),
    ("adapters", "adapters"),
    ("device_code", "device code"),
    ("context", "context (driver)"),
)
_PAUSE = 5.0  # seconds between two lines of a log about one phase
_WORST = 5  # tensors of lowest SQNR in the report


class ProgressBar(Watcher):
    """How a build goes on, on stderr: a terminal has a bar for each phase; a log a line where one begins, and
    at most nine more of one that takes long: its tenths.

    steps: a log has a line for every step instead.
    """

    def __init__(self, *, steps: bool = False) -> None:
        self._steps = steps
        try:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bars
        except ImportError:
            raise Unsupported("edge-build needs rich: pip install 'edge-runtime[build]'") from None
        console = Console(stderr=True)
        self._moving = sys.stderr.isatty()  # also where FORCE_COLOR calls a log a terminal
        self._bar = Bars(
            TextColumn("{task.description:<9}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[what]}", markup=False),
            console=console,
            disable=not self._moving,
        )
        self._task: Any = None
        self._log = Progress("")
        self._done, self._total = 0, 0

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def phase(self, name: str, steps: int) -> None:
        self._task = self._bar.add_task(name, total=steps, what="")
        self._log, self._done, self._total = Progress(name, pause=_PAUSE), 0, steps
        if not self._moving:
            progress(f"{name} ({steps})")

    def step(self, what: str) -> None:
        self._done += 1
        if self._moving and self._task is not None:
            self._bar.update(self._task, advance=1, what=what)
        elif self._steps:
            progress(what)
        elif self._total <= 10 * self._done < 10 * self._total:  # else it is this phase's line, or the next's
            self._log(self._done, self._total, what)


def formats_of(program: Program, plan: Plan) -> dict[str, str]:
    """role -> format of the plan, most tensors first where they have several; vectors are always f32."""
    found: dict[str, Counter[str]] = {}
    for name, chosen in plan.tensors.items():
        role = program.tensors[name].role
        if role != "vector":
            found.setdefault(role, Counter())[chosen.format] += 1
    return {
        role: next(iter(of)) if len(of) == 1 else " + ".join(f"{n} {fmt}" for fmt, n in of.most_common())
        for role, of in found.items()
    }


def plan_data(
    name: str, program: Program, plans: Plans, request: Request, changes: list[Change]
) -> dict[str, Any]:
    """The plan as one object of plain values; `fits` and `changes` say what to do; `companions` are bytes."""
    plan = plans[LANGUAGE]
    memory = plan.memory
    return {
        "model": name,
        "profile": plan.profile,
        "power_mode": plan.power_mode,
        "parameters": parameters(program),
        "weights": request.weights,
        "formats": formats_of(program, plan),
        "kv": {"k": plan.kv.k, "v": plan.kv.v, "page_tokens": plan.kv.page_tokens, "pages": plan.kv.pages},
        "step": msgspec.to_builtins(plan.step),
        "memory": {**msgspec.to_builtins(memory), "need": memory.need, "have": memory.have},
        "companions": {name: plans[name].memory.need for name in plans if name != LANGUAGE},
        "draft_length": request.draft_length,
        "predicted": msgspec.to_builtins(plan.predicted),
        "fits": memory.need <= memory.have,
        "changes": [{"options": c.options, "need": c.need} for c in changes],
    }


def parameters(program: Program) -> int:
    return sum(s.size for s in program.tensors.values() if s.role != "vector")


def plan_text(
    name: str, program: Program, plans: Plans, request: Request, profile: Profile, changes: list[Change]
) -> str:
    """The table of a dry run."""
    plan = plans[LANGUAGE]
    memory, predicted = plan.memory, plan.predicted
    fit = memory.need <= memory.have
    spare = memory.have - memory.need
    left = f"yes, {size(spare)} left" if fit else f"NO, {size(-spare)} too much"
    formats = ", ".join(f"{role} {fmt}" for role, fmt in formats_of(program, plan).items())
    kv = plan.kv.k if plan.kv.k == plan.kv.v else f"{plan.kv.k},{plan.kv.v}"
    rows: list[tuple[str, str]] = [(label, size(getattr(memory, key))) for key, label in _ROWS]
    rows += [
        ("need", size(memory.need)),
        ("reserve", size(memory.reserve)),
        (f"have ({size(memory.total)} - reserve)", size(memory.have)),
    ]
    lines = [
        f"{name}: {parameters(program) / 1e6:.1f} M parameters on {profile.title}, mode {plan.power_mode}",
        f"formats: {formats}; KV {kv}",
        f"context {plan.step.context}, KV cache for {plan.kv.pages * plan.kv.page_tokens} tokens, "
        f"{plan.step.sequences} sequences, steps of {plan.step.tokens} tokens",
        *_speculation(plans, request),
        "",
        table(rows, ("memory", "size"), right=(1,)),
        "",
        f"fits: {left}",
        f"predicted: {predicted.decode_tokens_per_s:.1f} tokens/s at half the context, "
        f"first token of a {predicted.prompt_tokens}-token prompt after {predicted.first_token_ms:.0f} ms",
    ]
    if changes:
        lines += ["", "what would make it fit:"]
        for change in changes:
            way = change.text
            lines.append(f"  {way}  (needs {size(change.need)})")
    elif not fit:
        lines += ["", "no format, context or KV format makes it fit; take a larger device or a smaller model"]
    return "\n".join(lines)


def _speculation(plans: Plans, request: Request) -> list[str]:
    """A line where the plan has room for tokens that are proposed and verified at once."""
    if not request.draft_length:
        return []
    names = ", ".join(name for name in plans if name != LANGUAGE) or "look-up in the text"
    rows = plans[LANGUAGE].step.logits
    return [f"speculation: {names}; up to {request.draft_length} tokens a sequence, {rows} rows of logits"]


def _carried(manifest: Manifest) -> dict[str, Any]:
    """Bytes of the parts beside the language part, and of each adapter."""
    companions = {
        name: {"weights": part.plan.memory.weights, "need": part.plan.memory.need}
        for name, part in manifest.parts.items()
        if name != LANGUAGE
    }
    return {"companions": companions, "adapters": {n: len(a.targets) for n, a in manifest.adapters.items()}}


def build_data(report: Report) -> dict[str, Any]:
    """The finished build as one object of plain values; adapters with the number of tensors they change.

    `bytes` is the file's size, `plan.memory.weights` what memory holds of weights, padding included.
    """
    manifest = report.manifest
    entry = manifest.parts[LANGUAGE]
    memory = entry.plan.memory
    return {
        "path": str(report.path),
        "bytes": report.nbytes,
        "matrices": _matrices(entry),
        "formats": dict(Counter(t.format for t in entry.plan.tensors.values())),
        **_carried(manifest),
        "quality": None if manifest.quality is None else msgspec.to_builtins(manifest.quality),
        "known_answer": None if manifest.known_answer is None else msgspec.to_builtins(manifest.known_answer),
        "plan": {
            "profile": entry.plan.profile,
            "power_mode": entry.plan.power_mode,
            "kv": msgspec.to_builtins(entry.plan.kv),
            "step": msgspec.to_builtins(entry.plan.step),
            "memory": {**msgspec.to_builtins(memory), "need": memory.need, "have": memory.have},
            "predicted": msgspec.to_builtins(entry.plan.predicted),
        },
        "device_code": msgspec.to_builtins(manifest.device_code),
        "seconds": {phase: round(s, 3) for phase, s in report.seconds.items()},
        "notices": report.notices,
    }


def _matrices(entry: PartEntry) -> dict[str, Any]:
    """All but the vectors: bytes, and bits per weight of them, scales included, padding not."""
    params = parameters(entry.program)
    bits = bits_per_weight(entry.program, {LANGUAGE: entry.plan})
    return {"params": params, "bytes": round(bits * params / 8.0), "bits_per_weight": bits}


def build_text(report: Report) -> str:
    """The final report for people."""
    manifest = report.manifest
    entry = manifest.parts[LANGUAGE]
    plan, quality = entry.plan, manifest.quality
    formats = ", ".join(f"{role} {fmt}" for role, fmt in formats_of(entry.program, plan).items())
    matrices = _matrices(entry)
    bits = f"{size(matrices['bytes'])} of matrices, {matrices['bits_per_weight']:.2f} bits per weight"
    rows = [
        ("engine", str(report.path)),
        ("size", size(report.nbytes)),
        ("weights", f"{bits}; {size(plan.memory.weights)} as stored, with padding and vectors"),
        ("formats", formats),
        ("memory", f"needs {size(plan.memory.need)} of {size(plan.memory.have)} on {plan.profile}"),
        ("predicted", f"{plan.predicted.decode_tokens_per_s:.1f} tokens/s in mode {plan.power_mode}"),
    ]
    carried = _carried(manifest)
    rows += [
        (name, f"{size(of['weights'])} of weights, needs {size(of['need'])} in all")
        for name, of in carried["companions"].items()
    ]
    rows += [("adapter", f"{name}, {n} tensors") for name, n in carried["adapters"].items()]
    if quality is not None:
        rows += _quality_rows(quality)
    rows += [("device code", device_code_text(entry)) for entry in manifest.device_code]
    rows.append(("time", ", ".join(f"{phase} {s:.1f} s" for phase, s in report.seconds.items())))
    return table(rows)


def _quality_rows(quality: Quality) -> list[tuple[str, str]]:
    """Figures, and the tensors that are worst off."""
    rise = ppl_increase(quality)
    rows = [
        ("text", f"{quality.text}, {quality.tokens} tokens predicted, {quality.backend} backend"),
        ("perplexity", f"{quality.perplexity:.3f} (f32 {quality.perplexity_f32:.3f}, {rise:+.2f}%)"),
        ("KL to f32", f"mean {quality.kl_mean:.5f}, 99th percentile {quality.kl_p99:.5f} nats"),
        ("same top token", f"{100.0 * quality.top1_agreement:.2f}%"),
    ]
    if quality.layer_cosine:
        cosine = min(quality.layer_cosine)
        rows.append(("lowest cosine", f"{cosine:.6f} after layer {quality.layer_cosine.index(cosine)}"))
    if quality.task is not None:
        rows.append(("task", task_text(quality.task)))
    worst = sorted(quality.sqnr_db.items(), key=lambda item: item[1])[:_WORST]
    return rows + [("lowest SQNR" if i == 0 else "", f"{db:6.2f} dB  {n}") for i, (n, db) in enumerate(worst)]


def broken_answer(error: QualityLimit) -> Answer:
    """A build that stopped at a limit: its quality report, to choose other formats by, beside the error."""
    quality = report_of(error)
    if quality is None:
        return Answer(None, error=error)
    return Answer({"quality": msgspec.to_builtins(quality)}, table(_quality_rows(quality)), error)


def device_code_text(entry: DeviceCodeEntry) -> str:
    """One line: ``device.sm_87.cubin, 40 kernels, 1.1 MiB, made by CUDA 12.6``."""
    ptx = f", PTX {entry.ptx}" if entry.kind == "ptx" else ""
    return f"{entry.blob}, {len(entry.kernels)} kernels, {size(entry.nbytes)}, made by CUDA {entry.cuda}{ptx}"


def task_text(task: TaskQuality) -> str:
    """One line: ``97.60% of 2400 cases of heldout.jsonl (f32 97.58%)``."""
    f32 = "" if task.accuracy_f32 is None else f" (f32 {100.0 * task.accuracy_f32:.2f}%)"
    return f"{100.0 * task.accuracy:.2f}% of {task.cases} cases of {task.name} on {task.backend}{f32}"
