"""`make gpu-check` from end to end on the fake GPU, tiny: its scripts are proven where there is no GPU."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from emulation import ROOT, compiler

SCRIPT = ROOT / "bench" / "gpu_check.py"
sys.path.append(str(ROOT / "bench"))


def run(work: Path, *args: str, emulated: bool = True, **settings: str) -> tuple[int, str, dict[str, Any]]:
    """(exit code, output, results or {})"""
    environment = {**os.environ, "EDGE_GPU_CHECK_WORK": str(work), **settings}
    environment.pop("PYTHONPATH", None)  # straight from the checkout
    if emulated:
        compiler()
        environment["EDGE_GPU_CHECK_EMULATED"] = "1"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *args], capture_output=True, text=True, cwd=work, env=environment
    )
    found = sorted(work.glob("fake-gpu-*.json"))
    return done.returncode, done.stdout + done.stderr, json.loads(found[0].read_text()) if found else {}


def test_every_part_runs_and_says_what_it_found(tmp_path: Path) -> None:
    code, text, results = run(tmp_path)
    assert code == 0, text
    from gpu_check import PARTS

    assert list(results["parts"]) == list(PARTS)
    assert {part["state"] for part in results["parts"].values()} == {"ran"}
    assert results["emulated"] and results["machine"]["gpu"] == "Fake GPU" and results["commit"]
    checks = [c for part in results["parts"].values() for c in part["checks"]]
    assert len(checks) > 15 and all(c["ok"] for c in checks)
    figures = {f["name"]: f for part in results["parts"].values() for f in part["figures"]}
    assert all(f["value"] >= 0 and f["unit"] for f in figures.values())
    for wanted in (
        "decode tuned, token by token: of the floor",
        "int4_g64 32x128, 1 token: of the copy",
        "KV int4 at 300: times faster than f16",
    ):
        assert {"goal", "met"} <= set(figures[wanted]), wanted
    assert any(re.search("linear_(split1|deep)_int4_g64 128x64", name) for name in figures)  # time by kind
    assert any("compute-sanitizer" in note for note in results["parts"]["sanitizer"]["notes"])
    table = next(tmp_path.glob("fake-gpu-*.md")).read_text()
    assert all(f"| {name} | ran |" in table for name in PARTS) and "NOT met" in table


def test_a_fault_ends_a_part_and_not_the_others(tmp_path: Path) -> None:
    code, text, results = run(
        tmp_path, "--parts", "copy,exactness,copy", EDGE_FAKE_FAIL="cuLaunchKernel:40:700"
    )
    assert code == 1
    parts = results["parts"]
    assert parts["copy"]["state"] == "ran" and parts["copy"]["figures"]
    wrong = [c for c in parts["exactness"]["checks"] if not c["ok"]]
    assert wrong and "CUDA_ERROR_ILLEGAL_ADDRESS" in wrong[0]["detail"], text
    assert "WRONG" in next(tmp_path.glob("fake-gpu-*.md")).read_text()


def test_a_part_that_finds_no_time_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gpu_check

    clock = [0.0]
    taking = {"probe": 1.0, "copy": 50.0, "decode": 30.0, "attention": 1.0}  # s

    def part(name: str, limit: float, environment: dict[str, str]) -> dict[str, Any]:
        clock[0] += taking[name]
        return {"state": "ran", "seconds": taking[name], "machine": {"gpu": "Fake GPU"}}

    monkeypatch.setattr(gpu_check, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(gpu_check, "_run", part)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path)
    assert gpu_check.check(["copy", "decode", "attention"], 86.0, {}) == 0
    results = json.loads(next(tmp_path.glob("fake-gpu-*.json")).read_text())
    states = {name: part["state"] for name, part in results["parts"].items()}
    assert states == {"probe": "ran", "copy": "ran", "decode": "ran", "attention": "not run: time"}
    assert "attention: not run: time" in capsys.readouterr().out


def test_pieces_of_a_part_that_find_no_time_are_said(tmp_path: Path) -> None:
    from gpu_report import Report

    done: list[str] = []
    report = Report("decode", tmp_path / "part.json", time.monotonic() + 1000.0)
    report.each({"load": lambda: done.append("load")}, 10.0)
    report.each({name: lambda: done.append("late") for name in ("first token", "tuning")}, 2000.0)
    assert done == ["load"]
    assert json.loads((tmp_path / "part.json").read_text())["notes"] == ["not run: time: first token, tuning"]


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, text, _ = run(tmp_path, "--parts", "copy", emulated=False, CUDA_VISIBLE_DEVICES="")
    assert code == 2
    assert "not run on a GPU" in text
    assert not list(tmp_path.glob("*-20*.json"))


def test_unknown_parts_are_refused(tmp_path: Path) -> None:
    code, text, _ = run(tmp_path, "--parts", "cpoy")
    assert code == 2 and "unknown part 'cpoy'" in text


def test_missing_packages_come_from_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_wheels

    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    tag = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    files = {
        "edgeabsent-1.0-py3-none-any.whl": {"edgeabsent/__init__.py": "", "a-1.dist-info/WHEEL": ""},
        "numpy-0.1-py3-none-any.whl": {"numpy/__init__.py": "", "n-0.1.dist-info/WHEEL": ""},
        f"other-1.0-{tag}-{tag}-win_amd64.whl": {"otherabsent.py": ""},
        "older-1.0-cp36-cp36m-manylinux2014_x86_64.whl": {"olderabsent.py": ""},
    }  # fmt: skip
    for name, content in files.items():
        with zipfile.ZipFile(wheels / name, "w") as packed:
            for path, text in content.items():
                packed.writestr(path, text)
    assert gpu_wheels.unpack_missing(wheels, site) == ["edgeabsent-1.0-py3-none-any.whl"]
    assert not (site / "numpy").exists()  # what is there stays what it is
    monkeypatch.syspath_prepend(str(site))
    assert gpu_wheels.missing({"edgeabsent": "", "otherabsent": "", "numpy": ""}) == ["otherabsent"]
    with pytest.raises(FileNotFoundError, match="does not exist"):
        gpu_wheels.unpack_missing(tmp_path / "none", site)


def test_wheels_fit_by_their_tags() -> None:
    from gpu_wheels import fits

    version = f"{sys.version_info[0]}{sys.version_info[1]}"
    machine = os.uname().machine
    assert fits("a-1-py3-none-any.whl")
    assert fits("a-1-py2.py3-none-any.whl")
    assert fits(f"a-1-cp{version}-cp{version}-manylinux_2_17_{machine}.manylinux2014_{machine}.whl")
    assert fits(f"a-1-cp39-abi3-manylinux_2_17_{machine}.whl")
    assert not fits(f"a-1-cp399-abi3-manylinux_2_17_{machine}.whl")
    assert not fits(f"a-1-cp{version}-cp{version}-macosx_11_0_arm64.whl")
    assert not fits("a-1-cp27-cp27mu-manylinux1_x86_64.whl")


def test_shares_are_of_what_was_measured_in_the_same_run() -> None:
    from gpu_ratios import combine
    from gpu_sizes import SIZES

    prompt = SIZES.prompt
    results: dict[str, Any] = {
        "parts": {
            "matrices": {"matrices": {f"int4_g64 4096x4096 {prompt}": 200.0, "int4_g64 4096x4096 1": 4.0}},
            "peers": {"bf16_tflops": 700.0, "matrices": {"bf16 4096x4096 1": 12.0}},
            "decode": {"prefill_tflops": 350.0},
        }
    }
    combine(results)
    found = {f["name"]: f for f in results["parts"]["ratios"]["figures"]}
    share = found[f"int4_g64 4096x4096, {prompt} tokens: of torch's bf16 rate"]
    assert share["value"] == pytest.approx(100 * 2 * 4096**2 * prompt / 200e-6 / 700e12, rel=1e-3)
    assert share["met"] == (share["value"] >= 40)
    assert found["int4_g64 4096x4096, 1 tokens: times faster than torch bf16"]["value"] == 3.0
    assert found[f"whole prompt of {prompt}: of torch's bf16 rate"]["value"] == 50.0
    empty: dict[str, Any] = {"parts": {"matrices": {}}}
    combine(empty)
    assert "ratios" not in empty["parts"]
