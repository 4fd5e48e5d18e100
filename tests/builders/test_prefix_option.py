"""edge-build --prefix: a file beside the engine that the runtime takes by itself, and the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from builders.cli import main
from builders.prefix import read_prefix
from edge_runtime import Sampling, open_engine
from edge_runtime.errors import BadConfig

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
MESSAGES = [
    {"role": "user", "content": "bring me the red mug from the kitchen"},
    {"role": "assistant", "content": '[{"skill":"go_to","place":"kitchen"}]'},
]
Captured = pytest.CaptureFixture[str]


def command(target: Path, *more: str) -> list[str]:
    words = ["--profile", "cpu", "--weights", "int8_row", "--context", "256", "--no-eval", "--json"]
    return [*words, "-o", str(target), *more, str(PLANNER / "model")]


def test_a_prefix_is_written_and_taken(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "chat.json").write_text(json.dumps(MESSAGES))
    target = tmp_path / "m.edge"
    assert main(command(target, "--prefix", str(tmp_path / "chat.json"))) == 0
    found = json.loads(capsys.readouterr().out)["prefix"]
    assert found["path"] == str(target.with_suffix(".prefix")) and found["tokens"] >= 16
    asked = [*MESSAGES, {"role": "user", "content": "go to the pantry"}]
    with open_engine(target) as session:
        warm = session.chat(asked, Sampling(temperature=0.0), max_tokens=12)
    target.with_suffix(".prefix").unlink()
    with open_engine(target) as session:
        cold = session.chat(asked, Sampling(temperature=0.0), max_tokens=12)
    assert warm.tokens == cold.tokens
    assert warm.usage.cached_tokens >= found["tokens"] > cold.usage.cached_tokens


def test_an_engine_that_cannot_run_here_is_refused_before_the_build(tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "p.txt").write_text("some text")
    words = command(tmp_path / "m.edge", "--prefix", str(tmp_path / "p.txt"))
    words[1] = "orin"
    assert main(words) == 1
    assert "save the prefix on the device" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "m.edge").exists()


def test_what_a_prefix_file_may_be(tmp_path: Path) -> None:
    def read(name: str, data: bytes) -> object:
        (tmp_path / name).write_bytes(data)
        return read_prefix(tmp_path / name)

    assert read("a.txt", "grüßte".encode()) == "grüßte"
    assert read("a.json", json.dumps(MESSAGES).encode()) == MESSAGES
    for name, data, words in (
        ("b.txt", b"", "is empty"),
        ("b.txt", b"\xff", "is not UTF-8 text"),
        ("b.json", b"{", "is not valid JSON"),
        ("b.json", b"[" * 100_000, "is not valid JSON"),
        ("b.json", b"[]", "expected chat messages"),
        ("b.json", b'[{"role": "user"}]', "expected chat messages"),
        ("b.json", b'[{"role": "user", "content": 1}]', "expected chat messages"),
    ):
        with pytest.raises(BadConfig, match=words):
            read(name, data)
