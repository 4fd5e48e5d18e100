"""Every kernel of every instruction set gives the same bits: this machine's, and ARM's under an emulator."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_runtime.engine.formats.c_header import c_header

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("edge_cpu", "executor", "codec", "pool", "absent")
KERNELS = ("rows", "attention", "linear_int", "linear_float")
BASE = ("-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-math-errno")
X86 = {
    "scalar": (),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    # gcc 12 takes its own intrinsics' undefined operands for uninitialized variables
    "avx512": (
        "-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni",
        "-Wno-uninitialized", "-Wno-maybe-uninitialized",
    ),
}  # fmt: skip
ARM = {"scalar": (), "neon": ("-march=armv8.2-a+dotprod+fp16",)}


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


def hashes(output: str) -> dict[str, dict[str, str]]:
    """kernel -> path -> hash"""
    found: dict[str, dict[str, str]] = {}
    for line in output.splitlines():
        path, kernel, value = line.split()
        found.setdefault(kernel, {})[path] = value
    return found


def test_paths_agree_with_arm_to_the_bit(tmp_path: Path) -> None:
    """Also proves that the sources compile without a warning for both processors."""
    tools = ("aarch64-linux-gnu-g++", "qemu-aarch64", "g++")
    missing = [tool for tool in tools if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)} (apt-get install g++-aarch64-linux-gnu qemu-user)")
    if os.uname().machine != "x86_64":
        pytest.skip("compares x86 with an emulated ARM")
    arm = build("aarch64-linux-gnu-g++", tmp_path / "arm", ARM, "-static")
    emulated = subprocess.run(["qemu-aarch64", "-cpu", "max", str(arm)], capture_output=True, text=True, check=True)
    here = subprocess.run([str(build("g++", tmp_path / "x86", X86))], capture_output=True, text=True, check=True)
    arm_hashes, x86_hashes = hashes(emulated.stdout), hashes(here.stdout)
    assert len(arm_hashes) > 80 and arm_hashes.keys() == x86_hashes.keys()
    for kernel, by_path in arm_hashes.items():
        assert set(by_path) == {"scalar", "neon"}
        assert len({*by_path.values(), *x86_hashes[kernel].values()}) == 1, (kernel, by_path, x86_hashes[kernel])
