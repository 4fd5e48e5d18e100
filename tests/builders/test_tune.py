"""End-to-end tuning: less divergence on text that it did not learn from, the same on any cores, resumable."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch_cases import SMALL, VOCAB
from hf_folders import write_model
from killed_build import options_of
from made_weights import MadeWeights, logits_of, made_weights

from builders import pipeline
from builders.calibrating import CalibrationRequest
from builders.cli import main as edge_build
from builders.corpus import CorpusOptions
from builders.planner import Request
from builders.watcher import Watcher
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.errors import BadConfig, BuildError, NumericError

torch = pytest.importorskip("torch")
tune_module = pytest.importorskip("builders.tune")
tuning = pytest.importorskip("builders.tuning")
TuneOptions, tune = tune_module.TuneOptions, tune_module.tune
WINDOWS = np.random.default_rng(3).integers(3, VOCAB, (160, 32)).astype(np.int32)
CONFIG = {"model_type": "llama", **SMALL}
TIED = {"model_type": "qwen3", **SMALL, "head_dim": 8, "tie_word_embeddings": True}


def rounded(weights: MadeWeights, fmt: str) -> tuple[dict[str, Any], dict[str, dict[str, Array]]]:
    """(formats, planes) of a model: matrices and tables in `fmt`, vectors as they are; nearest values."""
    formats = {
        n: get_format("f32" if s.role == "vector" else fmt) for n, s in weights.program.tensors.items()
    }
    return formats, {name: f.encode(weights(name)) for name, f in formats.items()}


def tuned(weights: MadeWeights, fmt: str, folder: Path, steps: int = 30, **more: Any) -> Any:
    formats, planes = rounded(weights, fmt)
    options = TuneOptions(steps, cores=more.pop("cores", 1))
    return tune(weights, weights.program, planes, formats, WINDOWS, folder, options, **more)


def divergence(exact: MadeWeights, values: dict[str, Array], windows: Array) -> float:
    """Mean KL of two models by the numpy reference, in f64."""

    def log_probability(weights: MadeWeights) -> Array:
        z = logits_of(weights, windows).astype(np.float64)
        z -= z.max(-1, keepdims=True)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    want = log_probability(exact)
    got = log_probability(MadeWeights(exact.program, values))
    return float((np.exp(want) * (want - got)).sum(-1).mean())


@pytest.mark.parametrize(
    ("fmt", "tied", "steps"),
    [
        ("int3_g32", False, 40),
        ("int3_g32", True, 40),
        ("nf4_g64_dq", True, 40),
        ("int4_g32_zp", False, 40),
        ("q2_k", True, 60),
        ("tcq2_g64", True, 60),
    ],
)
def test_divergence_falls_by_what_the_reference_says(
    fmt: str, tied: bool, steps: int, tmp_path: Path
) -> None:
    config = TIED if tied else CONFIG
    weights = made_weights(config)
    formats, planes = rounded(weights, fmt)
    found = tuned(weights, fmt, tmp_path, steps)
    assert found.after < 0.9 * found.before
    judged = WINDOWS[:: tune_module.JUDGED]
    for planes_now, said in ((planes, found.before), (planes | found.planes, found.after)):
        specs = weights.program.tensors
        values = {n: formats[n].decode(p, specs[n].rows, specs[n].cols) for n, p in planes_now.items()}
        assert divergence(weights, values, judged) == pytest.approx(said, rel=2e-3)
    for name, changed in found.planes.items():
        formats[name].check_planes(
            changed, weights.program.tensors[name].rows, weights.program.tensors[name].cols
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fmt", ["int4_g32", "tcq3_g64"])
def test_the_number_of_cores_changes_no_bit(fmt: str, tmp_path: Path) -> None:
    weights = made_weights(CONFIG)
    one, two = (tuned(weights, fmt, tmp_path, 6, cores=cores) for cores in (1, 2))
    assert one.after == two.after and one.planes.keys() == two.planes.keys()
    for name, planes in one.planes.items():
        assert all(np.array_equal(data, two.planes[name][p]) for p, data in planes.items()), name


class Stop(Watcher):
    """Interrupts after so many steps."""

    def __init__(self, at: int) -> None:
        self.left = at

    def step(self, what: str) -> None:
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fmt", "stops"), [("int3_g32", (1, 7, 17)), ("nvfp4_g16", (17,)), ("tcq2_g64", (7,))]
)
def test_an_interrupted_run_goes_on_to_the_same_bits(
    fmt: str, stops: tuple[int, ...], tmp_path: Path
) -> None:
    """At once, while scales learn, and once they are settled: the first format at all three."""
    weights = made_weights(TIED)
    whole = tuned(weights, fmt, tmp_path / "whole", 20)
    for at in stops:
        with pytest.raises(KeyboardInterrupt):
            tuned(weights, fmt, tmp_path, 20, watcher=Stop(at))
        assert (tmp_path / tune_module.STATE).is_file()
        again = tuned(weights, fmt, tmp_path, 20)
        assert again.after == whole.after
        for name, planes in whole.planes.items():
            assert all(np.array_equal(data, again.planes[name][p]) for p, data in planes.items()), (at, name)
        assert not (tmp_path / tune_module.STATE).exists()


@pytest.mark.parametrize("damaged", [False, True], ids=["of another build", "cut"])
def test_a_state_that_does_not_fit_is_replaced(
    damaged: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the model is never in memory twice for it."""
    weights = made_weights(CONFIG)
    with pytest.raises(KeyboardInterrupt):
        tuned(weights, "int4_g32", tmp_path, 20, watcher=Stop(2))
    state = tmp_path / tune_module.STATE
    if damaged:
        state.write_bytes(state.read_bytes()[:-100])
    steps = 20 if damaged else 9
    left = _count_left(monkeypatch)
    found = tuned(weights, "int4_g32", tmp_path, steps)
    assert left == [0, 0]
    assert found.after == tuned(weights, "int4_g32", tmp_path, steps).after and not state.exists()


