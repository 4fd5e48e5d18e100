"""`make gpu-check`: everything that a machine with an NVIDIA GPU can tell of this version, within 8 minutes.

    python bench/gpu_check.py [--minutes 8] [--parts probe,build,…] [--wheels FOLDER]

Writes bench/results/<gpu>-<date>.json, the same as a table (.md) and, with matplotlib, a chart (.png), anew
after each part. A part is a process of its own with a limit of its own, so neither a lost CUDA context nor an
endless kernel takes the others along. Straight from the checkout: numpy, msgspec, pyyaml, safetensors,
tokenizers and cuda-bindings (or pycuda) are needed, and NVRTC, from a CUDA toolkit or as torch brings it;
what else is missing is said and left out. Wheels in FOLDER stand in for what is missing. Exit code 0: nothing
was wrong; 1: something was; 2: no GPU, or nothing to run it with. Goals that are not met are in the results.

EDGE_GPU_CHECK_EMULATED=1 runs all of it, tiny, in the emulator: that the scripts work, and no figure.
bench/README.md has the commands for a machine that is lent for minutes.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BENCH = Path(__file__).resolve().parent
WORK = Path(os.environ.get("EDGE_GPU_CHECK_WORK", ROOT / "build" / "gpu-check"))
EMULATED = os.environ.get("EDGE_GPU_CHECK_EMULATED") == "1"
RESULTS = WORK if EMULATED else BENCH / "results"
PARTS = {  # name: (module, function, seconds at most); in the order in which they tell most for their time
    "probe": ("gpu_machine", "probe", 30),
    "build": ("gpu_machine", "build", 75),
    "executors": ("gpu_executors", "executors", 60),
    "exactness": ("gpu_executors", "exactness", 45),
    "copy": ("gpu_kernels", "copy", 15),
    "decode": ("gpu_decode", "decode", 75),
    "matrices": ("gpu_matrices", "matrix_products", 60),
    "attention": ("gpu_kernels", "attention", 50),
    "peers": ("gpu_peers", "peers", 75),
    "kernels": ("gpu_tests", "kernels", 180),
    "sanitizer": ("gpu_tests", "sanitizer", 75),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, and in which order")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for packages that are missing")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.part:
        return run_part(args.part)
    parts = [name.strip() for name in args.parts.split(",") if name.strip()]
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        parser.error(f"unknown part {unknown[0]!r}; expected some of {', '.join(PARTS)}")
    WORK.mkdir(parents=True, exist_ok=True)
    environment = environment_of(args.wheels)
    return 2 if environment is None else check(parts, args.minutes * 60, environment)


def environment_of(wheels: Path | None) -> dict[str, str] | None:
    """For the parts' processes; None where something is missing that nothing works without."""
    import gpu_wheels

    paths = [str(ROOT), str(BENCH)]
    if EMULATED:
        paths += [str(ROOT / "tests" / "cuda"), str(ROOT / "tests" / "gpu")]
    site = WORK / f"site-{sys.implementation.cache_tag}"  # one Python's packages are not another's
    sys.path[:0] = [str(site)]
    if wheels is not None:
        try:
            names = gpu_wheels.unpack_missing(wheels, site)
        except FileNotFoundError as error:
            print(f"gpu-check: {error}")
            return None
        print(f"from {wheels}: {', '.join(names) or 'nothing was missing'}")
    if site.is_dir():
        paths.append(str(site))
    missing = gpu_wheels.missing(gpu_wheels.NEEDED)
    if gpu_wheels.found("pycuda"):
        missing = [name for name in missing if not name.startswith("cuda.")]
    if missing:
        print(f"gpu-check: this Python ({sys.executable}) lacks {', '.join(missing)}; install them,")
        print("or put their wheels into a folder: make gpu-check WHEELS=folder")
        return None
    for name in gpu_wheels.missing(gpu_wheels.OPTIONAL):
        print(f"left out, as {name} is not installed: {gpu_wheels.OPTIONAL[name]}")
    made = {**os.environ, "EDGE_GPU_CHECK_WORK": str(WORK), "PYTHONUNBUFFERED": "1"}
    made["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    return made | (_fake(paths) if EMULATED else {})


def _fake(paths: list[str]) -> dict[str, str]:
    """The fake GPU for processes: see tests/cuda/fake_cuda.py."""
    sys.path[:0] = paths
    import fake_cuda

    modules = WORK / "modules"
    modules.mkdir(parents=True, exist_ok=True)
    made = fake_cuda.environment(modules, cc="9.0", driver=13000)  # where launches may overlap
    return {k: v for k, v in made.items() if k == "LD_LIBRARY_PATH" or k.startswith("EDGE_FAKE_")}


def check(parts: list[str], seconds: float, environment: dict[str, str]) -> int:
    """Run parts one after the other and keep what they found. The exit code."""
    began = time.monotonic()
    results: dict[str, Any] = {
        "schema": 1,
        "date": datetime.date.today().isoformat(),
        "commit": _commit(),
        "emulated": EMULATED,
        "machine": {},
        "parts": {},
    }
    if "probe" not in parts:
        parts = ["probe", *parts]
    for name in parts:
        left = seconds - (time.monotonic() - began)
        limit = min(PARTS[name][2], left - 2)
        if limit < 5:
            results["parts"][name] = {"state": "not run: time"}
            print(f"== {name}: not run: time", flush=True)
            continue
        print(f"== {name} (at most {limit:.0f} s, {left:.0f} s left)", flush=True)
        part = results["parts"][name] = _run(name, limit, environment)
        print(f"== {name}: {part['state']}, {part['seconds']:.1f} s", flush=True)
        if name == "probe":
            results["machine"] = part.pop("machine", {})
            if not results["machine"]:
                print("gpu-check: not run on a GPU: there is none here, or the driver does not answer")
                return 2
        _write(results)
    _combine(results)
    paths = _write(results)
    print(table_of(results))
    print("written: " + ", ".join(str(p) for p in paths))
    wrong = [c for part in results["parts"].values() for c in part.get("checks", []) if not c["ok"]]
    crashed = [n for n, part in results["parts"].items() if part["state"].startswith(("failed", "stopped"))]
    print(f"gpu-check: {len(wrong)} wrong, parts that failed: {', '.join(crashed) or 'none'}, "
          f"{time.monotonic() - began:.0f} s")  # fmt: skip
    return 1 if wrong or crashed else 0


def _run(name: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
    """A part in a process of its own; what it found until it ended or was ended."""
    out = WORK / f"part-{name}.json"
    out.unlink(missing_ok=True)
    argv = [sys.executable, str(BENCH / "gpu_check.py"), "--part", name]
    more = {"EDGE_GPU_CHECK_SECONDS": f"{limit - 2:.1f}", "EDGE_GPU_CHECK_OUT": str(out)}
    began = time.monotonic()
    process = subprocess.Popen(argv, env=environment | more, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit + 5)
        state = "ran" if code == 0 else f"failed: exit code {code}"
    except subprocess.TimeoutExpired:
        state = f"stopped after {limit:.0f} s"
    finally:
        _end(process)
    found = json.loads(out.read_text()) if out.is_file() else {}
    return {"state": state, "seconds": round(time.monotonic() - began, 1), **found}


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the session that was started for a part, with all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(3)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(0.1)
    process.wait()


def run_part(name: str) -> int:
    """In the part's own process."""
    sys.path[:0] = [path for path in (str(ROOT), str(BENCH)) if path not in sys.path]
    from gpu_report import NO_TIME, OutOfTime, Report

    seconds = float(os.environ.get("EDGE_GPU_CHECK_SECONDS", PARTS[name][2]))
    out = Path(os.environ.get("EDGE_GPU_CHECK_OUT", WORK / f"part-{name}.json"))
    out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(name, out, time.monotonic() + seconds)
    module, function, _ = PARTS[name]
    try:
        getattr(import_module(module), function)(report)
    except OutOfTime as late:
        report.note(f"{NO_TIME}: {late} and what follows")
    except Exception as error:
        report.check(f"{name} ran to its end", False, f"{type(error).__name__}: {error}"[:2000])
        if type(error).__name__ not in ("BackendUnavailable", "ModuleNotFoundError"):
            traceback.print_exc(limit=8)
        return 1
    return 0


def _combine(results: dict[str, Any]) -> None:
    """Figures that need more than one part."""
    from gpu_ratios import combine

    try:
        combine(results)
    except (KeyError, ZeroDivisionError, TypeError) as error:
        print(f"ratios left out: {type(error).__name__} {error}")


def table_of(results: dict[str, Any]) -> str:
    from gpu_report import table

    return table(results)


def _write(results: dict[str, Any]) -> list[Path]:
    """JSON and table, and the chart where it can be drawn."""
    from gpu_report import chart, table

    gpu = re.sub(r"[^a-z0-9]+", "-", str(results["machine"].get("gpu", "none")).lower()).strip("-")
    stem = RESULTS / f"{gpu.removeprefix('nvidia-')}-{results['date']}"
    RESULTS.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_name(stem.name + end) for end in (".json", ".md", ".png")]
    paths[0].write_text(json.dumps(results, indent=1) + "\n")
    paths[1].write_text(table(results))
    drawn = len(results["parts"]) > 1 and chart(results, paths[2])
    return paths if drawn else paths[:2]


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or os.environ.get("EDGE_COMMIT", "unknown")


if __name__ == "__main__":
    sys.exit(main())
