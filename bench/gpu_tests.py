"""Parts `kernels` and `sanitizer`: the tests of tests/cuda on this GPU, and some under compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from gpu_code import EMULATED, WORK
from gpu_report import NO_TIME, Report

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "cuda"
NAMES = ("linear", "attention", "kv", "row", "prepare", "sample")
SANITIZERS = ("/usr/local/cuda/bin", "/usr/local/cuda/compute-sanitizer", "/opt/nvidia/compute-sanitizer")


def environment(**more: str) -> dict[str, str]:
    """Of a process whose tests of kernels run on the GPU: see tests/gpu/device_kernels.py."""
    paths = [ROOT, ROOT / "bench", TESTS, ROOT / "tests" / "gpu", os.environ.get("PYTHONPATH", "")]
    made = {
        **os.environ,
        "EDGE_KERNELS_ON": "gpu",
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, paths))),
    }
    return made | more


def kernels(report: Report) -> None:
    """Every test of a kernel in tests/cuda, with its kernels compiled for this GPU and run on it."""
    if importlib.util.find_spec("pytest") is None:
        report.note("not run: pytest is not installed (make gpu-check WHEELS=folder)")
        return
    xml = WORK / "kernels.xml"
    xml.unlink(missing_ok=True)
    argv = [sys.executable, "-m", "pytest", "-q", "-x" if EMULATED else "--maxfail=60", "--tb=short"]
    argv += ["-o", "addopts=", "-p", "no:cacheprovider", f"--confcutdir={TESTS}", f"--junitxml={xml}"]
    if importlib.util.find_spec("xdist") is not None and not EMULATED:
        argv += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    if EMULATED:
        argv += ["-k", "advance", str(TESTS / "test_sample_kernels.py")]
    else:
        argv += [str(TESTS / f"test_{name}_kernels.py") for name in NAMES]
    log = WORK / "kernels.log"
    with log.open("w") as out:
        done = subprocess.Popen(argv, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT, env=environment(),
                                start_new_session=True)  # fmt: skip
        try:
            done.wait(max(5, report.left() - 5))
        except subprocess.TimeoutExpired:
            _end(done)
            report.note(f"{NO_TIME}: the tests were stopped; what they said is in {log}")
    _count(report, xml, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Interrupt the session that we started, so that pytest writes its report; then end it."""
    import signal

    for number, wait in ((signal.SIGINT, 8), (signal.SIGKILL, 5)):
        try:
            os.killpg(process.pid, number)
            process.wait(wait)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def _count(report: Report, xml: Path, log: Path) -> None:
    """Passed and failed tests by file, from pytest's report."""
    if not xml.is_file():
        report.check("the kernels' tests ran", False, log.read_text(errors="replace")[-1500:])
        return
    by_file: dict[str, list[int]] = {}
    failures = []
    for case in ElementTree.parse(xml).getroot().iter("testcase"):
        name = case.get("classname", "").rpartition(".")[2]
        counts = by_file.setdefault(name, [0, 0, 0])
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        if bad is not None:
            counts[1] += 1
            failures.append((f"{name}::{case.get('name')}", (bad.get("message") or bad.text or "")[:300]))
        elif case.find("skipped") is not None:
            counts[2] += 1
        else:
            counts[0] += 1
    for name, (passed, failed, skipped) in sorted(by_file.items()):
        words = f"{passed} passed, {failed} failed, {skipped} skipped"
        report.check(name, failed == 0 and passed > 0, words)
    report.check("some tests ran", bool(by_file))
    for name, why in failures[:40]:
        report.check(name, False, why)


def sanitizer(report: Report) -> None:
    """memcheck and racecheck over one launch or more of each kind of kernel, in buffers of their own."""
    tool = shutil.which("compute-sanitizer") or next(
        (
            f"{folder}/compute-sanitizer"
            for folder in SANITIZERS
            if Path(folder, "compute-sanitizer").is_file()
        ),
        None,
    )
    if tool is None:
        report.note("not run: compute-sanitizer is not here")
        return
    script = [sys.executable, str(ROOT / "bench" / "gpu_sanitized.py")]

    def run(argv: list[str]) -> subprocess.CompletedProcess[str]:
        env = environment(EDGE_DEVICE_BUFFERS="apart")
        limit = max(5, report.left() - 2)
        return subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env, timeout=limit)

    plain = run(script)
    report.check("the script by itself", plain.returncode == 0, (plain.stdout + plain.stderr)[-300:])
    for check in ("memcheck", "racecheck", "synccheck"):
        if report.left() < 15:
            report.note(f"{check}: {NO_TIME}")
            continue
        argv = [tool, "--tool", check, "--error-exitcode", "9", "--print-limit", "20"]
        try:
            done = run([*argv, "--target-processes", "application-only", *script])
        except subprocess.TimeoutExpired as error:
            text = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
            report.note(f"{check}: {NO_TIME}; its words so far: {text[-300:]}")
            continue
        text = done.stdout + done.stderr
        (WORK / f"{check}.log").write_text(text)
        summary = re.findall(r"=+ (?:ERROR|RACECHECK) SUMMARY: .*", text)
        detail = summary[-1] if summary else text[-400:]
        report.check(check, done.returncode == 0 and bool(summary), detail)
