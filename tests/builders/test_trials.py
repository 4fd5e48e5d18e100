"""A plan tried out is the build of it: its KL against the engine's own planes, run by the numpy reference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hf_folders import llama_config, write_model
from killed_build import options_of

from builders.evaluate import EvaluationText, compare_models
from builders.parts import Contents, Extras, open_contents
from builders.pipeline import Options, build
from builders.planner import Request
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.watcher import Watcher
from builders.weights import EngineWeights
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.program import Program

pytest.importorskip("torch")
from builders.calibrating import Calibrations
from builders.trials import FEW, MOST, Trials, affordable

GPTQ = get_algorithm("gptq")


@contextmanager
def trials_of(
    options: Options, folder: Path, windows: int | None = None
) -> Iterator[tuple[Trials, Contents]]:
    """Trials as that build would make them."""
    with open_contents(options.model, Extras(), None) as contents, Calibrations() as calibrations:
        calibrations.run(contents, options.calibration, folder, "", Watcher())
        part, algorithm = contents.language, get_algorithm(options.algorithm)
        texts = calibrations.windows(part)[:windows]
        how = AlgorithmOptions(options.observer, calibrations.device)
        yield Trials(part, algorithm, how, calibrations, texts, options.feedback), contents


@pytest.mark.parametrize(
    ("algorithm", "feedback", "tied"),
    [("rtn", False, True), ("gptq", False, False), ("gptq", True, True), ("awq+gptq", True, False)],
)
def test_a_trial_is_the_build(algorithm: str, feedback: bool, tied: bool, tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy", llama_config(tie_word_embeddings=tied))
    request = Request(weights="int3_g32", head_weights="int4_g32")
    options = replace(
        options_of(model, tmp_path / "m.edge", auto=False),
        request=request,
        algorithm=algorithm,
        feedback=feedback,
        calibrates=True,
    )
    build(options)
    with read_engine(tmp_path / "m.edge") as opened, trials_of(options, tmp_path / "c") as (trials, contents):
        part = opened.part("language")
        found = trials.kl(part.plan)
        assert trials.kl(part.plan) == found
        stored = EngineWeights(part.program, part.plan.tensors, lambda name: part.weights[name].planes)
        # A token more at the end: the reference compares the answers that another token follows
        text = EvaluationText("all", tuple(np.append(w, 5).astype(np.int32) for w in trials.windows))
        kv = msgspec.structs.replace(part.plan.kv, k="f32", v="f32")
        want = compare_models(contents.target.weights, stored, kv, text).kl_mean
    assert want > 1e-3
    assert found == pytest.approx(want, rel=2e-3)


def test_fewer_windows_are_the_first_ones(tmp_path: Path) -> None:
    model = write_model(tmp_path / "toy")
    options = replace(options_of(model, tmp_path / "m.edge", auto=False), feedback=True)
    plan = build(options).manifest.parts["language"].plan
    exact = with_formats(plan, "f32")
    with trials_of(options, tmp_path / "c", windows=2) as (trials, _):
        assert trials.windows.shape == (2, 32)
        assert trials.kl(exact) == 0.0
        few = trials.kl(plan)
        wide = [
            replace(trials, windows=w, _exact=[]).kl(plan)
            for w in (trials.calibrations.windows(trials.part), trials.windows)
        ]
    assert few == wide[1] != wide[0]


def with_formats(plan: Plan, fmt: str) -> Plan:
    tensors = {n: msgspec.structs.replace(t, format=fmt, packing="rows") for n, t in plan.tensors.items()}
    return msgspec.structs.replace(plan, tensors=tensors)


def test_trials_are_counted_in_operations(tmp_path: Path) -> None:
    with open_contents(write_model(tmp_path / "toy"), Extras(), None) as contents:
        toy = contents.target.program
    windows = np.zeros((32, 256), np.int32)
    assert affordable(toy, windows, GPTQ, feedback=True) == (MOST, 32)
    some = grown(toy, 5_000_000)
    most, few = affordable(some, windows, GPTQ, feedback=True)
    assert FEW <= most < MOST and 1 <= few < 32
    assert affordable(some, windows, GPTQ, feedback=False)[1] > few
    assert affordable(grown(toy, 1_000_000_000), windows, GPTQ, feedback=True) == (0, 0)
    assert affordable(toy, windows[:1, :32], GPTQ, feedback=True) == (MOST, 1)  # all the text that there is


def grown(program: Program, size: int) -> Program:
    """The program with an embedding of about so many weights."""
    spec = msgspec.structs.replace(program.tensors["embed"], rows=size // program.tensors["embed"].cols)
    return msgspec.structs.replace(program, tensors={**program.tensors, "embed": spec})
