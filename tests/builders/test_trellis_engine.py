"""Engines whose matrices, tied embedding included, are in trellis formats."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hf_folders import write_model

pytest.importorskip("torch")

from builders import trellis
from builders.cli import main as edge_build
from builders.device_formats import precision
from edge_runtime import open_engine

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("trellis") / "toy")


def built(model: Path, engine: Path, capsys: Captured, *words: str) -> dict[str, object]:
    argv = ["--profile", "cpu", "--samples", "4", "--sample-tokens", "32", "--eval-tokens", "256"]
    code = edge_build([*argv, *words, "--json", "-o", str(engine), str(model)])
    out, err = capsys.readouterr()
    assert code == 0, err
    found: dict[str, object] = json.loads(out)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_kernels_lose_as_much_as_the_values_do(
    model: Path, tmp_path: Path, capsys: Captured, bits: int
) -> None:
    """KL by the cpu backend's kernels, whose activations are int8, beside KL by the decoded values."""
    name, engine = f"tcq{bits}_g64", tmp_path / "m.edge"
    words = ("--algorithm", "gptq", "--weights", name, "--head-weights", name)
    lost = []
    for backend in ("reference", "native"):
        quality = built(model, engine, capsys, *words, "--eval-backend", backend)["quality"]
        assert isinstance(quality, dict)
        lost.append(quality["kl_mean"])
    assert lost[0] > 0 and lost[1] == pytest.approx(lost[0], rel=0.1, abs=1e-4)
    with open_engine(str(engine), backend="cpu") as session:
        tensors = session.manifest.parts["language"].program.tensors
        matrices = {n for n, spec in tensors.items() if spec.rows > 1}
        assert {session.plan.tensors[n].format for n in matrices} == {name}
        assert len([event.token for event in session.generate([1, 5, 9, 2], max_tokens=6)]) >= 6


def test_fewer_bits_lose_more_and_less_than_integers_do(
    model: Path, tmp_path: Path, capsys: Captured
) -> None:
    lost = {}
    for name in ("tcq4_g64", "tcq2_g64", "int4_g64", "int2_g64"):
        made = built(model, tmp_path / "m.edge", capsys, "--weights", name, "--head-weights", name)
        quality = made["quality"]
        assert isinstance(quality, dict)
        lost[name] = quality["kl_mean"]
    assert lost["tcq4_g64"] < lost["tcq2_g64"]
    assert lost["tcq4_g64"] < lost["int4_g64"] and lost["tcq2_g64"] < lost["int2_g64"]


def test_how_rows_matter_is_found_and_used(
    model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for a calibration, for trellis formats and algorithms that are calibrated."""
    folder, engine = tmp_path / "calibration", tmp_path / "m.edge"
    kept = folder / "language" / "row-importance.safetensors"
    words = ("--algorithm", "gptq", "--calibration-folder", str(folder), "--head-weights", "int8_row")
    built(model, engine, capsys, *words, "--weights", "int4_g64")
    built(model, engine, capsys, "--weights", "tcq3_g64", "--calibration-folder", str(folder))
    assert not kept.exists()
    built(model, engine, capsys, *words, "--weights", "tcq3_g64")
    assert kept.is_file()
    weighted = engine.read_bytes()
    monkeypatch.setattr(trellis, "row_roots", lambda importance: None)
    built(model, engine, capsys, *words, "--weights", "tcq3_g64")
    assert engine.read_bytes() != weighted
    # a build's own folder goes with all that was in it
    built(model, engine, capsys, "--algorithm", "gptq", "--weights", "tcq3_g64")
    assert {p.name for p in tmp_path.iterdir()} == {"calibration", "m.edge"}


def test_channel_scales_are_known_to_the_rows(model: Path, tmp_path: Path, capsys: Captured) -> None:
    words = ("--algorithm", "awq+gptq", "--weights", "tcq3_g64")
    for feedback in ((), ("--feedback",)):
        built(model, tmp_path / "m.edge", capsys, *words, *feedback)


def test_devices_without_kernels_for_them_say_so(model: Path, tmp_path: Path, capsys: Captured) -> None:
    argv = ["--profile", "orin", "--weights", "tcq4_g64", "-o", str(tmp_path / "m.edge"), str(model)]
    assert edge_build(argv) == 1
    assert "profile 'orin-agx-64gb' has no tcq; it runs: int8_row" in capsys.readouterr().err


def test_all_widths_are_one_precision() -> None:
    assert {precision(f"tcq{bits}_g64") for bits in (2, 3, 4)} == {"tcq"}


def test_the_same_bytes_twice(model: Path, tmp_path: Path, capsys: Captured) -> None:
    engines = [tmp_path / "a.edge", tmp_path / "b.edge"]
    for engine in engines:
        built(model, engine, capsys, "--algorithm", "gptq", "--weights", "tcq3_g64")
    assert np.array_equal(*(np.frombuffer(e.read_bytes(), np.uint8) for e in engines))
