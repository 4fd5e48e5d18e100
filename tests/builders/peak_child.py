"""Child of test_pipeline: builds MODEL into TARGET and prints its peak memory above the start, in bytes.

argv: warm-up model (loads every library and code path first), model, target, weights format, algorithm.
"""

from __future__ import annotations

import sys
from pathlib import Path

from builders.calibrating import CalibrationRequest
from builders.corpus import CorpusOptions
from builders.pipeline import Options, build
from builders.planner import Request


def peak() -> int:
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(warm: Path, model: Path, target: Path, weights: str, algorithm: str) -> None:
    request = Request(weights=weights)
    some = CalibrationRequest("builtin", CorpusOptions(samples=4, length=32), device="cpu")
    first = target.with_name("warm.edge")
    build(Options(warm, first, "cpu", request, algorithm=algorithm, calibration=some, text_tokens=64))
    Path("/proc/self/clear_refs").write_text("5")  # the peak counter starts again
    start = peak()
    build(Options(model, target, "cpu", request, algorithm=algorithm, calibration=some))
    print(peak() - start)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5])
