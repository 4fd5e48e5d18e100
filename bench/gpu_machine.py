"""Parts `probe` and `build`: the machine, and the kernels compiled for its GPU."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import msgspec
from gpu_code import EMULATED, WORK, compiler, unit_of
from gpu_executors import PAIRS, PLANNERS, planner
from gpu_models import attentions, formats_of, llama, lowered_of, matrices, part_of
from gpu_report import Report
from gpu_sizes import SIZES
from machine import machine

from edge_runtime.backends.cuda.driver import device_facts, open_driver
from edge_runtime.backends.protocol import PackedTensor
from edge_runtime.engine.device_code import Kernel
from edge_runtime.engine.launches import kernels_of

PACKAGES = ("numpy", "msgspec", "cuda-bindings", "torch", "triton", "pytest", "cupy-cuda13x", "pycuda")


def probe(report: Report) -> None:
    """Device, driver, compiler and profile."""
    facts = device_facts()
    about: dict[str, Any] = {**machine(), "gpu": facts.name, **msgspec.structs.asdict(facts)}
    about["python"] = platform.python_version()
    about["packages"] = _versions()
    about["smi"] = _smi()
    report.put("machine", about)
    report.note(f"{facts}, {facts.total_bytes >> 20} MiB, {facts.multiprocessors} multiprocessors, "
                f"L2 {facts.l2_bytes >> 20} MiB, through {facts.api}")  # fmt: skip
    driver = open_driver()
    try:
        report.put("free", driver.free_bytes())
        report.note(f"graphs: {driver.graphs}; free: {driver.free_bytes()[0] >> 20} MiB")
    finally:
        driver.close()
    with report.guarded("NVRTC"):
        report.note(f"compiler: {compiler().name}")
        report.put("compiler", compiler().name)
    with report.guarded("profile"):
        from edge_runtime.engine.probe import probe_machine

        found = probe_machine(measure=False)
        report.note(f"profile {found.profile.name} ({found.kind}); notes: {'; '.join(found.notes) or 'none'}")
        report.put("profile", found.profile.name)
    with report.guarded("native library"):
        from edge_runtime.backends.cpu import BACKEND

        answer = BACKEND.available()
        report.note("cpu backend: there" if answer.ok else f"cpu backend left out: {answer.why}")


def kernel_sets() -> dict[str, tuple[Kernel, ...]]:
    """What the parts load, by what they are for."""
    found: dict[str, tuple[Kernel, ...]] = {}
    for fmt in SIZES.formats:
        program = matrices(*SIZES.matrices[0], 1)
        found[f"matrices {fmt}"] = _kernels(program, fmt, "int8")
    for kv in SIZES.caches:
        found[f"attention {kv}"] = _kernels(attentions(SIZES.attention, 1, SIZES.context), "int4_g64", kv)
    found["llama"] = _kernels(llama(SIZES.llama), "int4_g64", "int8")
    for fmt, kv in PAIRS.items():
        found[f"toy {fmt}, KV {kv}"] = _kernels(llama(SIZES.toy), fmt, kv)
    for fmt, kv in PLANNERS.items():
        found[f"planner {fmt}, KV {kv}"] = _kernels(planner().program, fmt, kv)
    return found


def build(report: Report) -> None:
    """Every kernel set compiled, beside each other, for the parts that come; registers and spills."""
    sets = {name: unit_of(kernels) for name, kernels in kernel_sets().items()}
    units = dict.fromkeys(sets.values())
    total, spilling, usage = 0, [], {}
    with ProcessPoolExecutor(min(len(units), os.cpu_count() or 1)) as pool:
        jobs = {pool.submit(_compile, text): name for name, text in sets.items()}
        for job in as_completed(jobs):
            name = jobs[job]
            with report.guarded(f"compile {name}", seconds=0):
                nbytes, cuda, ptx, kernels, seconds = job.result()
                total += nbytes
                usage |= kernels
                report.check(
                    f"compile {name}",
                    True,
                    f"{len(kernels)} kernels, {nbytes} bytes, CUDA {cuda}, PTX {ptx}, {seconds:.1f} s",
                )
    for symbol, (registers, _, spills) in sorted(usage.items()):
        if spills:
            spilling.append(f"{symbol} ({spills} bytes, {registers} registers)")
    report.put(
        "kernels",
        {s: dict(zip(("registers", "shared", "spills"), u, strict=True)) for s, u in sorted(usage.items())},
    )
    report.figure("device code in all", total / 1e6, "MB")
    report.figure("kernels that spill registers", len(spilling), "kernels", goal=0, at_most=True)
    if spilling:
        report.note(f"spills: {'; '.join(spilling)}")
    if report.left() > 20:
        with report.guarded("edge-build on this machine"):
            _edge_build(report)


def _kernels(program: Any, fmt: str, kv: str) -> tuple[Kernel, ...]:
    formats = formats_of(program, fmt)
    bare = {n: PackedTensor(s.rows, s.cols, formats[n], "m16", {}) for n, s in program.tensors.items()}
    return kernels_of(lowered_of(part_of(program, bare, kv=kv)))


def _compile(text: str) -> tuple[int, str, str, dict[str, tuple[int, int, int]], float]:
    """In a process of its own."""
    image = compiler().image(text)
    usage = {s: (u.registers, u.shared_bytes, u.spill_bytes) for s, u in image.kernels.items()}
    return len(image.data), image.cuda, image.ptx, usage, image.seconds


def _edge_build(report: Report) -> None:
    """The shipped planner built by edge-build for this GPU, where what it needs is installed."""
    root = Path(__file__).resolve().parent.parent
    engine = WORK / "planner.edge"
    argv = [sys.executable, "-m", "builders.cli", "--profile", "auto", "--weights", "int4_g64", "--no-eval"]
    argv += ["-o", str(engine), str(root / "examples" / "planner" / "model")]
    if EMULATED:
        report.note("edge-build left out: the emulator's modules are not the builder's")
        return
    done = subprocess.run(argv, capture_output=True, text=True, timeout=max(1, report.left()))
    report.check("edge-build --profile auto", done.returncode == 0, _end(done))
    if done.returncode == 0:
        argv = [sys.executable, "-m", "edge_runtime.cli.run", str(engine), "--backend", "cuda"]
        argv += ["bring me the red mug from the kitchen"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=max(1, report.left()))
        report.check("edge-run --backend cuda", done.returncode == 0, _end(done))


def _end(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stdout + done.stderr).strip()[-400:]


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "absent"
    return found


def _smi() -> str:
    """What nvidia-smi says of driver, clocks and power; "" where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    query = (
        "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu,ecc.mode.current"
    )
    argv = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20).stdout.strip()
