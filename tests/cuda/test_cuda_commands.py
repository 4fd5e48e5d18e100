"""edge-run and edge-bench where the GPU is the fake one: processes of their own, as users start them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_engine import write_cuda
from fake_cuda import FakeCuda, environment

from edge_runtime import open_engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """e.edge, and the modules that its device code runs as."""
    path = tmp_path_factory.mktemp("cuda")
    write_cuda(path / "e.edge", path, draft=True)
    return path


def command(name: str, folder: Path, *argv: object, **settings: object) -> subprocess.CompletedProcess[str]:
    code = f"import sys; from edge_runtime.cli.{name} import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        env=environment(folder, **settings),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.mark.parametrize("backend", ["cuda", "auto"])
def test_an_answer(folder: Path, backend: str) -> None:
    done = command("run", folder, folder / "e.edge", "Once upon", "--backend", backend, "--max-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() and " tokens/s" in done.stderr


def test_what_it_says_is_what_a_session_says(
    folder: Path, fake_gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGE_FAKE_MODULES", str(folder))
    with open_engine(folder / "e.edge", backend="cuda") as session:
        want = session.complete("Once upon a time", max_tokens=8)
    done = command(
        "run", folder, folder / "e.edge", "Once upon a time", "--raw", "--backend", "cuda",
        "--max-tokens", "8", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["backend"] == "cuda" and tuple(data["tokens"]) == tuple(want.tokens)


def test_speeds(folder: Path) -> None:
    done = command(
        "bench", folder, folder / "e.edge", "--backend", "cuda", "--prompts", "4", "--depths", "2",
        "--decode", "4", "--repeat", "2", "--only", "speed,requests,speculation", "--requests", "3",
        "--max-tokens", "6", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["backend"] == "cuda"
    assert all(row["tokens_per_s"] > 0 for row in data["rows"])
    assert data["speculation"] is not None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"cc": "9.0"}, "sm_87"),
        ({"devices": 0}, "cuda"),
        ({"memory": 200_000}, "need"),
    ],
)
def test_a_machine_that_cannot_gets_one_sentence_and_exit_code_1(
    folder: Path, settings: dict[str, object], says: str
) -> None:
    done = command("run", folder, folder / "e.edge", "hi", "--backend", "cuda", **settings)
    assert done.returncode not in (0, -6, -11) and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr
