"""A build that kills itself by SIGKILL: `killed_build.py MODEL ENGINE STEP [OPTION]`; STEP 0 is never, OPTION
is --auto, --tune or --feedback."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from builders.calibrating import CalibrationRequest
from builders.corpus import CorpusOptions
from builders.pipeline import Options, build
from builders.planner import Request
from builders.watcher import Watcher


class Killer(Watcher):
    """Counts the steps of all phases."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def options_of(model: Path, engine: Path, *, auto: bool) -> Options:
    formats = ("int8_g64", "int4_g32", "int3_g32")
    request = Request(weights="auto", bits=4.6, formats=formats) if auto else Request(weights="int4_g32")
    calibration = CalibrationRequest("builtin", CorpusOptions(samples=4, length=32), device="cpu")
    return Options(model, engine, "cpu", request, algorithm="gptq", calibration=calibration, text_tokens=64)


if __name__ == "__main__":
    model, engine, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    options = options_of(model, engine, auto="--auto" in sys.argv)
    options = replace(options, feedback="--feedback" in sys.argv)
    build(replace(options, tune=20 if "--tune" in sys.argv else None), Killer(step))
