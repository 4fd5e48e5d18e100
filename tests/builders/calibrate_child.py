"""Child of test_calibrate: kills a calibration of MODEL at every step that touches the disk, and resumes it.

Every run is a fork of this process, which has loaded torch and never computed with it. Prints one JSON
object: steps of an uninterrupted run, and for each of them how the killed run ended, how the resumed one, and
whether it left the same files.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from builders import calibration_folder, kept_rows
from builders.calibrate import CalibrationOptions, calibrate
from builders.corpus import Corpus
from builders.parts import Extras, open_contents


def run(model: Path, folder: Path, cores: int, before: Callable[[], None]) -> None:
    """Calibrate; `before` is called before every step that touches the disk."""

    def watched(function: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            before()
            return function(*args, **named)

        return call

    for name in ("fsync", "replace"):
        setattr(os, name, watched(getattr(os, name)))
    Path.unlink = watched(Path.unlink)  # type: ignore[method-assign]
    kept_rows.RowsWriter.add = watched(kept_rows.RowsWriter.add)  # type: ignore[method-assign]
    calibration_folder.write_safetensors = watched(calibration_folder.write_safetensors)
    corpus = Corpus("noise", np.random.default_rng(0).integers(3, 250, (6, 24)).astype(np.int32))
    with open_contents(model, Extras(), None) as contents:
        target = contents.target
        options = CalibrationOptions(memory=0 if cores == 1 else 1 << 30, cores=cores)
        digests = target.source.sha256()
        calibrate(target.weights, corpus, folder, digests=digests, options=options).close()


def fork(work: Callable[[], None]) -> int:
    """Exit code of a child that does the work, negative for the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "lock"}


def main(model: Path, work: Path) -> None:
    count = work / "count"

    def tally() -> None:
        with count.open("ab") as file:
            file.write(b".")

    assert fork(lambda: run(model, work / "whole", 1, tally)) == 0
    steps = count.stat().st_size
    whole = files(work / "whole")
    found = []
    for k in range(steps):
        folder = work / f"killed-{k}"
        left = [k]

        def die(left: list[int] = left) -> None:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1

        killed = fork(lambda folder=folder, die=die: run(model, folder, 1, die))
        resumed = fork(lambda folder=folder: run(model, folder, 2, lambda: None))
        found.append((killed, resumed, files(folder) == whole))
    print(json.dumps({"steps": steps, "files": sorted(whole), "runs": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
