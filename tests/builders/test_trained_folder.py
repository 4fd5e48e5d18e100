"""Folders that training writes: whose they may replace, when they are refused, and that they change whole."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from builders.trained_folder import STATE, Kind, TrainedFolder
from edge_runtime.errors import BadConfig, BuildError

KIND = Kind("builders.toy", ("toy.json", "weights"), lambda folder: (folder / "toy.json").exists())


def files(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(folder: Path, **content: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


def train(path: Path, text: str = "new") -> None:
    with TrainedFolder(path, KIND, path.parent / "model") as out:
        out.prepare(10, 10)
        out.state.write_text("half way")
        with out.replacing() as folder:
            write(folder, toy_json=text, weights=text)


def test_a_result_takes_the_place_of_an_earlier_one_whole(tmp_path: Path) -> None:
    train(tmp_path / "deep" / "out", "first")
    os.chmod(tmp_path / "deep" / "out", 0o750)
    write(tmp_path / "deep" / "out", weights_part="of a version that wrote so")
    train(tmp_path / "deep" / "out", "second")
    assert files(tmp_path) == {"deep/out/toy.json": "second", "deep/out/weights": "second"}
    assert (tmp_path / "deep" / "out").stat().st_mode & 0o777 == 0o750
    (tmp_path / "link").symlink_to("deep/out")
    train(tmp_path / "link", "third")
    assert (tmp_path / "link").is_symlink() and files(tmp_path / "deep" / "out")["weights"] == "third"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"notes_txt": "mine"}, "notes.txt"),
        ({"weights": "mine"}, "weights"),  # a name of ours, and no result of ours
        ({"toy_json": "a result", "weights": "a result", "README_md": "and my own"}, "README.md"),
    ],
)
def test_a_folder_of_somebody_else_is_refused(tmp_path: Path, content: dict[str, str], named: str) -> None:
    before = files(write(tmp_path / "out", **content))
    with pytest.raises(BadConfig, match=f"holds '{named}', and is no earlier result of builders.toy; give"):
        train(tmp_path / "out")
    assert files(tmp_path / "out") == before


def test_the_state_of_an_interrupted_run_is_no_stranger(tmp_path: Path) -> None:
    write(tmp_path / "out", training_safetensors="state", training_part="half a state")
    train(tmp_path / "out")
    assert set(files(tmp_path / "out")) == {"toy.json", "weights"}


def test_places_that_cannot_be_replaced_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write(tmp_path / "model", config_json="{}")
    (tmp_path / "file").write_text("x")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path, words in (
        (model, "is the model itself"),
        (model / "out", "lies inside the model"),
        (tmp_path / "file", "is a file; give a folder"),
        (Path("."), "is the folder this runs in, which cannot be replaced as a whole"),
        (Path("/"), "is a mount point"),
    ):
        with pytest.raises(BadConfig, match=words):
            TrainedFolder(path, KIND, model)
    assert files(tmp_path) == {"model/config.json": "{}", "file": "x"}


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: No space left")]
)
def test_a_full_disk_at_the_end_leaves_what_was_there(
    tmp_path: Path, earlier: bool, error: Exception
) -> None:
    if earlier:
        train(tmp_path / "out", "good")
    before = files(tmp_path)
    with (
        pytest.raises(BuildError, match=r"out could not be written: .*No space left.*; what was there is"),
        TrainedFolder(tmp_path / "out", KIND, tmp_path / "model") as out,
    ):
        out.prepare(10, 10)
        with out.replacing() as folder:
            write(folder, toy_json="bad")
            raise error
    assert files(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == (["out"] if earlier else [])


def test_a_swap_that_fails_half_way_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path / "out", "good")
    rename = os.rename

    def second_fails(source: Path, target: Path) -> None:
        if source.name.endswith("-new"):
            full()
        rename(source, target)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(BuildError, match="goes on from its last state"):
        train(tmp_path / "out", "bad")
    assert files(tmp_path) == {"out/toy.json": "good", "out/weights": "good", f"out/{STATE}": "half way"}


def test_what_a_killed_run_left_is_put_right(tmp_path: Path) -> None:
    train(tmp_path / "out", "good")
    (tmp_path / "out").rename(tmp_path / ".out.training-old")  # killed between the two renames
    write(tmp_path / ".out.training-new", toy_json="whole, but nobody knows")
    with TrainedFolder(tmp_path / "out", KIND, tmp_path / "model") as out:
        out.prepare(10, 10)
        assert files(tmp_path) == {"out/toy.json": "good", "out/weights": "good"}
    write(tmp_path / ".out.training-old", mine_txt="somebody's")
    with pytest.raises(BadConfig, match=r"\.out\.training-old holds 'mine.txt'"):
        train(tmp_path / "out")


def test_room_is_proved_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=3 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    def prepare(result: int, state: int) -> None:
        with TrainedFolder(tmp_path / "out", KIND, tmp_path / "model") as out:
            out.prepare(result, state)

    prepare(1 << 20, 3 << 19)
    words = r"out has 3\.0 MiB free, the training needs 3\.1 MiB \(2\.0 MiB for the result, the rest for its"
    with pytest.raises(BuildError, match=words):
        prepare(2 << 20, 1 << 20)
    with pytest.raises(BuildError, match="make room or choose another -o"):
        prepare(1 << 20, 1 << 21)  # a state, and the next one while it replaces that
    assert not (tmp_path / "out").exists()
    with (write(tmp_path / "out") / STATE).open("wb") as file:
        file.truncate(1 << 20)  # takes no more room
    prepare(2 << 20, 1 << 20)


def test_a_place_that_takes_no_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "mkdir", full)
    with (
        pytest.raises(BuildError, match="out cannot be written: No space left on device"),
        TrainedFolder(tmp_path / "out", KIND, tmp_path / "model") as out,
    ):
        out.prepare(10, 10)
