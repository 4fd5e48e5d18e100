"""A build that a quality limit stops writes nothing, and shows what it measured, to choose formats by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hf_folders import write_model

from builders.cli import main
from builders.limits import report_of
from edge_runtime.errors import QualityLimit

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("limits") / "toy")


def command(model: Path, target: Path, *more: str) -> list[str]:
    fixed = ["--profile", "cpu", "--weights", "int4_g32", "--eval-tokens", "64", "-o", str(target)]
    return [*fixed, *more, str(model)]


def test_the_quality_report_stands_beside_the_error(model: Path, tmp_path: Path, capsys: Captured) -> None:
    """The same as of an engine that --force writes."""
    target = tmp_path / "m.edge"
    found: list[dict[str, Any]] = []
    for force, code in (([], 3), (["--force"], 0)):
        assert main(command(model, target, "--max-kl", "0", "--json", *force)) == code
        assert target.exists() == (code == 0)
        found.append(json.loads(capsys.readouterr().out))
    stopped, forced = found
    assert set(stopped) == {"quality", "error"} and stopped["error"]["type"] == "QualityLimit"
    assert stopped["quality"] == forced["quality"]
    assert stopped["quality"]["kl_mean"] > 0 and len(stopped["quality"]["sqnr_db"]) > 5
    assert stopped["quality"]["broken"][0] in stopped["error"]["message"]


def test_people_see_figures_and_worst_tensors_too(model: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(command(model, tmp_path / "m.edge", "--max-kl", "0")) == 3
    captured = capsys.readouterr()
    for word in ("perplexity", "KL to f32", "same top token", "lowest cosine", "lowest SQNR", " dB  layers."):
        assert word in captured.out
    assert "error: KL to f32 is" in captured.err and "nothing was written" in captured.err
    assert not list(tmp_path.iterdir())


def test_an_error_of_elsewhere_has_no_report() -> None:
    assert report_of(QualityLimit("worse")) is None
