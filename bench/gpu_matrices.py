"""Part `matrices`: the kernels of linears by themselves, every form of them, for a token and for a prompt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from gpu_executors import step
from gpu_kernels import Copy, loaded_apart
from gpu_models import VOCAB, formats_of, matrices, noise, part_of
from gpu_report import Report
from gpu_sizes import SIZES
from gpu_timing import Job, graph_of, interleaved

from edge_runtime.backends.cuda.driver import Launch, device_facts
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.cuda.tuning import candidates
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.launches import LinearLaunch

GOAL = 80.0  # % of the copy bandwidth, by the issue
MANY = 8  # launches of a prompt in a graph


def matrix_products(report: Report) -> None:
    """Matrix times a vector, 8 and a prompt, of every format and shape; those with goals first."""
    report.put("matrices", {})
    pairs = [(fmt, shape) for fmt in SIZES.formats for shape in SIZES.matrices]
    pairs.sort(key=lambda pair: pair[1] not in SIZES.goal_matrices)
    jobs = {f"{f} {r}x{c}": lambda f=f, r=r, c=c: _matrix(report, f, r, c) for f, (r, c) in pairs}
    report.each(jobs, seconds=4)


def _matrix(report: Report, fmt: str, rows: int, cols: int) -> None:
    """Enough copies of one matrix that none is still in the L2 when its turn comes again."""
    one = _nbytes(fmt, rows, cols)
    want = max(SIZES.working_set, SIZES.times_l2 * device_facts().l2_bytes)
    count = max(2, min(256, -(-want // one)))
    program = matrices(rows, cols, count)
    part = part_of(program, noise(program, formats_of(program, fmt)), context=4096, tokens=SIZES.prompt)
    with loaded_apart(part) as ours:
        driver, block = ours._driver, Copy(ours._driver)
        jobs, launches_in = {"copy": Job(block.job)}, {}
        for tokens in (1, 8, SIZES.prompt):
            batch = step(part, {0: (0, np.arange(tokens) % VOCAB)}, last=True)
            ours.likeliest(batch)  # so that all that the launches read is there
            for name, launches in _forms(ours, tokens).items():
                graph = graph_of(driver, launches)
                key = f"{tokens} {name}"
                launches_in[key] = len(launches)
                jobs[key] = Job(lambda g=graph: driver.launch_graph(g), lambda b=batch: staged(ours, b))
        found = interleaved(driver, jobs, SIZES.rounds, report.deadline - 3)
        rate = block.rate(found["copy"].ms)
        report.put("working_set", one * count)
        for tokens in (1, 8, SIZES.prompt):
            us = {
                key.partition(" ")[2]: found[key].ms * 1e3 / n
                for key, n in launches_in.items()
                if key.startswith(f"{tokens} ")
            }
            best = min(us, key=lambda name: us[name])
            what = f"{fmt} {rows}x{cols}, {tokens} token{'s' * (tokens > 1)}"
            others = ", ".join(f"{name} {value:.2f}" for name, value in us.items())
            report.note(f"{what}, us a launch: {others}")
            report.found["matrices"][f"{fmt} {rows}x{cols} {tokens}"] = us[best]
            spread = [getattr(found[f"{tokens} {best}"], end) * 1e3 / launches_in[f"{tokens} {best}"]
                      for end in ("least", "most")]  # fmt: skip
            report.figure(f"{what}: a launch ({best})", us[best], "us", spread=(spread[0], spread[1]))
            if tokens <= 8:
                goal = (rows, cols) in SIZES.goal_matrices and fmt != "f16" and tokens == 1
                share = 100 * one / (us[best] * 1e-6) / rate
                report.figure(f"{what}: of the copy", share, "%", goal=GOAL if goal else None)
            else:
                report.figure(f"{what}: rate", 2 * rows * cols * tokens / us[best] / 1e6, "TFLOP/s")


def _nbytes(fmt: str, rows: int, cols: int) -> int:
    """Codes and scales of a matrix."""
    program = matrices(rows, cols, 1)
    return sum(a.nbytes for a in noise(program, formats_of(program, fmt))["w0"].planes.values())


def _forms(ours: CudaExecutor, tokens: int) -> dict[str, list[Launch]]:
    """Launches of all matrices in each form that is worth it, and where launches may overlap also so."""
    launcher, found = ours._launcher, {}
    linears = [la for la in ours._lowered.launches if isinstance(la, LinearLaunch) and la.rows == "tokens"]
    forms = candidates(tokens) if tokens <= 32 else ("tile",)
    linears = linears if tokens <= 32 else linears[:MANY]
    for form in forms:
        found[form] = [launcher.product(la, tokens, form) for la in linears]
        if ours._driver.overlaps:
            found[f"{form}, overlapping"] = _overlapping(ours, linears, tokens, form)
    return found


def _overlapping(ours: CudaExecutor, linears: Sequence[LinearLaunch], tokens: int, form: str) -> list[Launch]:
    """As in a step: each may begin before the one in front of it has ended."""
    launcher = ours._launcher
    return [
        launcher._prepare(*launcher._linear(la, tokens, form), overlap=i > 0)  # type: ignore[arg-type]
        for i, la in enumerate(linears)
    ]


def staged(ours: CudaExecutor, batch: StepBatch) -> None:
    """The step that launches read in device memory: how many tokens it has, and where."""
    ours._staged.stage(batch)
    ours._driver.synchronize()
