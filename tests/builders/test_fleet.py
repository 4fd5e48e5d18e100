"""Fleets in real processes: what is built, skipped, failed and killed; and on a real local Ray."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import yaml
from hf_folders import llama_config, write_model

from builders import fleet_crews
from builders.cli import main, make_parser
from builders.fleet import _startable, build_fleet
from builders.fleet_crews import Processes
from builders.fleet_file import Cell, read_fleet
from builders.watcher import Watcher

ROOT = Path(__file__).resolve().parents[2]
Captured = pytest.CaptureFixture[str]


def write_fleet(folder: Path, **changes: Any) -> Path:
    """Two tiny models for two devices; `changes` replace keys of the file."""
    for seed, name in enumerate(("ant", "bee")):
        if not (folder / name).exists():
            write_model(folder / name, seed=seed)
    data = {
        "output": "out",
        "models": ["ant", "bee"],
        "profiles": ["cpu", "orin-nano-8gb"],
        "options": {"weights": "int4_g32", "eval-tokens": 64},
    }
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(data | changes))
    return path


def empty_model(folder: Path) -> None:
    """A model that there is, and that cannot be built: names are proved before any cell, contents are not."""
    (folder / "nobody").mkdir()


def run(path: Path, capsys: Captured, *words: str, code: int = 0) -> dict[str, Any]:
    """Row by name of a fleet built by the command."""
    assert main(["--matrix", str(path), "--json", *words]) == code
    captured = capsys.readouterr()
    found: dict[str, Any] = json.loads(captured.out)
    written = json.loads((path.parent / "out" / "results.json").read_text())
    assert {k: v for k, v in found.items() if k != "error"} == written
    return {row["name"]: row for row in found["rows"]}


@pytest.fixture(scope="module")
def server() -> Iterator[BaseContext]:
    """Of a fresh process that has imported what cells need, and forks for each."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["builders.fleet_cell", "builders.calibrate", "builders.quantize.gptq"])
    yield context
    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@pytest.fixture
