"""Every kernel gives the same bits on ARM, under an emulator, as on x86-64."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_runtime.engine.formats.c_header import c_header

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "edge_cpu",
    "executor",
    "stages",
    "batch",
    "open_pages",
    "adapters",
    "codec",
    "small_codes",
    "pool",
    "absent",
)
KERNELS = (
    "rows",
    "attention",
    "linear_int",
    "linear_bits",
    "linear_outlier",
    "linear_float",
    "low_rank",
)
BASE = ("-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno")
PATHS = {"scalar": (), "neon": ("-march=armv8.2-a+dotprod+fp16",)}


def build(compiler: str, folder: Path, paths: dict[str, tuple[str, ...]], *link: str) -> Path:
    """The driver with all kernels, compiled as kernels/CMakeLists.txt does."""
    folder.mkdir()
    (folder / "edge_formats.h").write_text(c_header())
    source = ROOT / "kernels" / "cpu"
    include = (f"-I{ROOT / 'kernels' / 'include'}", f"-I{source}", f"-I{folder}")
    jobs = [(name, source / f"{name}.cpp", ()) for name in SOURCES]
    jobs.append(("driver", Path(__file__).with_name("path_hashes.cpp"), ()))
    for isa, flags in paths.items():
        upper = isa.upper()
        defines = (f"-DEDGE_ISA={isa}", f"-DEDGE_SIMD=EDGE_SIMD_{upper}", f"-DEDGE_VEC_{upper}")
        own = (*defines, f"-DEDGE_TABLE_NAME={isa}_kernels", *flags)
        jobs += [(f"{isa}_{name}", source / f"{name}.cpp", own) for name in KERNELS]
    running: list[subprocess.Popen[str]] = []
    for name, path, flags in jobs:
        command = [compiler, *BASE, *flags, *include, "-c", str(path), "-o", str(folder / f"{name}.o")]
        running.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True))
        if len(running) == (os.cpu_count() or 1):
            _finish(running.pop(0))
    for process in running:
        _finish(process)
    driver = folder / "driver"
    objects = [str(folder / f"{name}.o") for name, _, _ in jobs]
    subprocess.run([compiler, *objects, "-pthread", *link, "-o", str(driver)], check=True)
    return driver


def _finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate()
    assert process.returncode == 0, errors


@pytest.mark.timeout(900)  # 15 s of compiler and emulator on a quiet core
def test_arm_gives_the_bits_of_x86(tmp_path: Path) -> None:
    """Also proves that the sources compile for ARM without a warning.

    `path_hashes.txt` was written on x86-64, where the scalar, avx2 and avx512 paths gave the same lines;
    after a wanted change of numerics build path_hashes.cpp there as kernels/CMakeLists.txt does and keep the
    scalar lines.
    """
    missing = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (apt-get install g++-aarch64-linux-gnu qemu-user)")
    driver = build("aarch64-linux-gnu-g++", tmp_path / "arm", PATHS, "-static")
    done = subprocess.run(
        ["qemu-aarch64", "-cpu", "max", str(driver)], capture_output=True, text=True, check=True
    )
    want = dict(line.split() for line in Path(__file__).with_name("path_hashes.txt").read_text().splitlines())
    got: dict[str, dict[str, str]] = {path: {} for path in PATHS}
    for line in done.stdout.splitlines():
        path, kernel, value = line.split()
        got[path][kernel] = value
    assert len(want) >= 60
    for path, values in got.items():
        assert values == want, path
