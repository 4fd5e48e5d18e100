"""What a plan says of itself: every tensor's neighbours, prices that hold, a table and a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hf_folders import llama_config, write_model

from builders.archs import read_program
from builders.budgets import parse_bytes, parse_formats
from builders.cli import main
from builders.explain import Explanation, explain
from builders.explanation_text import explanation_text, layer_bits, layer_rows
from builders.losses import losses_of
from builders.planner import KV_CHOICES, Request, candidates, choose
from builders.sensitivity import Sensitivity, read_sensitivity
from edge_runtime.engine.file import read_engine
from edge_runtime.engine.profile import load_profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig

pytest.importorskip("scipy")

CONFIG = llama_config(
    vocab_size=1000, hidden_size=128, intermediate_size=352, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip
CPU = load_profile("cpu")


@pytest.fixture(scope="module")
def program() -> Program:
    return read_program(CONFIG).program


def explained(program: Program, request: Request) -> Explanation:
    plans, settled = choose(program, CPU, request)
    return explain(program, CPU, settled, plans)


def test_the_price_of_a_byte_is_what_bytes_buy(program: Program) -> None:
    """More memory lowers the loss by at most the price (the relaxation is convex), and by most of it."""
    request = Request(weights="auto", max_memory=1800 << 10)
    why = explained(program, request)
    (memory,) = why.budgets
    assert memory.used <= memory.limit and memory.price > 0 and memory.one_percent is not None
    step = 60 << 10
    wider = explained(program, replace(request, max_memory=(1800 << 10) + step))
    gain = why.loss - wider.loss
    slack = max(t.loss for t in why.tensors)
    assert wider.budgets[0].price * step - slack <= gain <= memory.price * step + slack
    assert memory.one_percent <= memory.price * 0.01 * memory.limit + slack


def test_every_tensor_names_its_neighbours(program: Program) -> None:
    request = Request(weights="auto", max_memory=1800 << 10)
    why = explained(program, request)
    losses = losses_of(program, None, candidates(CPU, request))
    names = {n for n, s in program.tensors.items() if s.role != "vector"}
    assert {t.name for t in why.tensors} == names
    assert why.loss == pytest.approx(sum(t.loss for t in why.tensors))
    for t in why.tensors:
        assert t.loss == losses.of(t.name, t.format)
        for move, up in ((t.better, True), (t.worse, False)):
            if move is None:
                continue
            assert (move.bytes > 0) == up and (move.loss < 0) == up
            assert t.loss + move.loss == pytest.approx(losses.of(t.name, move.format) or 0.0)
            assert move.loss_per_byte == pytest.approx(abs(move.loss / move.bytes))
    assert any(t.better for t in why.tensors) and any(t.worse for t in why.tensors)


def test_layers_of_the_table_add_up(program: Program) -> None:
    why = explained(program, Request(weights="auto", max_memory=1800 << 10, kv_choices=KV_CHOICES))
    rows = layer_rows(why)
    assert sum(r.bytes for r in rows) == sum(t.bytes for t in why.tensors)
    assert sum(r.loss for r in rows) == pytest.approx(why.loss - why.kv_loss)
    assert [label for label, _, _ in layer_bits(why)] == ["embed", *map(str, range(6)), "head"]
    text = explanation_text(why)
    assert "price of the next" in text and "bought next:" in text and "given up first:" in text


def test_a_budget_that_does_not_bind_has_no_price(program: Program) -> None:
    why = explained(program, Request(weights="auto", min_tokens_per_second=1.0, max_memory=64 << 20))
    assert [use.price for use in why.budgets] == [0.0, 0.0]
    assert "nothing: it does not bind" in explanation_text(why)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def dry(config: Path, *options: str) -> list[str]:
    return ["--dry-run", "--profile", "orin-nano-8gb", *options, str(config)]


def test_a_dry_run_with_budgets_says_all_of_it(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "plan.svg"
    options = [
        "--max-memory",
        "266MiB",
        "--min-tokens-per-second",
        "20",
        "--kv",
        "auto",
        "--plot",
        str(picture),
    ]
    assert main(dry(config, "--json", *options)) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["weights"] == "auto" and data["fits"] and data["memory"]["need"] <= 266 << 20
    assert data["predicted"]["decode_tokens_per_s"] >= 20
    why = data["explanation"]
    assert [b["name"] for b in why["budgets"]] == ["memory", "decode"]
    assert len(why["tensors"]) == 6 * 7 + 2 and why["budgets"][0]["used"] == data["memory"]["need"]
    assert picture.read_text().startswith("<?xml")
    assert main(dry(config, *options)) == 0
    assert "price of the next" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--max-memory", "100MiB"], 2, "--max-memory allows 100.0 MiB; to fit, use --max-memory"),
        (["--min-tokens-per-second", "1e9"], 2, "to keep it, use --min-tokens-per-second"),
        (["--bits", "1"], 2, "to keep it, use --bits"),
        (["--max-memory", "3GiX"], 1, "did you mean 'GiB'"),
        (["--max-memory", "much"], 1, "expected a size such as 3GiB"),
        (["--formats", "int4_g46"], 1, "did you mean 'int4_g64'"),
        (["--sensitivity-file", "/nowhere.json"], 1, "/nowhere.json"),
        (["--plot", "plan.gif"], 1, "ending in .svg or .png"),
        (["--bits", "0"], 1, "--bits is 0.0"),
    ],
)
def test_what_is_wrong_is_one_line(
    config: Path, options: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(dry(config, *options)) == code
    error = capsys.readouterr().err.strip()
    assert words in error and len(error.splitlines()) == 1


def test_a_sensitivity_file_is_what_the_plan_follows(
    program: Program, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = [n for n, s in program.tensors.items() if s.role == "matrix"]
    losses = {n: {"int4_g64": 1.0 if n == "layers.3.v" else 0.001, "int8_row": 0.0} for n in names}
    kv = {"int8,int8": 0.5}
    found = Sensitivity(unit="kl", algorithm="rtn", text="t", tokens=9, losses=losses, kv_losses=kv)
    path = tmp_path / "losses.json"
    found.save(path)
    assert read_sensitivity(path) == found
    assert main(dry(config, "--json", "--sensitivity-file", str(path), "--bits", "5.6")) == 0
    why = json.loads(capsys.readouterr().out)["explanation"]
    formats = {t["name"]: t["format"] for t in why["tensors"]}
    assert why["unit"] == "kl" and formats["layers.3.v"] == "int8_row"
    assert "int4_g64" in formats.values()


def test_a_build_takes_the_budgets_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's tensors have the plan's formats, and the phase's JSON says why."""
    model = write_model(tmp_path / "toy")
    engine, phases = tmp_path / "toy.edge", tmp_path / "phases"
    options = ["--profile", "cpu", "--bits", "7", "--formats", "int4_g32,int8_row,f16", "--no-eval", "--json"]
    assert main([*options, "--keep-json", str(phases), "-o", str(engine), str(model)]) == 0
    assert 5 < json.loads(capsys.readouterr().out)["matrices"]["bits_per_weight"] <= 7  # what was asked for
    plan = read_engine(engine).part("language").plan
    kept = json.loads((phases / "plan.json").read_text())
    why = {t["name"]: t["format"] for t in kept["explanation"]["tensors"]}
    assert why == {n: t.format for n, t in plan.tensors.items() if n in why} and len(set(why.values())) > 1
    bits = next(b for b in kept["explanation"]["budgets"] if b["name"] == "bits")
    assert bits["used"] <= bits["limit"]


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("3GiB", 3 << 30), ("2.5 GB", 2_500_000_000), ("900mib", 900 << 20), ("1000", 1000), ("7 kB", 7000)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes("--max-memory", text) == nbytes


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "1e3", "0", "3 GiB GiB", "999999999999GiB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(BadConfig, match="--max-memory"):
        parse_bytes("--max-memory", text)


def test_formats_are_taken_once() -> None:
    assert parse_formats("int8_row, f16,int8_row") == ("int8_row", "f16")


@pytest.mark.parametrize("words", [["--weights", "int4_g32"], ["--bits", "7"]], ids=["uniform", "mixed"])
def test_a_build_draws_its_plan(words: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs it")
    model, picture = write_model(tmp_path / "toy"), tmp_path / "plan.svg"
    options = ["--profile", "cpu", "--no-eval", "--plot", str(picture), *words]
    assert main([*options, "-o", str(tmp_path / "toy.edge"), str(model)]) == 0
    assert "<svg" in picture.read_text()
    refused = main([*options, "--plot", "plan.gif", "-o", str(tmp_path / "no.edge"), str(model)])
    assert refused == 1 and not (tmp_path / "no.edge").exists()