def forked(server: BaseContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells are forks; in the other tests each is spawned anew, as it is for users."""
    monkeypatch.setattr(fleet_crews.multiprocessing, "get_context", lambda method: server)


@pytest.mark.usefixtures("forked")
def test_a_fleet_is_built_and_then_left_alone(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox " * 20)
    options = {"weights": "int4_g32", "eval-tokens": 64, "eval": "text.txt", "no-device-code": True}
    path = write_fleet(tmp_path, options=options)
    rows = run(path, capsys, "--jobs", "2")
    assert list(rows) == ["ant-cpu", "ant-orin-nano-8gb", "bee-cpu", "bee-orin-nano-8gb"]
    assert all(r["status"] == "built" and r["exit_code"] == 0 for r in rows.values())
    # each is the engine that the plain command makes
    plain = ["--profile", "cpu", "--weights", "int4_g32", "--eval-tokens", "64", "--no-device-code", "--json"]
    plain += ["--eval", str(tmp_path / "text.txt"), "-o", str(tmp_path / "plain.edge"), str(tmp_path / "bee")]
    assert main(plain) == 0
    alone = json.loads(capsys.readouterr().out)
    assert (tmp_path / "plain.edge").read_bytes() == (tmp_path / "out" / "bee-cpu.edge").read_bytes()
    row = rows["bee-cpu"]
    assert row["bytes"] == alone["bytes"] and row["kl_mean"] == alone["quality"]["kl_mean"]
    assert row["need"] == alone["plan"]["memory"]["need"] and row["weights"] == "int4_g32"
    quality = alone["quality"]
    rise = 100 * (quality["perplexity"] / quality["perplexity_f32"] - 1)
    assert row["ppl_increase"] == pytest.approx(rise) and row["accuracy"] is None

    def times() -> dict[str, int]:
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.edge")}

    before = times()
    again = run(path, capsys, "--jobs", "2")
    assert all(r["status"] == "unchanged" for r in again.values()) and times() == before
    for name, row in again.items():
        assert {k: v for k, v in row.items() if k not in ("status", "seconds")} == {
            k: v for k, v in rows[name].items() if k not in ("status", "seconds")
        }
    # other weights: that model alone; another text: all; a damaged engine: that one
    write_model(tmp_path / "ant", seed=7)
    assert [r["status"] for r in run(path, capsys, "--jobs", "2").values()] == ["built"] * 2 + [
        "unchanged"
    ] * 2
    (tmp_path / "text.txt").write_text("a lazy dog sleeps " * 20)
    assert [r["status"] for r in run(path, capsys, "--jobs", "2").values()] == ["built"] * 4
    engine = tmp_path / "out" / "bee-cpu.edge"
    engine.write_bytes(engine.read_bytes()[:-64])
    assert [r["status"] for r in run(path, capsys).values()] == [*["unchanged"] * 2, "built", "unchanged"]


@pytest.mark.usefixtures("forked")
def test_one_failed_cell_stops_no_other_and_the_worst_code_counts(tmp_path: Path, capsys: Captured) -> None:
    empty_model(tmp_path)
    path = write_fleet(
        tmp_path,
        models=["ant", "nobody"],
        profiles=["cpu"],
        variants={"good": {}, "strict": {"max-kl": 0}},
    )
    rows = run(path, capsys, "--jobs", "2", code=3)
    assert {name: (r["status"], r["exit_code"]) for name, r in rows.items()} == {
        "ant-cpu-good": ("built", 0),
        "ant-cpu-strict": ("failed", 3),
        "nobody-cpu-good": ("failed", 1),
        "nobody-cpu-strict": ("failed", 1),
    }
    strict = rows["ant-cpu-strict"]
    assert strict["error"].startswith("QualityLimit: KL to f32 is") and strict["engine"] is None
    assert (
        strict["kl_mean"] == rows["ant-cpu-good"]["kl_mean"]
    )  # what was measured is in the table all the same
    assert "nobody has no config.json" in rows["nobody-cpu-good"]["error"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "ant-cpu-good.edge",
        "logs",
        "results.json",
        "results.md",
    ]
    log = (tmp_path / "out" / "logs" / "ant-cpu-strict.log").read_text()
    assert "quantize" in log and "error: KL to f32 is" in log
    markdown = (tmp_path / "out" / "results.md").read_text()
    assert "| ant | cpu | good | int4_g32 |" in markdown and "failed (3)" in markdown
    # --force writes the one that breaks a limit, and builds the one that is there
    assert main(["--matrix", str(path), "--force", "--jobs", "2"]) == 1
    captured = capsys.readouterr()
    assert "ant-cpu-strict: written by --force although KL to f32 is" in captured.out
    assert "2 of 4 engines were not built: nobody-cpu-good, nobody-cpu-strict" in captured.err
    # and without it that engine is no good one, so it is not taken for unchanged
    rows = run(path, capsys, "--jobs", "2", code=3)
    assert [r["status"] for r in rows.values()] == ["unchanged", "failed", "failed", "failed"]


@pytest.mark.usefixtures("forked")
def test_cells_of_one_calibration_share_it(tmp_path: Path, capsys: Captured) -> None:
    """Two devices at once on one folder: the second finds the statistics there; the bytes are the same."""
    pytest.importorskip("torch")
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over a lazy dog " * 20)
    options = {
        "weights": "int4_g32",
        "no-eval": True,
        "algorithm": "gptq",
        "calibration": "text.txt",
        "samples": 4,
        "sample-tokens": 32,
        "no-device-code": True,
    }
    path = write_fleet(tmp_path, models=["ant"], options=options)
    rows = run(path, capsys, "--jobs", "2")
    assert [r["status"] for r in rows.values()] == ["built", "built"]
    (folder,) = (tmp_path / "out" / "calibrations").iterdir()
    words = [f"--{k}={v}" for k, v in options.items() if k != "calibration" and v is not True]
    words += ["--no-eval", "--no-device-code", "--calibration", str(tmp_path / "text.txt")]
    words += ["--profile", "cpu", "--json"]
    assert main([*words, "-o", str(tmp_path / "plain.edge"), str(tmp_path / "ant")]) == 0
    assert (tmp_path / "plain.edge").read_bytes() == (tmp_path / "out" / "ant-cpu.edge").read_bytes()
    capsys.readouterr()
    done = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and p.name != "lock"}
    assert done
    rows = run(path, capsys, "--jobs", "2", "--force")
    assert [r["status"] for r in rows.values()] == ["built", "built"]
    assert {p: p.stat().st_mtime_ns for p in done} == done  # nothing was calibrated again
    (tmp_path / "text.txt").write_text("sphinx of black quartz judge my vow " * 20)
    rows = run(path, capsys, "--jobs", "2")
    assert [r["status"] for r in rows.values()] == ["built", "built"]
    assert len(list(folder.parent.iterdir())) == 2  # of the other text in a folder of its own


def test_a_cell_that_is_killed_stops_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_fleet(tmp_path, profiles=["cpu"])
    start = Processes.start

    def start_and_kill(self: Processes, cell: Cell, force: bool, log: Path) -> None:
        start(self, cell, force, log)
        if cell.model == "ant":
            pid = self._running[-1].process.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(Processes, "start", start_and_kill)
    heard: list[str] = []

    class Hearing(Watcher):
        def step(self, what: str) -> None:
            heard.append(what)

    fleet = read_fleet(path, make_parser)
    ant, bee = build_fleet(fleet, force=False, jobs=2, ray=None, watcher=Hearing())
    assert (ant.status, ant.exit_code) == ("failed", 1)
    assert ant.error == "its process was killed by SIGKILL before it was done"
    assert bee.status == "built" and fleet.cells[1].target.is_file()
    assert sorted(heard) == ["ant-cpu: failed", "bee-cpu: built"]


def test_an_interrupt_ends_every_process_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    config = llama_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    write_model(tmp_path / "ant", config)
    # Enough to measure that the interrupt comes before the end, however busy the machine is
    (tmp_path / "long.txt").write_text("the robot goes to the door and back again. " * 4000)
    options = {"weights": "int4_g32", "eval": "long.txt", "eval-tokens": 150_000, "context": 128}
    path = write_fleet(tmp_path, models=["ant"], profiles=["cpu"], options=options)
    log = tmp_path / "out" / "logs" / "ant-cpu.log"
    env = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "builders.cli", "--matrix", str(path), "--jobs", "1"]
    parent = subprocess.Popen(
        command,
        env=env,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # A test run in the background has it ignored, and a child inherits that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until = time.monotonic() + 120
        while not (log.is_file() and "quantize" in log.read_text()) and time.monotonic() < until:
            assert parent.poll() is None
            time.sleep(0.01)
        os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to the parent and all its children
        _, said = parent.communicate(timeout=60)
    finally:
        parent.kill()
    assert parent.returncode == 130 and "interrupted" in said
    assert gone(parent.pid)
    assert not list((tmp_path / "out").glob(".*"))


def gone(group: int) -> bool:
    """Whether nobody of a process group is left, in the end: multiprocessing's own helper ends last."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False


def cell(name: str, calibration: str | None) -> Cell:
    folder = None if calibration is None else Path(calibration)
    return Cell(name, "m", "cpu", "", (), Path(f"{name}.edge"), folder)


def test_cells_of_one_calibration_never_run_together() -> None:
    a, b, c, d = cell("a", "x"), cell("b", "x"), cell("c", None), cell("d", None)
    assert _startable([a, b, c, d], [], 3) == [a, c, d]
    assert _startable([a, b, c, d], [], 2) == [a, c]
    assert _startable([b, d], [a, c], 3) == [d]
    assert _startable([b], [c], 2) == [b]
    assert _startable([b, d], [a, c], 2) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "--jobs is 0, expected at least 1"),
        (["--weights", "f16", "m"], "MODEL, --weights cannot stand beside --matrix; write it in fleet.yaml"),
    ],
)
def test_mistakes_exit_1(words: list[str], message: str, tmp_path: Path, capsys: Captured) -> None:
    assert main(["--matrix", str(write_fleet(tmp_path)), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_misspelt_value_costs_no_cell(tmp_path: Path, capsys: Captured) -> None:
    path = write_fleet(tmp_path, profiles=["cpu", "orin-nona-8gb"])
    assert main(["--matrix", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: fleet.yaml: profiles[1]: no profile named 'orin-nona-8gb': did you mean")
    assert said.count("\n") == 1 and not (tmp_path / "out").exists()


def test_jobs_need_a_matrix(capsys: Captured) -> None:
    for words in (["--jobs", "2"], ["--ray"]):
        assert main(words) == 1
        assert "--jobs and --ray need --matrix" in capsys.readouterr().err


# --- Ray --------------------------------------------------------------------------------------------------


def test_ray_builds_the_same_engines(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install -c constraints.txt -e '.[fleet]'")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    empty_model(tmp_path)
    path = write_fleet(tmp_path, models=["ant", "nobody"])
    by_ray = run(path, capsys, "--ray", "--jobs", "2", code=1)
    assert [r["status"] for r in by_ray.values()] == ["built", "built", "failed", "failed"]
    assert "nobody has no config.json" in by_ray["nobody-cpu"]["error"]
    engine = tmp_path / "out" / "ant-cpu.edge"
    data = engine.read_bytes()
    engine.unlink()
    by_process = run(path, capsys, code=1)
    assert [r["status"] for r in by_process.values()] == ["built", "unchanged", "failed", "failed"]
    assert engine.read_bytes() == data


def test_a_cluster_that_is_not_there_is_named(tmp_path: Path, capsys: Captured) -> None:
    pytest.importorskip("ray", reason="needs ray: pip install -c constraints.txt -e '.[fleet]'")
    assert main(["--matrix", str(write_fleet(tmp_path)), "--ray", "127.0.0.1:1"]) == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in capsys.readouterr().err


def test_without_ray_the_extra_is_named(
    tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["--matrix", str(write_fleet(tmp_path)), "--ray"]) == 1
    assert "pip install 'edge-runtime[fleet]'" in capsys.readouterr().err
