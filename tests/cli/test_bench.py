"""edge-bench: it measures what was asked for, medians are medians, answers stay the same, plots are plots."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from speaking_engine import write_speaking

from builders.cli import main as edge_build
from edge_runtime import Request, open_engine
from edge_runtime.backends import cpu
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.cli import bench, plots
from edge_runtime.cli.measure import measure_level, measure_speed
from edge_runtime.cli.speedup import Side, Speedup
from edge_runtime.engine.manifest import KnownAnswer
from edge_runtime.engine.plan import StepShape
from edge_runtime.serving.draft import DraftModel
from edge_runtime.serving.gate import expected
from edge_runtime.serving.lookup import Lookup
from edge_runtime.serving.pace import Pace
from edge_runtime.serving.speculative import Speculation

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
QUICK = ("--backend", "reference", "--repeat", "3")
ONCE = ("--backend", "reference", "--repeat", "1", "--requests", "3", "--max-tokens", "12")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "speaking.edge"
    write_speaking(path, known_answer=KnownAnswer(prompt=(1, 5, 9), answer=(3, 4), backend="reference"))
    return path


@pytest.fixture(scope="module")
def planner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped planner with its draft model."""
    if not cpu.BACKEND.available().ok:
        pytest.skip("the native library is not built")
    path = tmp_path_factory.mktemp("planner") / "planner.edge"
    words = ["--profile", "cpu", "--weights", "int4_g64", "--kv", "int8", "--no-eval", "--context", "256"]
    words += ["--draft", str(PLANNER / "draft"), "-o", str(path), str(PLANNER / "model")]
    assert edge_build(words) == 0
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = bench.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def found(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    """What --json says of a run that succeeds."""
    code, out, err = call(capsys, *argv, "--json")
    assert code == 0, err
    data: dict[str, Any] = json.loads(out)
    return data


# --- speed ---


def test_json_has_a_row_for_each_length_and_depth(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--prompts", "4,20", "--depths", "2,30", "--decode", "5", "--only", "speed")
    data = found(capsys, engine, *QUICK, *options)
    assert [(r["kind"], r["depth"], r["tokens"]) for r in data["rows"]] == [
        ("prefill", 0, 4), ("prefill", 0, 20), ("decode", 2, 5), ("decode", 30, 5),
    ]  # fmt: skip
    for row in data["rows"]:
        assert len(row["seconds"]) == 3 and all(s > 0 for s in row["seconds"])
        assert row["tokens_per_s"] == pytest.approx(row["tokens"] / statistics.median(row["seconds"]))
        assert row["slowest_tokens_per_s"] <= row["tokens_per_s"] <= row["fastest_tokens_per_s"]
    assert data["predicted_decode_tokens_per_s"] == 100.0 and data["backend"] == "reference"
    assert data["sections"] == ["speed"]
    assert data["requests"] is None and data["speculation"] is None and data["prefix"] is None


def test_seconds_are_those_of_the_steps(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ReferenceExecutor.forward
    steps: list[StepBatch] = []

    def slow(self: ReferenceExecutor, batch: StepBatch) -> object:
        steps.append(batch)
        time.sleep(0.02)
        return forward(self, batch)

    monkeypatch.setattr(ReferenceExecutor, "forward", slow)
    with open_engine(engine, backend="reference") as session:
        rows = measure_speed(session, [4, 40], [3], 6, 2)
    # 4 tokens are one step, 40 are three of at most 16; 6 decoded tokens are six
    for row, count in zip(rows, (1, 3, 6), strict=True):
        assert all(0.02 * count <= s < 0.02 * count + 2.0 for s in row.seconds)
    # Nothing comes out of the prefix cache: warm-up 1 + 1, then twice 1 + 3 + (1 + 6)
    assert len(steps) == 2 + 2 * (1 + 3 + 7)


# --- requests ---


def test_every_request_of_every_round_is_counted(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = found(
        capsys, engine, "--backend", "reference", "--only", "requests", "--repeat", "2", "--requests", "5",
        "--max-tokens", "7", "--concurrency", "1,2",
    )  # fmt: skip
    asked = data["requests"]
    assert asked["prompts"] == "the known answer's prompt and 4 of 24 random tokens each"
    assert (asked["max_tokens"], asked["speculation"]) == (7, "off")
    assert [level["concurrency"] for level in asked["levels"]] == [1, 2]
    for level in asked["levels"]:
        figures = level["figures"]
        assert level["rounds"] == 2 and figures["finished"] == {"length": 10}
        assert figures["tokens"] == 70 and figures["prompt_tokens"] == 2 * (3 + 4 * 24)
        # A round knows nothing of the one before; two random prompts may begin with the same token or two
        assert figures["cached_tokens"] < 10 and figures["missed"] == 0 and figures["pages_used"] == 0
        assert figures["pages_kept"] > 0 and figures["speculate"] == "off"
        assert figures["memory_planned"] > 0 and figures["memory_used"] > 0
        assert 0 < level["slowest_tokens_per_s"] <= level["tokens_per_s"] <= level["fastest_tokens_per_s"]
        assert level["request_tokens_per_s"] > 0
        # 24 + 7 tokens take 2 pages each
        assert level["pages_peak"] == 2 * level["concurrency"] <= figures["pages"]
        latency = level["latency"]
        assert latency["position"] == [2, 3, 4, 5, 6, 7]
        for p50, p95 in zip(latency["p50_ms"], latency["p95_ms"], strict=True):
            assert 0 < p50 <= p95


def test_so_many_are_in_flight(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    forward = ReferenceExecutor.forward

    def seen(self: ReferenceExecutor, batch: StepBatch) -> object:
        sizes.append(len(batch.page_tables))
        return forward(self, batch)

    monkeypatch.setattr(ReferenceExecutor, "forward", seen)
    asked = [Request(prompt=[5 + i], max_tokens=4, ignore_eos=True) for i in range(4)]
    with open_engine(engine, backend="reference") as session:
        for concurrency in (1, 2):
            sizes.clear()
            measure_level(session, asked, concurrency, 1)
            assert max(sizes) == concurrency


def test_long_latency_curves_are_thinned(engine: Path) -> None:
    with open_engine(engine, backend="reference") as session:
        level = measure_level(session, [Request(prompt=[5], max_tokens=63, ignore_eos=True)], 1, 1)
        assert [at for at, _, _ in level.latency] == list(range(2, 64))
    path = engine.with_name("long.edge")
    write_speaking(path, context=128)
    with open_engine(path, backend="reference") as session:
        level = measure_level(session, [Request(prompt=[5], max_tokens=127, ignore_eos=True)], 1, 1)
        assert [at for at, _, _ in level.latency] == list(range(2, 128, 2))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompts.txt", "bring the mug\n\ngo to the kitchen\n"),
        ("prompts.jsonl", '{"prompt": "bring the mug"}\n{"prompt": "go to the kitchen", "expected": 1}\n'),
    ],
)
def test_prompts_of_a_file_are_chat_turns(
    engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: str
) -> None:
    (tmp_path / name).write_text(text)
    options = ("--only", "requests", "--text", tmp_path / name, "--concurrency", "2")
    data = found(capsys, engine, *ONCE, *options)
    with open_engine(engine, backend="reference") as session:
        turns = [
            len(session.chat_prompt([{"role": "user", "content": content}]))
            for content in ("bring the mug", "go to the kitchen", "bring the mug")
        ]
    assert data["requests"]["prompts"] == f"2 chat turns of {name}"
    assert data["requests"]["levels"][0]["figures"]["prompt_tokens"] == sum(turns)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.txt", "\n  \n", "holds no prompt"),
        ("long.txt", "mug\n" + "red mug " * 60, "line 2: "),
        ("bad.jsonl", '{"prompt": "mug"}\n{"text": "mug"}\n', "line 2: expected an object such as"),
        ("bad2.jsonl", "mug\n", "line 1: expected an object such as"),
        ("bytes.txt", b"\xff\xfe", "not UTF-8 text"),
        ("missing.txt", None, "No such file"),
    ],
)
def test_a_file_that_does_not_suit_is_refused(
    engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, text: Any, message: str
) -> None:
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    code, out, err = call(capsys, engine, *ONCE, "--text", tmp_path / name)
    assert (code, out) == (1, "") and f"--text {tmp_path / name}" in err and message in err


# --- speculation ---


def test_step_times_are_verification_and_guessing() -> None:
    pace = Pace()
    pace.note(1, 1.0)
    pace.note(5, 3.0)
    policy = Speculation(Lookup(8), pace)
    assert (policy.step_seconds(0), policy.step_seconds(4), policy.step_seconds(2)) == (1.0, 3.0, 2.0)
    draft = DraftModel(None, StepShape(context=8, sequences=1, tokens=8, logits=1), 16, 4)  # type: ignore[arg-type]
    draft.pace.note(1, 0.25)
    draft.pace.note(2, 0.5)
    assert Speculation(draft, pace).step_seconds(4) == 3.0 + 0.5 + 3 * 0.25


def test_fixed_lengths_are_kept_and_leave_the_gate_alone(planner: Path) -> None:
    with open_engine(planner, threads=1) as session:
        policy, metrics = session.speculation, session.metrics
        assert policy.fixed is None and policy.lengths == tuple(range(1, 9))
        request = session.chat_request([{"role": "user", "content": "bring me the red mug"}], max_tokens=40)
        policy.fixed = 2
        answer = session.answer(request)
        assert 0 < metrics.drafted <= 2 * metrics.verified and metrics.verified >= 5
        assert metrics.accepted <= metrics.tried <= metrics.drafted == answer.usage.drafted
        assert policy.gate.usual.drafted == 0 and not policy.gate.is_open
        verified = metrics.verified
        assert session.answer(replace(request, speculate=False)).tokens == answer.tokens
        assert metrics.verified == verified
        policy.fixed = None
        assert session.answer(request).tokens == answer.tokens


def test_ratios_are_of_the_same_round() -> None:
    plain = Side("plain", 0, decoding=[1.0, 4.0, 2.0], whole=[2.0, 5.0, 3.0])
    side = Side("2", 2, decoding=[0.5, 1.0, 4.0], whole=[1.0, 2.0, 6.0])
    both = Speedup("draft", "", (plain, side), 0.5, 0, 6)
    assert both.ratios(side) == [2.0, 4.0, 0.5] and both.ratios(side, whole=True) == [2.0, 2.5, 0.5]


def test_lookup_is_measured_when_asked_for(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backend = "cpu" if cpu.BACKEND.available().ok else "reference"
    data = found(
        capsys, engine, "--backend", backend, "--repeat", "2", "--requests", "3", "--max-tokens", "40",
        "--only", "speculation", "--speculate", "lookup", "--draft-lengths", "1,3",
    )  # fmt: skip
    way = data["speculation"]
    assert (way["way"], way["answers"], way["same_tokens"]) == ("lookup", 3 * 2 * 3, True)
    assert [side["draft_length"] for side in way["sides"]] == [1, 3, None]
    for side in way["sides"]:
        assert 0 < side["slowest"] <= side["speedup"] <= side["fastest"]
        assert 0 <= side["accepted"] <= side["drafted"] and side["tokens_per_step"] >= 1
    assert data["sections"] == ["speculation"] and data["rows"] == [] and data["requests"] is None


def test_other_tokens_than_plain_decoding_are_a_failure(
    planner: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime.serving import loop

    def credulous(rows: Any, proposal: Any, sampler: Any) -> Any:
        """Every guess stands, whatever the model says."""
        tokens = [] if proposal is None else list(proposal.tokens)
        for at, row in enumerate(rows):
            choice = sampler.choose(row)
            if at < len(tokens):
                choice = type(choice)(tokens[at] ^ 1, choice.logprob, choice.top)
            yield choice, at if at < len(tokens) else None

    monkeypatch.setattr(loop, "walk", credulous)
    code, out, err = call(
        capsys, planner, "--only", "speculation", "--repeat", "1", "--requests", "2", "--max-tokens", "12",
        "--draft-lengths", "2", "--json",
    )  # fmt: skip
    data = json.loads(out)
    assert code == 1 and "differ with speculation" in err
    assert data["speculation"]["same_tokens"] is False and data["error"]["type"] == "NumericError"


# --- all of it, on a real model with a draft ---


def test_the_planner_with_its_draft(
    planner: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    data = found(
        capsys, planner, "--threads", "1", "--repeat", "2", "--requests", "4", "--max-tokens", "48",
        "--prompts", "16", "--depths", "1", "--decode", "8", "--prefix-tokens", "100",
        "--text", PLANNER / "heldout.jsonl", "--draft-lengths", "1,4", "--concurrency", "1,4",
    )  # fmt: skip
    assert data["sections"] == list(bench.SECTIONS)
    assert [row["kind"] for row in data["rows"]] == ["prefill", "decode"]
    assert data["requests"]["speculation"] == "draft"
    assert data["requests"]["prompts"] == "4 chat turns of heldout.jsonl"
    assert [level["figures"]["finished"] for level in data["requests"]["levels"]] != []
    for level in data["requests"]["levels"]:
        assert sum(level["figures"]["finished"].values()) == 8
    way = data["speculation"]
    assert way["way"] == "draft" and way["same_tokens"] and way["answers"] == 3 * 2 * 4
    assert way["plain_tokens_per_s"] > 0 and 0.5 < way["chance"] <= 1.0  # commands it was trained for
    one, four, gated = way["sides"]
    for side, length in ((one, 1), (four, 4)):
        assert side["draft_length"] == length and side["drafted"] > 0 and side["formula"] > 0
        assert 1 < side["tokens_per_step"] <= length + 1 and side["step_ms"] > 0
        assert side["acceptance"] == pytest.approx(side["accepted"] / side["drafted"])
    assert four["tokens_per_step"] > one["tokens_per_step"]
    # The formula's tokens are what happened, give or take the ends of answers
    for side in (one, four):
        assert side["tokens_per_step"] == pytest.approx(
            expected(way["chance"], side["draft_length"]), rel=0.25
        )
    assert gated["draft_length"] is None and gated["formula"] is None and gated["speedup"] > 0
    prefix = data["prefix"]
    assert (prefix["prefix_tokens"], prefix["prompt_tokens"], prefix["cached_tokens"]) == (100, 108, 96)
    assert prefix["same_tokens"] and prefix["file_bytes"] > 0
    for name in ("computed", "cached", "loaded", "loading"):
        assert 0 < prefix[name]["min_ms"] <= prefix[name]["median_ms"] <= prefix[name]["max_ms"]


def test_the_tables_name_everything(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, engine, *ONCE, "--decode", "4", "--speculate", "lookup")
    assert code == 0
    assert out.startswith("speaking on reference, KV int8,int8, median of 1")
    assert "100.0 tokens/s decode predicted" in out and out.count("\ndecode") == 2
    assert [line.split(":")[0] for line in out.splitlines() if ": " in line and line[0].islower()] == [
        "speed", "requests", "speculation", "prefix", "planned for cpu",
    ]  # fmt: skip
    for section in bench.SECTIONS:
        assert f"{section}: " in err  # progress


def test_plot(engine: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    options = ("--decode", "4", "--speculate", "lookup", "--plot", tmp_path / "speed.svg")
    code, _, _ = call(capsys, engine, *ONCE, *options)
    drawn = (tmp_path / "speed.svg").read_text()
    assert code == 0 and drawn.rstrip().endswith("</svg>")
    for words in (
        "speaking on reference, KV int8,int8", "reading a prompt", "plain decoding, one request",
        "ms since the token before", "requests at once", "draft length (tokens)",
        "first token after a prefix of 32 tokens",
    ):  # fmt: skip
        assert f"<!-- {words} -->" in drawn
    code, _, _ = call(capsys, engine, *ONCE, "--only", "prefix", "--plot", tmp_path / "prefix.png")
    assert code == 0 and (tmp_path / "prefix.png").read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_is_refused_before_measuring(
    engine: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(bench, "measure_speed", lambda *a: pytest.fail("measured"))
    code, out, err = call(capsys, engine, *QUICK, "--plot", "speed.svg")
    assert (code, out) == (1, "") and "pip install 'edge-runtime[plot]'" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "which engine file?"),
        (("--prompts", "64"), "--prompts 64: expected 1 to 63"),
        (("--prompts", "a"), "expected numbers such as 64,512"),
        (("--depths", "40"), "--depths 40: expected 0 to 31"),
        (("--decode", "63"), "--decode 63: expected 1 to 62"),
        (("--repeat", "0"), "--repeat 0: expected 1 to 1000"),
        (("--requests", "1001"), "--requests 1001: expected 1 to 1000"),
        (("--max-tokens", "64"), "--max-tokens 64: expected 1 to 63"),
        (("--concurrency", "1,3"), "--concurrency 3: expected 1 to 2"),
        (("--prefix-tokens", "56"), "--prefix-tokens 56: expected 16, a page, to 55"),
        (("--draft-lengths", "65"), "--draft-lengths 65: expected 1 to 64"),
        (("--draft-lengths", "5", "--draft-length", "4"), "--draft-lengths 5: expected 1 to 4"),
        (("--only", "speed,requestz"), "--only 'requestz': did you mean 'requests'?"),
        (("--only", "speculation"), "does not guess ahead; open it with --speculate"),
        (
            ("--only", "prefix", "--context", "24", "--decode", "4"),
            "must hold a prefix of a page, 16 tokens, and 9 more",
        ),
        (("--plot", "speed.gif"), "ends in .svg or .png"),
        (("--threads", "-1"), "threads is -1"),
    ],
)
def test_mistakes(
    engine: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    words = (engine, "--backend", "reference", *argv) if argv else ()
    code, out, err = call(capsys, *words)
    assert (code, out) == (1, "") and message in err


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--profiles")
    assert code == 0 and "thor-t5000" in out
