"""The folder of a build's calibration: left clean however the build ends, and changed by one at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hf_folders import llama_config, write_model
from killed_build import forks, options_of, options_with

from builders.calibrating import CalibrationRequest
from builders.calibration_folder import FEEDBACK, IMPORTANCE, FolderLock, forget
from builders.corpus import BUILTIN, SELF, Corpus, CorpusOptions, corpus_name, make_corpus
from builders.kept_corpus import OWN_TEXT
from builders.parts import Extras, open_contents
from builders.pipeline import build
from builders.planner import Request
from builders.watcher import Watcher
from edge_runtime.errors import BadConfig, BuildError

pytest.importorskip("torch")

from builders import feedback, row_importance
from builders.calibrate import calibrate

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("folder") / "toy")


def folder_of(engine: Path) -> Path:
    return engine.with_name(engine.name + ".calibration")


class At(Watcher):
    """Does something once, when a phase begins or at the first step of it."""

    def __init__(self, phase: str, step: bool, do: Callable[[], None]) -> None:
        self._at, self._do, self._phase = (phase, step), do, ""

    def phase(self, name: str, steps: int) -> None:
        self._phase = name
        self._now(step=False)

    def step(self, what: str) -> None:
        self._now(step=True)

    def _now(self, *, step: bool) -> None:
        if self._at == (self._phase, step):
            self._at = ("", False)
            self._do()


def test_a_build_killed_among_rows_leaves_none_to_the_next(model: Path, tmp_path: Path) -> None:
    whole, engine = tmp_path / "whole.edge", tmp_path / "m.edge"
    build(options_with(model, whole, "--feedback"))
    with forks() as children:  # step 9 of 8 before and 4 segments
        assert children.build(model, engine, 9, "--feedback") == -signal.SIGKILL
        assert list((folder_of(engine) / "language").glob("*/*.rows"))
        assert children.build(model, engine, 0, "--feedback") == 0
    assert not folder_of(engine).exists()
    assert engine.read_bytes() == whole.read_bytes()


def test_rows_of_a_killed_run_go_when_the_folder_is_opened(model: Path, tmp_path: Path) -> None:
    corpus = Corpus("noise", np.random.default_rng(0).integers(3, 250, (4, 24)).astype(np.int32))
    folder = tmp_path / "c"

    def leave() -> None:
        for name in (FEEDBACK, IMPORTANCE):
            (folder / name).mkdir(parents=True)
            (folder / name / "0.rows").write_bytes(bytes(8))

    leave()  # nothing else is there
    with open_contents(model, Extras(), None) as contents:
        target = contents.target
        for _ in range(2):
            calibrate(target.weights, corpus, folder, digests=target.source.sha256()).close()
            assert not [p for p in folder.iterdir() if p.is_dir()]
            leave()
    forget(folder)
    assert not folder.exists()


@pytest.mark.parametrize("name", [FEEDBACK, IMPORTANCE])
def test_rows_lie_where_the_folder_knows_them(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    windows = np.random.default_rng(0).integers(3, 250, (4, 24)).astype(np.int32)
    seen: list[str] = []

    def stop(*_: object) -> None:
        seen.extend(p.name for p in tmp_path.iterdir())
        raise KeyboardInterrupt

    monkeypatch.setattr(feedback.SegmentRunner, "run", stop)
    with open_contents(model, Extras(), None) as contents, pytest.raises(KeyboardInterrupt):
        weights = contents.target.weights
        if name == FEEDBACK:
            options = feedback.FeedbackOptions(device="cpu")
            feedback.quantize_in_order(weights, windows, lambda n, _: weights(n), tmp_path, options)
        else:
            row_importance.row_importance(weights, windows, tmp_path, "cpu")
    assert seen[0] == name and not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", [BUILTIN, SELF])
@pytest.mark.parametrize(
    ("phase", "step"), [("text", False), ("text", True), ("calibrate", True), ("quantize", True)]
)
def test_of_two_builds_to_one_engine_the_second_is_refused_and_the_first_goes_on(
    model: Path, tmp_path: Path, source: str, phase: str, step: bool
) -> None:
    options = options_of(model, tmp_path / "m.edge", auto=False)
    options = replace(options, calibration=replace(options.calibration, source=source))
    refused = []

    def second() -> None:
        before = {p: p.read_bytes() for p in folder_of(options.output).rglob("*") if p.is_file()}
        with pytest.raises(
            BuildError, match="is being calibrated in by another process; wait for it"
        ) as error:
            build(options)
        refused.append(str(error.value))
        assert {p: p.read_bytes() for p in folder_of(options.output).rglob("*") if p.is_file()} == before

    done = build(options, At(phase, step, second))
    assert len(refused) == 1 and "\n" not in refused[0]
    assert done.manifest.provenance.calibration is not None
    assert not folder_of(options.output).exists()


def test_a_lock_on_a_folder_that_was_removed_meanwhile_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, opened = FolderLock(tmp_path / "c"), os.open

    def late(*args: object, **named: object) -> int:
        found = opened(*args, **named)  # type: ignore[arg-type]
        forget(tmp_path / "c")
        first.close()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", late)
        with pytest.raises(BuildError, match="another process"):
            FolderLock(tmp_path / "c")
    FolderLock(tmp_path / "c").close()


def test_a_folder_of_another_text_is_refused_before_a_text_is_made(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(source: str | None, folder: str, seed: int = 1) -> CalibrationRequest:
        return CalibrationRequest(source, CorpusOptions(4, 32, seed), "cpu", folder=tmp_path / folder)

    options = replace(options_of(model, tmp_path / "m.edge", auto=False), calibration=asked(BUILTIN, "c"))
    build(options)
    build(replace(options, calibration=asked(SELF, "own")))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("builders.self_text.write_samples", None)
    monkeypatch.setattr("builders.corpus.read_passages", None)
    for source in (SELF, None):
        with pytest.raises(BadConfig, match=r"another text: 'builtin-.*', and this is 'self'"):
            build(replace(options, calibration=asked(source, "c")))
    with pytest.raises(BadConfig, match=r"another text: 'self', and this is 'a\.txt'"):
        build(replace(options, calibration=asked(str(tmp_path / "a.txt"), "own")))
    with pytest.raises(BadConfig, match="another seed: '1', and this is '2'"):
        build(replace(options, calibration=asked(SELF, "own", seed=2)))
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "own" / OWN_TEXT).is_file()
    build(replace(options, calibration=asked(SELF, "own"), request=Request(weights="int3_g32")))


def test_a_corpus_is_called_as_was_said_before(model: Path, tmp_path: Path) -> None:
    (tmp_path / "story.txt").write_text("the robot opens the door. " * 20)
    options = CorpusOptions(2, 16)
    with open_contents(model, Extras(), None) as contents:
        target = contents.target
        for source in (None, SELF, BUILTIN, tmp_path / "story.txt", str(tmp_path)):
            said = corpus_name(target.program, source, options)
            assert make_corpus(target, source, options).name == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_that_is_told_to_end_clears_away_what_it_began(
    tmp_path: Path, number: signal.Signals
) -> None:
    write_model(tmp_path / "ant", llama_config(hidden_size=256, intermediate_size=1024, num_hidden_layers=8))
    engine = tmp_path / "m.edge"
    words = ["--profile", "cpu", "--weights", "int4_g32", "--algorithm", "gptq", "--feedback"]
    words += ["--calibration", "builtin", "--samples", "16", "--sample-tokens", "64", "-o", str(engine)]

    def defaults() -> None:  # a test run in the background has SIGINT ignored, and a child inherits that
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen(
        [sys.executable, "-m", "builders.cli", *words, str(tmp_path / "ant")],
        env=dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1"),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=defaults,
    )
    try:
        until = time.monotonic() + 120
        while not list(tmp_path.glob("*/language/*/*.1.rows")) and time.monotonic() < until:
            assert child.poll() is None
            time.sleep(0.01)
        assert list(tmp_path.glob(".m.edge.*.tmp"))
        child.send_signal(number)
        if number == signal.SIGTERM:
            child.send_signal(number)  # as timeout(1) does
        _, said = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 128 + number and said.endswith("interrupted\n")
    assert not list(tmp_path.glob(".m.edge*")) and not engine.exists()
    kept = {p.name.split("-")[0] for p in (folder_of(engine) / "language").iterdir()}
    assert kept == {"calibration.json", "complete.json", "lock", "segment"}  # for a build that goes on
