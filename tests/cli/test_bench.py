"""edge-bench: the rows that were asked for, medians that are medians, a plot that is a plot."""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path

import pytest
from speaking_engine import write_speaking

from edge_runtime import open_engine
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.cli import bench

QUICK = ("--backend", "reference", "--repeat", "3")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "speaking.edge"
    write_speaking(path)
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = bench.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_json_has_a_row_for_each_length_and_depth(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompts", "4,20", "--depths", "2,30", "--decode", "5")
    code, out, _ = call(capsys, engine, *QUICK, *options, "--json")
    assert code == 0
    data = json.loads(out)
    assert [(r["kind"], r["depth"], r["tokens"]) for r in data["rows"]] == [
        ("prefill", 0, 4), ("prefill", 0, 20), ("decode", 2, 5), ("decode", 30, 5),
    ]  # fmt: skip
    for row in data["rows"]:
        assert len(row["seconds"]) == 3 and all(s > 0 for s in row["seconds"])
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / statistics.median(row["seconds"]))
        assert row["slowest_tokens_per_s"] <= row["tokens_per_s"] <= row["fastest_tokens_per_s"]
    assert data["predicted_decode_tokens_per_s"] == 100.0 and data["backend"] == "reference"


def test_seconds_are_those_of_the_steps(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ReferenceExecutor.forward

    def slow(self: ReferenceExecutor, batch: StepBatch) -> object:
        time.sleep(0.02)
        return forward(self, batch)

    monkeypatch.setattr(ReferenceExecutor, "forward", slow)
    with open_engine(engine, backend="reference") as session:
        rows = bench.measure(session, [4, 40], [3], 6, 1)
    # 4 tokens are one step, 40 are three of at most 16; 6 decoded tokens are six
    for row, steps in zip(rows, (1, 3, 6), strict=True):
        assert 0.02 * steps <= row.seconds[0] < 0.02 * steps + 2.0


def test_the_table_names_engine_backend_and_prediction(
    engine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = call(capsys, engine, *QUICK, "--decode", "4")
    assert code == 0
    assert out.startswith("speaking on reference, KV int8,int8, median of 3")
    assert "100.0 tokens/s decode predicted" in out and out.count("\ndecode") == 2


def test_plot(engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    code, _, _ = call(capsys, engine, *QUICK, "--decode", "4", "--plot", tmp_path / "speed.svg")
    drawn = (tmp_path / "speed.svg").read_text()
    assert code == 0 and drawn.rstrip().endswith("</svg>") and "<!-- speaking on reference -->" in drawn


def test_plot_without_matplotlib_is_refused_before_measuring(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "measure", lambda *a: pytest.fail("measured"))
    code, out, err = call(capsys, engine, *QUICK, "--plot", "speed.svg")
    assert (code, out) == (1, "") and "pip install 'edge-runtime[plot]'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "which engine file?"),
        (("--prompts", "64"), "--prompts 64: expected 1 to 63"),
        (("--prompts", "a"), "expected numbers such as 64,512"),
        (("--depths", "40"), "--depths 40: expected 0 to 31"),
        (("--decode", "63"), "--decode 63: expected 1 to 62"),
        (("--repeat", "0"), "--repeat 0: expected 1 to 1000"),
        (("--plot", "speed.gif"), "ends in .svg or .png"),
        (("--threads", "-1"), "threads is -1"),
    ],
)
def test_mistakes(
    engine: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    words = (engine, "--backend", "reference", *argv) if argv else ()
    code, out, err = call(capsys, *words)
    assert (code, out) == (1, "") and message in err


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--profiles")
    assert code == 0 and "thor-t5000" in out
