"""Pictures on disks that do not take them: said before the work; later they cost no plan and no engine."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
from hf_folders import write_model

from builders.cli import main
from edge_runtime.engine.file import read_engine

pytest.importorskip("matplotlib", reason="drawing needs it")
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("picture") / "toy")


@pytest.fixture
def full(monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk takes pictures no longer once the work has begun: none gets its name."""
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).suffix == ".svg":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


@pytest.mark.parametrize("dry", [True, False], ids=["dry run", "build"])
@pytest.mark.parametrize(
    ("picture", "words"),
    [
        ("nodir/a.svg", "nodir is not a folder; make it first"),
        ("folder.svg", "this is a folder"),
        ("/proc/a.svg", "cannot be written there"),  # for root too
        (f"{'a' * 300}.svg", "File name too long"),
    ],
)
def test_where_no_picture_can_be_is_said_before_the_work(
    picture: str,
    words: str,
    dry: bool,
    model: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.svg").mkdir()
    monkeypatch.setattr("builders.cli.build", lambda *_: pytest.fail("work was begun"))
    options = ["--profile", "cpu", "--plot", picture, *(["--dry-run"] if dry else [])]
    assert main([*options, str(model)]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: picture {picture}: ") and words in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.svg"]


def test_a_picture_that_was_there_stays_while_nothing_is_drawn(
    model: Path, tmp_path: Path, capsys: Captured
) -> None:
    picture = tmp_path / "plan.svg"
    picture.write_text("an older one")
    options = ["--profile", "cpu", "--plot", str(picture), "--bits", "1"]
    assert main([*options, "--dry-run", str(model)]) == 2
    assert "<svg" in picture.read_text()  # of the plan that comes nearest
    picture.write_text("an older one")
    assert main([*options, "-o", str(tmp_path / "m.edge"), str(model)]) == 2
    assert picture.read_text() == "an older one" and list(tmp_path.iterdir()) == [picture]


@pytest.mark.usefixtures("full")
def test_a_dry_run_without_its_picture_is_whole_and_still_a_failure(
    model: Path, tmp_path: Path, capsys: Captured
) -> None:
    picture = tmp_path / "plan.svg"
    assert main(["--profile", "cpu", "--dry-run", "--json", "--plot", str(picture), str(model)]) == 1
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert found["error"]["type"] == "BuildError" and found["fits"] and found["explanation"]["tensors"]
    assert "plot" not in found
    assert captured.err == f"error: picture {picture} cannot be written: No space left on device\n"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("full")
def test_a_build_without_its_picture_is_an_engine(model: Path, tmp_path: Path, capsys: Captured) -> None:
    picture, engine = tmp_path / "plan.svg", tmp_path / "m.edge"
    options = ["--profile", "cpu", "--weights", "int4_g32", "--no-eval", "--plot", str(picture)]
    assert main([*options, "-o", str(engine), str(model)]) == 0
    err = capsys.readouterr().err
    assert f"note: picture {picture} cannot be written: No space left on device; the build goes on" in err
    read_engine(engine).close()
    assert list(tmp_path.iterdir()) == [engine]
