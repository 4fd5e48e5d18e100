"""The team of threads: every unit once, stages in order, no data race (ThreadSanitizer where it works)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = ("-fsanitize=thread", "-g")


def build(tmp_path: Path, *flags: str) -> Path:
    out = tmp_path / "pool_check"
    folder = ROOT / "kernels" / "cpu"
    sources = (str(Path(__file__).with_name("pool_check.cpp")), str(folder / "pool.cpp"))
    command = ["g++", "-std=c++17", "-O1", *flags, f"-I{folder}", *sources, "-pthread", "-o", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.mark.parametrize("flags", [(), SANITIZED], ids=["plain", "tsan"])
def test_every_unit_runs_once_and_in_order(tmp_path: Path, flags: tuple[str, ...]) -> None:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    try:
        program = build(tmp_path, *flags)
    except subprocess.CalledProcessError as error:
        if not flags:
            raise
        pytest.skip(f"this compiler has no ThreadSanitizer: {error.stderr.decode()[-200:]}")
    # Without address randomisation, which ThreadSanitizer of older compilers cannot map
    fixed = [setarch, "-R"] if flags and (setarch := shutil.which("setarch")) else []
    done = subprocess.run(
        [*fixed, str(program)], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert done.stdout == "ok\n"
