"""A build that calibrates: the same bytes every time, killed or not; its folder; its record in the engine."""

from __future__ import annotations

import importlib.util
import json
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hf_folders import write_model
from killed_build import Forks, forks, options_of, options_with

from builders.cli import main as edge_build
from builders.pipeline import build
from builders.planner import Request
from builders.sensitivity import read_sensitivity
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.ops import Round
from edge_runtime.errors import BadConfig, Unsupported

pytest.importorskip("torch")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("calibrated") / "toy")


@pytest.fixture(scope="module")
def children() -> Iterator[Forks]:
    with forks() as found:
        yield found


def folder_of(engine: Path) -> Path:
    return engine.with_name(engine.name + ".calibration")


@pytest.fixture(scope="module")
def whole(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Engines of builds that nobody interrupted, in this process: of another hash seed than the children."""
    found = {}
    for words in ((), ("--auto",), ("--tune",)):
        engine = tmp_path_factory.mktemp("whole") / "m.edge"
        build(options_with(model, engine, *words))
        assert not folder_of(engine).exists()
        found["".join(words)] = engine.read_bytes()
    return found


@pytest.mark.parametrize(
    ("words", "step"),
    [((), 3), ((), 7), ((), 14), (("--auto",), 16), (("--auto",), 45), (("--auto",), 56), (("--tune",), 47)],
    ids=[
        "calibrating",
        "late in it",
        "quantizing",
        "measuring losses",
        "trying plans",
        "quantizing a mixed plan",
        "tuning",
    ],
)
def test_a_build_that_was_killed_goes_on_to_the_same_engine(
    model: Path, whole: dict[str, bytes], children: Forks, tmp_path: Path, words: tuple[str, ...], step: int
) -> None:
    engine = tmp_path / "m.edge"
    assert children.build(model, engine, step, *words) == -signal.SIGKILL
    assert not engine.exists()
    kept = {p: p.stat().st_mtime_ns for p in folder_of(engine).rglob("segment-*.safetensors")}
    assert kept or step < 4  # what was finished is on the disk
    if step > 40 and "--auto" in words:  # and so is what the plan was made by
        figures = (folder_of(engine) / "language" / "sensitivity-trials.jsonl").read_text()
        assert figures.count('"trial"') >= 4
    assert children.build(model, engine, 0, *words) == 0
    assert engine.read_bytes() == whole["".join(words)]
    assert not folder_of(engine).exists()


def test_the_engine_says_what_it_was_calibrated_on(model: Path, tmp_path: Path) -> None:
    options = options_of(model, tmp_path / "m.edge", auto=False)
    done = build(options)
    record = done.manifest.provenance.calibration
    assert record is not None and record.tokens == 4 * 32 and record.text.startswith("builtin-")
    rtn = build(replace(options, output=tmp_path / "r.edge", algorithm="rtn"))
    assert rtn.manifest.provenance.calibration is None and done.manifest.provenance.algorithm == "gptq"


def test_a_folder_of_the_users_stays_and_serves_the_next_build(model: Path, tmp_path: Path) -> None:
    options = options_of(model, tmp_path / "a.edge", auto=False)
    options = replace(options, calibration=replace(options.calibration, folder=tmp_path / "kept"))
    build(options)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("segment-*.safetensors")}
    again = replace(options, output=tmp_path / "b.edge", request=Request(weights="int3_g32"))
    build(again)
    assert files == {p: p.stat().st_mtime_ns for p in (tmp_path / "kept").rglob("segment-*.safetensors")}
    other = write_model(tmp_path / "other", seed=5)
    with pytest.raises(BadConfig, match=r"model\.safetensors"):
        build(replace(options, model=other))


def test_a_folder_that_another_build_left_here_is_no_obstacle(
    model: Path, children: Forks, tmp_path: Path
) -> None:
    engine = tmp_path / "m.edge"
    other = write_model(tmp_path / "other", seed=5)
    assert children.build(other, engine, 3) == -signal.SIGKILL
    assert folder_of(engine).exists()
    assert children.build(model, engine, 0) == 0
    assert not folder_of(engine).exists()


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_a_rotated_model_answers_the_same(model: Path, tmp_path: Path, algorithm: str) -> None:
    options = replace(options_of(model, tmp_path / "m.edge", auto=False), algorithm=algorithm, rotate=3)
    exact = build(replace(options, request=Request(weights="f32", kv_k="f32", kv_v="f32")))
    quality = exact.manifest.quality
    assert quality is not None
    assert quality.kl_mean < 1e-8 and quality.top1_agreement == 1.0
    assert min(quality.layer_cosine) > 1 - 1e-6  # measured in the checkpoint's own basis
    with read_engine(tmp_path / "m.edge") as engine:
        part = engine.manifest.parts["language"]
        assert part.origins == {}  # adapters know the weights as they were
        norms = [n for n in part.program.tensors if n.endswith("_norm") or n == "norm"]
        weights = engine.part("language").weights
        assert all(np.all(weights[n].planes["w"].view(np.float32) == 1.0) for n in norms)


@pytest.mark.parametrize("algorithm", ["rtn", "smoothquant"])
@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
def test_activations_are_rounded_with_scales_of_the_token_or_of_the_calibration(
    model: Path, tmp_path: Path, algorithm: str, kind: str
) -> None:
    plain = replace(options_of(model, tmp_path / "m.edge", auto=False), algorithm=algorithm)
    plain = replace(plain, request=Request(weights="int8_row"))
    kl = {}
    for name, changes in {
        "none": {},
        "dynamic": {"activations": kind},
        "static": {"activations": kind, "static_scales": True},
    }.items():
        done = build(replace(plain, output=tmp_path / f"{name}.edge", **changes))
        assert done.manifest.quality is not None and done.manifest.known_answer is not None
        kl[name] = done.manifest.quality.kl_mean
        ops = done.manifest.parts["language"].program.ops
        scales = [op.scale for op in ops if isinstance(op, Round)]
        assert len(scales) == (0 if name == "none" else 8)  # four groups of linears in each of two layers
        assert all((scale is not None) == (name == "static") for scale in scales)
    assert kl["none"] < kl["dynamic"] < 0.05 and kl["none"] < kl["static"] < 0.1


def test_static_scales_need_something_to_scale(model: Path, tmp_path: Path) -> None:
    options = replace(options_of(model, tmp_path / "m.edge", auto=False), static_scales=True)
    with pytest.raises(BadConfig, match="--activations"):
        build(options)


def test_what_cannot_be_combined_is_refused(model: Path, tmp_path: Path) -> None:
    options = replace(options_of(model, tmp_path / "m.edge", auto=False), rotate=3)
    with pytest.raises(BadConfig, match="kept as they are"):
        build(replace(options, request=Request(weights="keep")))
    with pytest.raises(Unsupported, match="cuda"):
        build(replace(options, calibration=replace(options.calibration, device="cuda")))


def test_a_mixed_plan_leaves_what_it_was_made_by(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "json"
    build(replace(options_of(model, tmp_path / "m.edge", auto=True), keep_json=kept))
    found = read_sensitivity(kept / "sensitivity.json")
    plan = json.loads((kept / "plan.json").read_text())
    chosen = {n: t["format"] for n, t in plan["language"]["tensors"].items()}
    assert {f for losses in found.losses.values() for f in losses} == {"int8_g64", "int4_g32", "int3_g32"}
    assert {chosen[n] for n in found.losses} <= {"int8_g64", "int4_g32", "int3_g32"}
    assert "explanation" in plan
    if importlib.util.find_spec("matplotlib") is not None:
        assert (kept / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    # The file alone gives another build the same plan
    again = replace(options_of(model, tmp_path / "again.edge", auto=True), algorithm="rtn", sensitivity=found)
    done = build(again)
    assert {n: t.format for n, t in done.manifest.parts["language"].plan.tensors.items()} == chosen
    # but not one of other weights, though its tensors have the same names
    with pytest.raises(BadConfig, match="was measured on other weights than this model's"):
        build(replace(again, model=write_model(tmp_path / "other", seed=9)))


def test_the_command_line_calibrates(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("the robot opens the door and looks around the room for a cup. " * 40)
    engine = tmp_path / "m.edge"
    words = ["--profile", "cpu", "--weights", "int3_g32", "--algorithm", "gptq", "--calibration", str(text)]
    words += ["--samples", "6", "--sample-tokens", "40", "--observer", "mse", "--json", "-o", str(engine)]
    assert edge_build([*words, str(model)]) == 0
    with read_engine(engine) as found:
        provenance = found.manifest.provenance
    assert provenance.calibration is not None and provenance.calibration.text == "notes.txt"
    assert provenance.recipe["calibration"] == "notes.txt" and provenance.recipe["algorithm"] == "gptq"
    assert "calibrated on" not in capsys.readouterr().err
    assert edge_build([*words, "--samples", "500", str(model)]) == 0
    assert "of 500 windows of 40 tokens: notes.txt gives no more" in capsys.readouterr().err
    assert edge_build([*words, "--sample-tokens", "4000", str(model)]) == 1
    assert "--sample-tokens" in capsys.readouterr().err