def _count_left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tensors of earlier models and runs are in memory whenever a model is built."""
    seen: list[weakref.ref] = []
    left: list[int] = []

    class Watched(tune_module._Models):
        def __init__(self, *given: Any) -> None:
            left.append(sum(tensor() is not None for tensor in seen))
            super().__init__(*given)
            exact = [self._teacher.weight(name) for name in self._teacher.program.tensors]
            seen.extend(map(weakref.ref, (*exact, *self._values.values())))

        def run(self, *given: Any) -> Any:
            run = super().run(*given)
            seen.extend(map(weakref.ref, run.tensors.values()))
            return run

    monkeypatch.setattr(tune_module, "_Models", Watched)
    return left


def test_what_does_not_help_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_module, "LATENT_RATE", 3.0)
    monkeypatch.setattr(tune_module, "LATENT_PATH", 1e3)
    found = tuned(made_weights(CONFIG), "int8_g64", tmp_path, 45)
    assert found.after >= found.before and found.planes == {}


def test_where_searches_would_take_too_long_scales_learn_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = made_weights(CONFIG)
    formats, planes = rounded(weights, "tcq2_g64")
    every = tuned(weights, "tcq2_g64", tmp_path, 60)
    monkeypatch.setattr(tune_module, "SEARCHED", 1)
    alone = tuned(weights, "tcq2_g64", tmp_path, 60)
    assert every.after < alone.after < alone.before == every.before
    for found, same in ((alone, True), (every, False)):
        matrices = [name for name in found.planes if formats[name].name == "tcq2_g64"]
        assert matrices
        for name in matrices:
            assert np.array_equal(found.planes[name]["q"], planes[name]["q"]) == same


def test_every_window_is_learned_from_once_a_pass() -> None:
    order = tune_module._Order(10, 1)
    seen = np.concatenate([order.batch(step, 3) for step in range(20)])
    for k in range(6):
        assert sorted(seen[10 * k : 10 * k + 10]) == list(range(10))
    assert not np.array_equal(seen[:10], seen[10:20])
    assert np.array_equal(order.batch(7, 3), tune_module._Order(10, 1).batch(7, 3))


def test_one_window_and_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    weights = made_weights(CONFIG)
    formats, planes = rounded(weights, "int4_g32")
    with pytest.raises(BadConfig, match="only one"):
        tune(weights, weights.program, planes, formats, WINDOWS[:1], tmp_path, TuneOptions(3))
    name = next(n for n, s in weights.program.tensors.items() if s.role == "vector")
    bad = MadeWeights(weights.program, weights.tensors | {name: weights(name) * np.float32(np.inf)})
    with pytest.raises(NumericError, match="step 1: the divergence is"):
        tune(bad, weights.program, planes, formats, WINDOWS, tmp_path, TuneOptions(3, cores=1))


def test_too_little_memory_is_said_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    program = made_weights(CONFIG).program
    tuning.require_tuning(program, 5, CalibrationRequest(device="cpu"))
    monkeypatch.setattr(tune_module, "available_memory", lambda: (1 << 16, "a test"))
    with pytest.raises(BuildError, match=r"GiB for the weights in training.*a test"):
        tuning.require_tuning(program, 5, CalibrationRequest(device="cpu"))


@pytest.mark.parametrize(("steps", "samples", "word"), [(0, 8, "at least 1 step"), (9, 1, "--samples")])
def test_what_cannot_be_meant_is_refused(steps: int, samples: int, word: str) -> None:
    with pytest.raises(BadConfig, match=word):
        tuning.require_tuning(
            made_weights(CONFIG).program,
            steps,
            CalibrationRequest(corpus=CorpusOptions(samples=samples), device="cpu"),
        )


@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "gptq", "feedback": True},
        {"algorithm": "awq+gptq", "rotate": 3, "activations": "int8", "static_scales": True},
        {"algorithm": "rtn", "request": Request(weights="int8_row_o128")},
        {"algorithm": "gptq", "request": Request(weights="tcq3_g64")},
    ],
    ids=["feedback", "scaled, rotated, activations rounded", "outlier columns", "trellis"],
)
def test_a_tuned_engine_is_the_same_every_time(more: dict[str, Any], tmp_path: Path) -> None:
    model, engines, found = write_model(tmp_path / "toy"), {}, {}
    for name in ("plain", "first", "second"):
        options = replace(options_of(model, tmp_path / f"{name}.edge", auto=False), **more)
        found[name] = pipeline.build(replace(options, tune=None if name == "plain" else 12))
        engines[name] = (tmp_path / f"{name}.edge").read_bytes()
    assert engines["first"] == engines["second"] != engines["plain"]
    assert len(engines["first"]) == len(engines["plain"])
    assert any("tuning" in notice for notice in found["first"].notices), found["first"].notices
    assert not any("tuning" in notice for notice in found["plain"].notices)
    assert not list(tmp_path.glob("*.calibration"))


def test_weights_that_are_kept_are_not_tuned(tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy")
    options = options_of(model, tmp_path / "m.edge", auto=False)
    with pytest.raises(BadConfig, match="--tune"):
        pipeline.build(replace(options, tune=0))


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, engine = write_model(tmp_path / "toy"), tmp_path / "m.edge"
    words = ["--profile", "cpu", "--weights", "int3_g32", "--algorithm", "gptq", "--samples", "8"]
    words += ["--sample-tokens", "32", "--tune", "10", "--keep-json", str(tmp_path / "json")]
    assert edge_build([*words, "-o", str(engine), str(model)]) == 0
    assert "tuning: KL on windows kept for judging" in capsys.readouterr().err
    assert '"tuned"' in (tmp_path / "json" / "quantize.json").read_text()
    assert edge_build([*words, "--tune", "0", "-o", str(engine), str(model)]) == 1
