"""The command behind `edge-bench --calibrate`: measure, write the profile, hold an engine against it."""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edge_runtime.cli.calibrate import calibrate, write_profile
from edge_runtime.cli.options import open_with
from edge_runtime.cli.output import Answer, Progress, progress, table
from edge_runtime.cli.timer import DECODE, Timer, session_seconds
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.profile import Profile, load_profile
from edge_runtime.engine.roofline import Step, prompt_steps, prompt_tokens, timer
from edge_runtime.errors import BadConfig
from edge_runtime.serving.session import Session

OUTPUT = Path("calibrated.yaml")


def calibration_answer(args: argparse.Namespace) -> Answer:
    """Raises BadConfig, Unsupported, BackendUnavailable."""
    formats = [] if args.formats is None else [name.strip() for name in args.formats.split(",")]
    for name in formats:
        get_format(name)
    output = args.output or OUTPUT
    if output.suffix not in (".yaml", ".yml"):
        raise BadConfig(f"--output {str(output)!r:.80}: expected a name that ends in .yaml")
    base = load_profile(args.profile or "auto")
    threads = args.threads or len(os.sched_getaffinity(0))
    calibrated = calibrate(base, threads, Progress("calibrating"), formats)
    profile = calibrated.profile
    write_profile(profile, output, _processor(), datetime.date.today().isoformat())
    data: dict[str, Any] = {
        "profile": profile.as_mapping(),
        "fit": calibrated.errors,
        "output": str(output),
        "check": None,
    }
    text = f"{_figures(profile)}\n\n{_nearness(calibrated.errors)}"
    text += f"\n\nwritten: {output}; plan with: edge-build --profile ./{output.name}"
    if args.engine is not None:
        progress("checking the engine")
        with open_with(args) as session:
            check = compare(session, profile, Timer(threads))
        data["check"] = check
        rows = [
            (r["what"], f"{r['predicted']:.4g}", f"{r['measured']:.4g}", f"{100 * r['error']:+.1f}%")
            for r in check
        ]
        text += f"\n\n{table(rows, ('engine', 'predicted', 'measured', 'error'), right=(1, 2, 3))}"
    return Answer(data, text)


def compare(session: Session, profile: Profile, clock: Timer) -> list[dict[str, Any]]:
    """Predicted and measured: tokens/s at half the context, ms to the first token of a prompt.

    Of the runs the fastest, for a model of speed knows no other load. error: a share of what was measured.
    """
    program = session.manifest.parts[LANGUAGE].program
    step = session.step_shape
    prompt = min(prompt_tokens(step), session.context - 1)
    depth = max(1, min(session.context // 2, session.context - DECODE - 2))
    first, decode = session_seconds(session, clock, prompt, depth)
    seconds = timer(program, session.plan.tensors, session.kv, profile, profile.mode())
    measured = profile.efficiency.measured
    request = 0.0 if measured is None else measured.request_us * 1e-6
    expected = 1e3 * (request + seconds(prompt_steps(step, prompt)))
    rate = 1.0 / seconds([Step(1, depth + DECODE // 2, True)])
    found = (
        (f"tokens/s at {depth}", rate, 1.0 / decode),
        (f"first token of {prompt}, ms", expected, 1e3 * first),
    )
    return [{"what": w, "predicted": p, "measured": m, "error": p / m - 1.0} for w, p, m in found]


def _figures(profile: Profile) -> str:
    """Rates of every format, and the overheads."""
    measured = profile.efficiency.measured
    if measured is None:
        return ""
    rows = [
        (name, f"{s.gbps:.1f}", f"{s.cached_gbps:.1f}", f"{s.gops:.0f}")
        for name, s in measured.formats.items()
    ]
    heads = ("format", "GB/s", "GB/s cached", "Gop/s of a prompt")
    return (
        f"reading memory: {profile.mode().bandwidth_gbps:.1f} GB/s with {measured.threads} threads\n\n"
        f"{table(rows, heads, right=(1, 2, 3))}\n\n"
        f"a step {measured.step_us:.0f} us (of a small model {measured.small_step_us:.0f}), a stage "
        f"{measured.stage_us:.2f} us, a token's turn in one {measured.unit_us:.2f} us, a request "
        f"{measured.request_us:.0f} us, a logit {measured.logit_ns:.2f} ns, "
        f"a value {measured.value_ns:.2f} ns"
    )


def _nearness(errors: Mapping[str, float]) -> str:
    """How far the model is from what it was fitted to."""
    worst = max(errors, key=lambda name: abs(errors[name]))
    middle = statistics.median(abs(e) for e in errors.values())
    return (
        f"the fit to {len(errors)} measurements: half of them within {100 * middle:.1f}%, at most "
        f"{100 * errors[worst]:+.1f}% ({worst})"
    )


def _processor() -> str:
    """Its name as the kernel gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.machine()
