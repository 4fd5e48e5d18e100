"""edge-inspect, and the manner that all commands share: exit codes, --json, tables, mistakes."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from device_engine import CODE, CUBIN, PTX, write_device_toy
from toy_engine import BLOBS, toy_parts, write_toy

from edge_runtime.cli import inspect
from edge_runtime.cli.output import Answer, Parser, run_command, size, table
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.profile import list_profiles
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BadEngineFile, DoesNotFit, EdgeError, QualityLimit, Unsupported

ROOT = Path(__file__).resolve().parents[2]
QUALITY = {"perplexity", "perplexity_f32", "kl_mean", "kl_p99", "top1_agreement", "bits_per_weight", "bytes"}
QUALITY |= {"backend", "layer_cosine", "task", "broken", "sqnr_db"}


@pytest.fixture(scope="module")
def engine_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inspect") / "toy.edge"
    write_toy(path)
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: object, code: int = 0) -> str:
    assert inspect.main([str(a) for a in argv]) == code
    out, err = capsys.readouterr()
    assert (err == "") == (code == 0)
    return out if code == 0 else err


def test_the_tables_tell_everything(engine_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, engine_path).splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    for line in (
        "engine toy",
        "digests match",
        "made for cpu, backend cpu",
        "part ops tensors params stored matrices bits/weight formats",
        "language 35 22 22,692 17.4 KiB 14.6 KiB 5.32 int4_g32 x14, f32 x6, int8_row x2",
        "bits/weight: of matrices, scales included, as edge-build --bits counts them",
        "matrices 5.20 bits/weight, scales included",
        "tidy language 3 4 2.0 KiB",
        "plan of language",
        "adapters 3.5 KiB",
        "profile cpu, power mode default",
        "step context 64, 2 sequences, 16 tokens a step",
        "KV cache K int8, V int8, 8 pages of 16 tokens",
        "weights 17.4 KiB",
        "need 96.9 KiB",
        "have 1023.0 MiB (1.00 GiB less a reserve of 1.0 MiB): fits",
        "perplexity 12.5000, f32 12.0000",
        "worst tensors layers.0.q 21.5 dB",
        "source toy (llama)",
        "algorithm rtn",
        f"sha256 model.safetensors {'ab' * 32}",
        "blobs tokenizer.json (17 B), chat_template (14 B)",
        "device code none",
        "known answer 2 tokens after 3, by reference",
    ):
        assert line in text
    assert "layers.0.gate" not in text


def test_the_figures_of_the_table_are_those_of_the_file(engine_path: Path) -> None:
    with read_engine(engine_path) as engine:
        data = inspect.describe(engine, verified=True)
        planes = {n: s for n, s in engine.sizes().items() if n.startswith("language/")}
        part = data["parts"]["language"]
        assert part["bytes"] == sum(-(-s // 64) * 64 for s in planes.values())
        assert part["bytes"] == part["plan"]["memory"]["weights"]
        weights = engine.part("language").weights
        assert part["params"] == sum(t.rows * t.cols for t in weights.values())
        assert sum(part["formats"].values()) == part["tensors"] == len(weights)
        stored = 8 * part["bytes"] / part["params"]
        assert part["stored_bits_per_weight"] == pytest.approx(stored, abs=1e-4)
        matrices, specs = part["matrices"], engine.manifest.parts["language"].program.tensors
        true = {
            n: get_format(t.format).nbytes(t.rows, t.cols)
            for n, t in weights.items()
            if specs[n].role != "vector"
        }
        assert matrices["bytes"] == sum(true.values())
        assert matrices["params"] == sum(weights[n].rows * weights[n].cols for n in true)
        assert matrices["bits_per_weight"] == pytest.approx(
            8 * matrices["bytes"] / matrices["params"], abs=1e-4
        )
        assert "bits_per_weight" not in part
        assert data["file_bytes"] == engine_path.stat().st_size


def test_json_is_one_object_with_everything(engine_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shown(capsys, engine_path, "--json")
    assert out.count("\n") == 1
    data = json.loads(out)
    manifest = read_engine(engine_path).manifest
    assert set(data["quality"]) >= QUALITY
    assert data["quality"] == json.loads(msgspec.json.encode(manifest.quality))
    assert data["provenance"] == msgspec.to_builtins(manifest.provenance)
    assert data["known_answer"] == {"prompt": [1, 5, 9], "answer": [3, 4], "backend": "reference"}
    assert data["blobs"] == {name: len(blob) for name, blob in BLOBS.items()}
    assert data["device_code"] == [] and data["verified"] is True and "tensors" not in data
    memory = data["parts"]["language"]["plan"]["memory"]
    assert memory["need"] == memory["weights"] + memory["kv"] + memory["buffers"] + memory["adapters"]
    adapter = data["adapters"]["tidy"]
    assert (adapter["part"], adapter["tensors"], adapter["ranks"]) == ("language", 3, [4])
    assert adapter["bytes"] == 2048  # as stored; padded and with room for A x of a step it is more:
    assert memory["adapters"] == 3584
    assert adapter["targets"]["layers.0.gate"] == {"rank": 4, "scale": 0.5}
    assert memory["have"] == memory["total"] - memory["reserve"]


def test_quality_alone(engine_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads(shown(capsys, engine_path, "--quality", "--json"))
    assert set(data) == {"name", "quality"} and set(data["quality"]) >= QUALITY
    text = shown(capsys, engine_path, "--quality")
    assert text.startswith("quality\n") and "97.00 %" in text and "provenance" not in text
    words = " ".join(text.split())
    for line in (
        "text story, 300 tokens, f32 activations",
        "perplexity 12.5000, f32 12.0000 (+4.17 %)",
        "KL to f32 mean 0.01000, 99% below 0.09000 nats",
        "matrices 5.20 bits/weight, scales included",
        "task t.jsonl: 75.00 % of 8 cases right, f32 87.50 % (cpu)",
        "broken limit accuracy is 0.7500 on t.jsonl, at least 0.8 is wanted",
        "after layer cosine to f32 1 - cosine",
        "0 0.999000 ######## 1 0.996000 ##############################",
        "layers.0.q 21.50",
    ):
        assert line in words


def test_an_engine_that_was_not_measured_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest, planes = toy_parts("int4_g32", 1, 2)
    with EngineWriter(tmp_path / "m.edge") as writer:
        for name, array in planes.items():
            writer.add(name, array)
        writer.finish(msgspec.structs.replace(manifest, quality=None, known_answer=None))
    assert json.loads(shown(capsys, tmp_path / "m.edge", "--quality", "--json"))["quality"] is None
    text = shown(capsys, tmp_path / "m.edge")
    assert "quality: not measured (edge-build --eval TEXT measures it)" in text
    assert "known answer  none" in text


def test_tensors_are_listed_on_request(engine_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(shown(capsys, engine_path, "--tensors", "--json"))["tensors"]
    by_name = {row["name"]: row for row in rows}
    assert len(by_name) == 22
    row = by_name["layers.0.gate"]
    assert (row["role"], row["rows"], row["cols"], row["format"], row["packing"]) == (
        "matrix",
        64,
        32,
        "int4_g32",
        "n16k4",
    )
    assert row["bytes"] == 64 * 32 // 2 + 64 * 2  # nibbles, and an f16 scale for each row's one group
    text = shown(capsys, engine_path, "--tensors")
    assert " ".join(("language/layers.0.gate", "matrix", "64x32", "int4_g32", "n16k4", "1152")) in " ".join(
        text.split()
    )


def test_device_code_is_listed_blob_by_blob_and_kernel_by_kernel(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = write_device_toy(tmp_path / "m.edge")
    data = json.loads(shown(capsys, tmp_path / "m.edge", "--json"))
    assert data["device_code"] == list(msgspec.to_builtins(manifest.device_code))
    cubin, ptx = data["device_code"]
    assert (cubin["blob"], cubin["kind"], cubin["sm"], cubin["ptx"], cubin["cuda"]) == (
        *(CUBIN, "cubin", 87),
        *("8.5", "12.6"),
    )
    assert cubin["nbytes"] == data["blobs"][CUBIN] == len(CODE[CUBIN])
    assert cubin["kernels"]["linear_tile"] == {
        "threads": 128,
        "shared_bytes": 32768,
        "registers": 255,
        "stack_bytes": 16,
        "spill_stores": 12,
        "spill_loads": 24,
    }
    assert ptx["kind"] == "ptx" and ptx["kernels"]["norm_256"]["registers"] is None
    lines = shown(capsys, tmp_path / "m.edge").splitlines()
    text = "\n".join(" ".join(line.split()) for line in lines)
    for line in (
        f"device code {CUBIN}, {PTX}",
        "device code for PTX ISA compiler size kernels most registers spills",
        f"{CUBIN} sm_87 8.5 CUDA 12.6 304 B 2 255 1 of 2",
        f"{PTX} sm_87 and later 8.5 CUDA 12.6 31 B 2 by driver by driver",
        f"kernels of {CUBIN}, bytes",
        "norm_256 256 32 64 0 0 0",
        "linear_tile 128 255 32768 16 12 24",
    ):
        assert line in text
    write_device_toy(tmp_path / "bare.edge", ())
    assert json.loads(shown(capsys, tmp_path / "bare.edge", "--json"))["device_code"] == []
    text = shown(capsys, tmp_path / "bare.edge")
    assert "device code: none (edge-build --no-device-code); no cuda device runs this engine" in text


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    names = [p.name for p in list_profiles()]
    data = json.loads(shown(capsys, "--profiles", "--json"))
    assert [p["name"] for p in data["profiles"]] == names and len(names) > 5
    text = shown(capsys, "--profiles")
    assert all(name in text for name in names)


def test_damage_is_found_unless_asked_not_to_look(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_toy(tmp_path / "m.edge")
    raw = bytearray((tmp_path / "m.edge").read_bytes())
    raw[-128] ^= 1
    (tmp_path / "m.edge").write_bytes(raw)
    error = shown(capsys, tmp_path / "m.edge", code=1)
    assert error.startswith("error: ") and "does not match its digest" in error and error.count("\n") == 1
    assert "digests of the data not checked" in shown(capsys, tmp_path / "m.edge", "--no-verify")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no-such.edge"], "no-such.edge: no such file; build one with edge-build"),
        ([], "which engine file? (see edge-inspect --help)"),
        (["--qualty", "x"], "unknown option '--qualty': did you mean '--quality'?"),
        (["--qual", "x"], "unknown option '--qual': did you mean '--quality'?"),
        (["a", "b"], "unexpected argument 'b' (see edge-inspect --help)"),
        (["/dev/zero"], "/dev/zero: not a regular file"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {message}") and err.count("\n") == 1
    assert inspect.main([*argv, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert set(found) == {"error"} and found["error"]["message"].startswith(message)
    assert found["error"]["type"] in ("BadConfig", "BadEngineFile")


def _parser() -> Parser:
    return Parser("edge-toy", "A toy.", ["edge-toy --json"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BadEngineFile("bad"), 1),
        (Unsupported("no"), 1),
        (DoesNotFit("too large", need=10, have=5, source="the profile"), 2),
        (QualityLimit("worse"), 3),
    ],
)
def test_exit_codes(error: EdgeError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def run(_: argparse.Namespace) -> Answer:
        raise error

    assert run_command(_parser(), run, ["--json"]) == code
    out, err = capsys.readouterr()
    found = json.loads(out)["error"]
    assert (found.pop("type"), found.pop("message")) == (type(error).__name__, str(error))
    assert found == ({"need": 10, "have": 5, "source": "the profile"} if code == 2 else {})
    assert err == f"error: {error}\n"


def test_a_result_may_come_with_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Answer({"perplexity": 20.0}, "perplexity 20", QualityLimit("above 15"))
    assert run_command(_parser(), lambda _: answer, ["--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert data["perplexity"] == 20.0 and data["error"]["message"] == "above 15"
    assert run_command(_parser(), lambda _: answer, []) == 3
    assert capsys.readouterr() == ("perplexity 20\n", "error: above 15\n")


def test_an_interrupt_is_130_and_a_fault_of_ours_is_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(_: argparse.Namespace) -> Answer:
        raise KeyboardInterrupt

    def broken(_: argparse.Namespace) -> Answer:
        raise ZeroDivisionError

    assert run_command(_parser(), interrupted, []) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert run_command(_parser(), interrupted, ["--json"]) == 130
    assert json.loads(capsys.readouterr().out)["error"]["message"] == "interrupted"
    with pytest.raises(ZeroDivisionError):
        run_command(_parser(), broken, [])


def test_words_of_a_hostile_file_do_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    escape = "\x1b]0;title\x07\x9b31m"
    assert escape[0] not in table([(escape, 1)])

    def run(_: argparse.Namespace) -> Answer:
        raise BadEngineFile(f"bad\n{escape}")

    assert run_command(_parser(), run, []) == 1
    err = capsys.readouterr().err
    assert not set(err[:-1]) & {"\x1b", "\x07", "\x9b", "\n"}


def test_help_has_examples_and_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        inspect.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    for line in (
        *inspect.EXAMPLES,
        "exit codes: 0 done, 1 bad input, 2 does not fit, 3 quality limit broken",
    ):
        assert line in text


def test_tables_align_and_sizes_read_well() -> None:
    assert (
        table([("a", 1), ("bcd", 22)], ("name", "n"), right=(1,)) == "name   n\n----  --\na      1\nbcd   22"
    )
    assert table([]) == ""
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024, 3 << 30)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "1.5 MiB",
        "3.00 GiB",
    ]


def test_as_a_process(engine_path: Path, tmp_path: Path) -> None:
    """Exit codes as a shell sees them, a closed pipe, a name that is no text: never a traceback."""
    command = [sys.executable, "-m", "edge_runtime.cli.inspect"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def process(*argv: str | bytes, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *argv], capture_output=True, text=True, check=False, env=environment, **options
        )  # type: ignore[call-overload, no-any-return]

    good = process(str(engine_path), "--json")
    assert good.returncode == 0 and json.loads(good.stdout)["name"] == "toy" and good.stderr == ""
    bad = process(os.fsencode(tmp_path) + b"/\xff.edge", "--json")
    assert bad.returncode == 1 and json.loads(bad.stdout)["error"]["type"] == "BadEngineFile"
    assert "Traceback" not in bad.stderr
    line = f"{sys.executable} -m edge_runtime.cli.inspect {engine_path} --tensors --json | true"
    piped = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, env=environment)
    assert piped.stderr == ""
