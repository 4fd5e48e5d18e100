"""edge-build as a user calls it: help, --json, exit codes, the dry run from a config.json alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hf_folders import llama_config, write_model

from builders.cli import main
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.profile import list_profiles

LLAMA_8B = llama_config(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    max_position_embeddings=131072,
    tie_word_embeddings=False,
)
Captured = pytest.CaptureFixture[str]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "llama-8b" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(LLAMA_8B))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("cli") / "toy")


def object_of(captured: Captured) -> dict[str, Any]:
    """The one JSON object on stdout, and nothing else there."""
    out = captured.readouterr().out
    assert out.count("\n") == 1
    found: dict[str, Any] = json.loads(out)
    return found


def test_dry_run_prints_the_table_from_a_config_alone(config: Path, capsys: Captured) -> None:
    assert main(["--dry-run", "--profile", "orin-nano-8gb", "--context", "8192", str(config)]) == 0
    out = capsys.readouterr().out
    for word in ("weights", "KV cache", "buffers", "device code", "context", "reserve", "have", "tokens/s"):
        assert word in out
    assert "first token of a 512-token prompt" in out and "fits: yes" in out
    assert "8030" in out and "int4_g64" in out


def test_a_folder_and_its_config_give_the_same_plan(config: Path, capsys: Captured) -> None:
    found = []
    for path in (config, config.parent):
        assert main(["--dry-run", "--profile", "orin", "--json", str(path)]) == 0
        found.append(object_of(capsys))
    assert found[0] == found[1]
    assert found[0]["model"] == "llama-8b"


def test_what_does_not_fit_exits_2_with_changes_that_do(config: Path, capsys: Captured) -> None:
    command = ["--dry-run", "--profile", "orin-nano-8gb", "--weights", "f16", "--context", "8192", "--json"]
    assert main([*command, str(config)]) == 2
    found = object_of(capsys)
    assert not found["fits"] and found["error"]["type"] == "DoesNotFit"
    assert found["error"]["need"] == found["memory"]["need"] > found["memory"]["have"]
    assert found["changes"]
    for change in found["changes"]:
        options = dict(zip(command[3:7:2], command[4:7:2], strict=True))
        options |= {f"--{k}": str(v) for k, v in change["options"].items()}
        line = [w for pair in options.items() for w in pair]
        assert main(["--dry-run", "--profile", "orin-nano-8gb", "--json", *line, str(config)]) == 0
        assert object_of(capsys)["memory"]["need"] == change["need"]


def test_the_changes_are_in_the_text_too(config: Path, capsys: Captured) -> None:
    assert main(["--dry-run", "--profile", "orin-nano-8gb", "--weights", "f16", str(config)]) == 2
    captured = capsys.readouterr()
    assert "what would make it fit:\n  --weights int4_g32" in captured.out
    assert captured.err.startswith("error: ") and "Traceback" not in captured.err


def test_build_prints_one_object_and_progress_on_stderr(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "builders.cli", "--profile", "cpu", "--weights", "int4_g32", "--json"]
    root = str(Path(__file__).resolve().parents[2])
    env = dict(os.environ, PYTHONPATH=root, OMP_NUM_THREADS="1")
    done = subprocess.run(
        [*command, str(model)], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    target = tmp_path / "toy-cpu-int4_g32.edge"
    assert found["path"] == target.name and found["bytes"] == target.stat().st_size
    matrices, quality = found["matrices"], found["quality"]
    assert "bits_per_weight" not in found and 4.5 < matrices["bits_per_weight"] < 8.5
    for pair in (matrices, quality):  # one meaning of the name, and bytes that it is of
        assert pair["bits_per_weight"] == pytest.approx(8 * pair["bytes"] / matrices["params"], rel=1e-12)
    assert quality["bits_per_weight"] == pytest.approx(matrices["bits_per_weight"], rel=1e-12)
    assert quality["bytes"] < found["plan"]["memory"]["weights"]  # which has vectors, and padding
    assert found["quality"]["tokens"] > 400 and found["quality"]["sqnr_db"]
    assert "quantize" in done.stderr
    with read_engine(target) as engine:
        recipe = engine.manifest.provenance.recipe
    assert recipe["weights"] == "int4_g32" and recipe["profile"] == "cpu"
    assert not any("/" in v for v in recipe.values())


def test_build_reports_to_people(model: Path, tmp_path: Path, capsys: Captured) -> None:
    assert main(["--profile", "cpu", "-o", str(tmp_path / "m.edge"), str(model)]) == 0
    captured = capsys.readouterr()
    for word in ("bits per weight", "perplexity", "KL to f32", "lowest SQNR", "tokens/s", "quantize"):
        assert word in captured.out
    assert "matrix int4_g64" in captured.out  # what is built when nothing is said
    assert main(["--profile", "cpu", "--weights", "auto", "-o", str(tmp_path / "m.edge"), str(model)]) == 0
    assert "matrix f16" in capsys.readouterr().out  # the best format that fits


def test_quality_is_measured_on_the_text_given(model: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "notes.txt").write_text("the quick brown fox " * 20)
    options = ["--profile", "cpu", "--eval", str(tmp_path / "notes.txt"), "--eval-tokens", "100", "--json"]
    assert main([*options, "-o", str(tmp_path / "m.edge"), str(model)]) == 0
    quality = object_of(capsys)["quality"]
    assert (quality["text"], quality["tokens"]) == ("notes.txt", 100)


def test_a_broken_quality_limit_exits_3_and_writes_nothing(
    real_model: Path, tmp_path: Path, capsys: Captured
) -> None:
    options = ["--profile", "cpu", "--weights", "int4_g128", "--eval-tokens", "128", "--json"]
    command = [*options, "-o", str(tmp_path / "m.edge"), str(real_model)]
    limits = {"--max-ppl-increase": ("0.5", "50"), "--max-kl": ("0.0001", "1")}
    for option, (broken, kept) in limits.items():
        assert main([*command, option, broken]) == 3
        assert object_of(capsys)["error"]["type"] == "QualityLimit"
        assert not list(tmp_path.iterdir())
        assert main([*command, option, kept]) == 0
        assert object_of(capsys)["quality"]["broken"] == []
        (tmp_path / "m.edge").unlink()


def test_a_broken_accuracy_exits_3_unless_forced(model: Path, tmp_path: Path, capsys: Captured) -> None:
    task = tmp_path / "task.jsonl"
    choices = ["yes", "no", "may be"]
    records = [
        {"prompt": "a", "choices": choices, "expected": c, "scoring": "choice"} for c in choices
    ]  # whatever the toy says, it is right once
    task.write_text("\n".join(map(json.dumps, records)))
    target = tmp_path / "m.edge"
    command = ["--profile", "cpu", "--eval-tokens", "64", "--task", str(task), "-o", str(target), "--json"]
    assert main([*command, "--min-accuracy", "0.34", str(model)]) == 3
    message = object_of(capsys)["error"]["message"]
    assert "accuracy is 0.3333 on task.jsonl, at least 0.34 is wanted" in message and "--force" in message
    assert list(tmp_path.iterdir()) == [task]
    assert main([*command, "--min-accuracy", "0.3", str(model)]) == 0
    assert object_of(capsys)["quality"]["task"]["accuracy"] == pytest.approx(1 / 3)
    old = target.read_bytes()
    assert main([*command, "--min-accuracy", "1", "--max-kl", "0", str(model)]) == 3
    assert "KL to f32 is" in object_of(capsys)["error"]["message"]
    assert target.read_bytes() == old
    assert main([*command, "--min-accuracy", "1", "--max-kl", "0", "--force", str(model)]) == 0
    captured = capsys.readouterr()
    quality = json.loads(captured.out)["quality"]
    assert [clause.split()[0] for clause in quality["broken"]] == ["KL", "accuracy"]
    assert "written by --force although KL to f32 is" in captured.err
    with read_engine(target) as engine:
        assert engine.manifest.quality is not None
        assert list(engine.manifest.quality.broken) == quality["broken"]
    assert main([*command[:-1], "--force", str(model)]) == 0
    assert "33.33% of 3 cases of task.jsonl on cpu (f32 33.33%)" in capsys.readouterr().out


def test_native_evaluation_needs_a_backend_that_runs_the_engine(
    model: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["--profile", "cpu", "--eval-tokens", "64", "--eval-backend", "native", "--json"]
    command += ["-o", str(tmp_path / "m.edge"), str(model)]
    assert main(command) == 0
    assert object_of(capsys)["quality"]["backend"] == "cpu"
    monkeypatch.setattr("builders.runner._backend", lambda name: None)
    assert main(command) == 1
    error = object_of(capsys)["error"]
    assert error["type"] == "BackendUnavailable" and "use --eval-backend reference" in error["message"]


def test_k_and_v_may_have_formats_of_their_own(model: Path, tmp_path: Path, capsys: Captured) -> None:
    for given, want in (("f16", ("f16", "f16")), ("int8,int4", ("int8", "int4"))):
        assert main(["--dry-run", "--profile", "cpu", "--kv", given, "--json", str(model)]) == 0
        kv = object_of(capsys)["kv"]
        assert (kv["k"], kv["v"]) == want


def test_profiles_are_listed(capsys: Captured) -> None:
    assert main(["--profiles"]) == 0
    out = capsys.readouterr().out
    for profile in list_profiles():
        assert profile.name in out
    assert main(["--profiles", "--json"]) == 0
    assert len(object_of(capsys)["profiles"]) == len(list_profiles())


def test_help_shows_examples_that_parse(capsys: Captured) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--help"])
    assert stopped.value.code == 0
    out = capsys.readouterr().out
    assert "examples:" in out and "exit codes:" in out
    from builders.arguments import _EXAMPLES, make_parser

    for line in _EXAMPLES:
        make_parser().parse_args(line.split()[1:])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "MODEL is missing"),
        (["MODEL"], "--profile is missing"),
        (["--profile", "orin-nano-8bg", "MODEL"], "did you mean 'orin-nano-8gb'"),
        (["--profile", "cpu", "--weihgts", "f16", "MODEL"], "did you mean '--weights'"),
        (["--profile", "cpu", "--weights", "int4_g46", "MODEL"], "did you mean 'int4_g64'"),
        (["--profile", "cpu", "--weights", "int4", "MODEL"], "did you mean 'int4_g64'"),
        (["--profile", "cpu", "--keep-json", __file__, "MODEL"], "not a folder that can be made"),
        (["--profile", "cpu", "--kv", "int9", "MODEL"], "unknown KV format 'int9'"),
        (["--profile", "cpu", "--context", "x", "MODEL"], "--context"),
        (["--profile", "cpu", "--context", "4096", "MODEL"], "128"),
        (["--profile", "cpu", "--eval-tokens", "1", "MODEL"], "--eval-tokens is 1"),
        (["--profile", "cpu", "--max-ppl-increase", "-1", "MODEL"], "--max-ppl-increase"),
        (["--profile", "cpu", "--max-ppl-increase", "1", "--no-eval", "MODEL"], "--max-ppl-increase"),
        (["--profile", "cpu", "--max-kl", "-1", "MODEL"], "--max-kl -1 needs 0 or more"),
        (["--profile", "cpu", "--max-kl", "nan", "MODEL"], "--max-kl nan needs 0 or more"),
        (["--profile", "cpu", "--min-accuracy", "0.5", "MODEL"], "a --task to measure it on"),
        (["--profile", "cpu", "--task-f32", "MODEL"], "--task-f32 needs --task"),
        (["--profile", "cpu", "--task", "/no/such.jsonl", "MODEL"], "task file: cannot read"),
        (["--profile", "cpu", "--task", "/no/such.jsonl", "--no-eval", "MODEL"], "leave --no-eval away"),
        (["--profile", "cpu", "--eval-backend", "cuda", "MODEL"], "invalid choice: 'cuda'"),
        (["--profile", "cpu", "--algorithm", "rtm", "MODEL"], "did you mean 'rtn'"),
        (["--profile", "cpu", "/no/such/folder"], "is not a folder"),
        (["--profile", "orin", "--power-mode", "26W", "MODEL"], "power mode"),
    ],
)
def test_mistakes_exit_1_in_one_line(
    argv: list[str],
    words: str,
    model: Path,
    tmp_path: Path,
    capsys: Captured,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = [str(model) if a == "MODEL" else a for a in argv]
    for extra in ([], ["--json"]):
        assert main([*line, *extra]) == 1
        captured = capsys.readouterr()
        error = captured.err.splitlines()[-1]
        assert error.startswith("error: ") and words in error
        assert not extra or words in json.loads(captured.out)["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_importing_the_command_loads_no_torch() -> None:
    code = (
        "import sys, builders.cli; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'onnx')))"
    )
    env = dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0
