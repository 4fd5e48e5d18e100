"""The shipped planner through whole engines: plan accuracy at f32, and what INT4 may cost of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime import Sampling, open_engine

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
sys.path.insert(0, str(PLANNER))  # the example's scripts import one another by plain names

import score  # noqa: E402
import skills  # noqa: E402
from cases import read_cases  # noqa: E402


def build(out: Path, weights: str, kv: str) -> Path:
    argv = ["--profile", "cpu", "--weights", weights, "--kv", kv, "--context", "320", "--no-eval", "--json"]
    argv += ["--sequences", "16", "--kv-tokens", str(16 * 320), "-o", str(out), str(PLANNER / "model")]
    done = subprocess.run(
        [sys.executable, "-m", "builders.cli", *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("planner") / "f32.edge", "f32", "f32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("planner") / "int4.edge", "int4_g64", "int8")


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, str]]:
    found = read_cases(PLANNER / "heldout.jsonl")
    assert len(found) >= 2000
    return found


@pytest.mark.timeout(600)
def test_plans_are_right_at_f32_and_within_a_point_at_int4(
    exact: Path, small: Path, cases: list[tuple[str, str]]
) -> None:
    with open_engine(exact, backend="cpu") as session:
        f32 = score.score(session, cases[::2])
    with open_engine(small, backend="cpu") as session:
        int4 = score.score(session, cases[::2])
    assert f32 >= 0.97
    assert int4 >= f32 - 0.01


def test_the_reference_gives_the_same_plans(exact: Path, cases: list[tuple[str, str]]) -> None:
    prompts = [prompt for prompt, _ in cases[:24]]
    with open_engine(exact, backend="reference") as session:
        reference = score.answers(session, prompts)
    with open_engine(exact, backend="cpu") as session:
        assert score.answers(session, prompts) == reference


def test_every_answer_of_the_demo_is_an_allowed_plan(small: Path) -> None:
    with open_engine(small) as session:
        for command in ("bring me the red mug from the kitchen", "please follow Anna to the garage"):
            answer = session.chat([{"role": "user", "content": command}], Sampling(temperature=0.0))
            skills.check_plan(json.loads(answer.text))
            assert answer.finish_reason == "stop"
