"""Builds that kill themselves by SIGKILL, each a fork of one process that has loaded torch and never computed
with it.

As a script it reads a JSON list a line, [MODEL, ENGINE, STEP, OPTION...], and prints each build's exit code,
negative for the signal that ended it; STEP 0 is never, OPTION is --auto, --tune or --feedback.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
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


def options_with(model: Path, engine: Path, *words: str) -> Options:
    options = options_of(model, engine, auto="--auto" in words)
    return replace(options, feedback="--feedback" in words, tune=20 if "--tune" in words else None)


class Forks:
    """The process that forks for each build."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def build(self, model: Path, engine: Path, step: int, *words: str) -> int:
        """Exit code of a build that kills itself at a step, negative for the signal that ended it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([str(model), str(engine), step, *words]) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@contextmanager
def forks() -> Iterator[Forks]:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Forks(process)
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()


def forked(model: str, engine: str, step: int, *words: str) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(2, 1)  # standard output is for exit codes
            build(options_with(Path(model), Path(engine), *words), Killer(step))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    for name in (
        "torch._dynamo",
        "scipy.optimize",
        "builders.tune",
        "builders.quantize.gptq",
    ):  # once for all
        importlib.import_module(name)
    for line in sys.stdin:
        print(forked(*json.loads(line)), flush=True)
