"""`make gpu-check`: what a GPU machine can check of this version.

There is no CUDA backend yet, so this says what the probe finds, plans the shipped planner for that GPU, and
runs the engine with the cpu backend: the part of a GPU deployment that exists. Exit code 1 where there is no
NVIDIA GPU.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from edge_runtime.engine.probe import probe_machine

ROOT = Path(__file__).resolve().parent.parent


def main() -> int:
    machine = probe_machine()
    print(f"found: {machine.model} (profile {machine.profile.name}; memory from {machine.memory_source})")
    for note in machine.notes:
        print(f"  note: {note}")
    if machine.profile.backend != "cuda":
        print("gpu-check: no NVIDIA GPU here, nothing was run on a GPU")
        return 1
    engine = ROOT / "build" / "gpu-check.edge"
    engine.parent.mkdir(exist_ok=True)
    model = ROOT / "examples" / "planner" / "model"
    build = ["builders.cli", "--profile", "auto", "--weights", "int4_g64", "-o", str(engine), str(model)]
    run = ["edge_runtime.cli.run", str(engine), "--backend", "cpu", "bring me the red mug from the kitchen"]
    for argv in (build, run):
        done = subprocess.run([sys.executable, "-m", *argv], check=False)
        if done.returncode:
            return done.returncode
    print("gpu-check: planned for this GPU, ran on its CPU; GPU kernels come with the CUDA backend")
    return 0


if __name__ == "__main__":
    sys.exit(main())
