"""What gpu-check proves, as tests: the kernels' tests, programs beside the reference, exactness."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("part", ["executors", "exactness", "kernels"])
def test_part_of_gpu_check(part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGE_GPU_CHECK_OUT", str(tmp_path / "found.json"))
    monkeypatch.setenv("EDGE_GPU_CHECK_SECONDS", "540")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'bench'}")
    argv = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), "--part", part]
    done = subprocess.run(argv, capture_output=True, text=True)
    found = json.loads((tmp_path / "found.json").read_text())
    wrong = [check for check in found["checks"] if not check["ok"]]
    assert done.returncode == 0 and not wrong and found["checks"], (wrong, done.stdout[-3000:])
