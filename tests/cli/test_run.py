"""edge-run: text on stdout and nothing else, figures on stderr, one object with --json, exit codes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from speaking_engine import write_speaking

from edge_runtime import Sampling, open_engine
from edge_runtime.cli import run
from edge_runtime.engine.formats import abi_hash
from edge_runtime.engine.manifest import Fingerprint, KnownAnswer
from edge_runtime.errors import NumericError

ORIN = Fingerprint(
    profile="orin-nano-8gb", backend="cuda", compute_capability="8.7", abi=f"{abi_hash():016x}"
)
FIXED = ("--backend", "reference", "--max-tokens", "6")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engines")
    write_speaking(path / "chat.edge")
    with open_engine(path / "chat.edge", backend="reference") as session:
        answer = session.complete([7, 8, 9], max_tokens=8).tokens
    good = KnownAnswer(prompt=(7, 8, 9), answer=answer, backend="reference")
    bad = KnownAnswer(prompt=(7, 8, 9), answer=tuple(t ^ 1 for t in answer), backend="reference")
    write_speaking(path / "plain.edge", template=None, known_answer=good)
    write_speaking(path / "sick.edge", template=None, known_answer=bad)
    write_speaking(path / "orin.edge", fingerprint=ORIN)
    return path


def call(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = run.main([str(a) for a in argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_text_streams_to_stdout_and_figures_to_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_engine(folder / "plain.edge", backend="reference") as session:
        want = session.complete("Once upon", max_tokens=6)
    code, out, err = call(capsys, folder / "plain.edge", "Once upon", *FIXED)
    assert code == 0
    assert out == run._visible(want.text) + "\n"
    for words in ("first token ", " tokens/s", "memory planned ", ", used "):
        assert words in err


def test_options_may_stand_between_the_engine_and_the_prompt(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = str(folder / "plain.edge")
    texts = []
    for words in ([engine, "once", *FIXED], [engine, *FIXED, "once"], [*FIXED, engine, "once"]):
        assert run.main(words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] and len(set(texts)) == 1


def test_json_is_one_object_with_everything(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--temperature", "0.8", "--top-k", 40, "--top-p", 0.9, "--min-p", 0.01, "--seed", 3)
    options += ("--repetition-penalty", 1.1, "--frequency-penalty", 0.1, "--presence-penalty", 0.1)
    code, out, _ = call(
        capsys, folder / "plain.edge", "Once upon", *FIXED, *options, "--logprobs", 2, "--json"
    )
    assert code == 0
    data = json.loads(out)
    sampling = Sampling(
        temperature=0.8, top_k=40, top_p=0.9, min_p=0.01, seed=3, repetition_penalty=1.1,
        frequency_penalty=0.1, presence_penalty=0.1, logprobs=2,
    )  # fmt: skip
    with open_engine(folder / "plain.edge", backend="reference") as session:
        want = session.complete("Once upon", sampling, max_tokens=6)
    assert (data["text"], data["tokens"], data["finish_reason"]) == (want.text, list(want.tokens), "length")
    assert data["usage"] == {
        "prompt_tokens": want.usage.prompt_tokens,
        "completion_tokens": 6,
        "cached_tokens": 0,
        "drafted": 0,
        "accepted": 0,
    }
    assert data["logprobs"] == list(want.logprobs) and len(data["top_logprobs"][0]) == 2
    assert data["timing"]["ttft_ms"] > 0 and data["timing"]["tokens_per_s"] > 0
    assert data["memory"]["planned_bytes"] > 0 and data["memory"]["used_bytes"] > 0
    assert data["backend"] == "reference" and data["kv"] == {"k": "int8", "v": "int8"}


def test_stop_text_and_ids(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = (folder / "plain.edge", "Once upon", *FIXED, "--json")
    whole = json.loads(call(capsys, *base)[1])
    stopped = json.loads(call(capsys, *base, "--stop-id", whole["tokens"][2])[1])
    assert stopped["finish_reason"] == "stop" and stopped["tokens"] == whole["tokens"][:3]
    word = whole["text"][3:]
    cut = json.loads(call(capsys, *base, "--stop", "never said", "--stop", word)[1])
    assert cut["finish_reason"] == "stop" and cut["text"] == whole["text"][: whole["text"].index(word)]


def test_with_a_template_a_prompt_is_a_turn(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("minijinja")
    with open_engine(folder / "chat.edge", backend="reference") as session:
        turn = {"role": "user", "content": "go"}
        chat = session.chat([turn], max_tokens=6).tokens
        told = session.chat([{"role": "system", "content": "be brief"}, turn], max_tokens=6).tokens
        raw = session.complete("go", max_tokens=6).tokens

    def tokens(*options: str) -> list[int]:
        found: list[int] = json.loads(
            call(capsys, folder / "chat.edge", "go", *FIXED, "--json", *options)[1]
        )["tokens"]
        return found

    assert tokens() == tokens("--chat") == list(chat)
    assert tokens("--system", "be brief") == list(told)
    assert tokens("--raw") == tokens("--no-chat") == list(raw)


def test_a_conversation_remembers_resets_and_survives_a_bad_turn(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("minijinja")
    lines = ["one", "\udc80 not text", "two", "/reset", "one", "", "/quit", "never"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    code, out, err = call(capsys, folder / "chat.edge", "--backend", "reference", "--max-tokens", 3)
    assert code == 0
    with open_engine(folder / "chat.edge", backend="reference") as session:
        one = {"role": "user", "content": "one"}
        first = session.chat([one], max_tokens=3).text
        messages = [one, {"role": "assistant", "content": first}, {"role": "user", "content": "two"}]
        second = session.chat(messages, max_tokens=3).text
    assert out == "".join(run._visible(t) + "\n" for t in (first, second, first))
    assert err.count("first token") == 3 and "lone surrogate" in err


def test_verify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capsys, folder / "plain.edge", "--verify", "--json", "--backend", "reference")
    assert code == 0 and json.loads(out)["verified"] is True and "known answer: repeated" in err
    code, out, err = call(capsys, folder / "sick.edge", "hi", "--verify", *FIXED)
    assert (code, out) == (1, "") and "the known answer is not repeated: 0 of 8" in err


def test_an_answer_that_fails_is_exit_code_1_with_what_there_is(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edge_runtime.backends.reference import ReferenceExecutor

    forward, calls = ReferenceExecutor.forward, []

    def failing(self: ReferenceExecutor, batch: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise NumericError("NaN in layer 1")
        return forward(self, batch)

    monkeypatch.setattr(ReferenceExecutor, "forward", failing)
    code, out, err = call(capsys, folder / "plain.edge", "hi", *FIXED, "--json")
    data = json.loads(out)
    assert code == 1 and "NaN in layer 1" in err
    assert data["finish_reason"] == "error" and len(data["tokens"]) == 3
    assert data["error"]["type"] == "NumericError"


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (("missing.edge", "hi"), 1, "no such file; build one with edge-build"),
        ((), 1, "which engine file?"),
        (("plain.edge", "hi", "--backend", "cup"), 1, "did you mean 'cpu'?"),
        (("plain.edge", "hi", "--tempreature", "1"), 1, "'--tempreature': did you mean '--temperature'?"),
        (("plain.edge", "hi", "--top-k", "x"), 1, "'x' is not an integer"),
        (("plain.edge", "hi", "--top-p", "0"), 1, "top_p is 0.0, expected a number above 0"),
        (("plain.edge", "hi", "--chat", *FIXED), 1, "no chat template"),
        (("plain.edge", "hi", "--system", "x", *FIXED), 1, "--system needs a chat"),
        (("plain.edge", *FIXED), 1, "no chat template"),
        (("plain.edge", *FIXED, "--raw"), 1, "--raw needs a PROMPT"),
        (("plain.edge", "--json"), 1, "--json needs a PROMPT"),
        (("plain.edge", "", *FIXED), 1, "the prompt is empty"),
        (("plain.edge", "\udcff", *FIXED), 1, "lone surrogate"),
        (("plain.edge", "hi", "--kv", "int9", "--json"), 1, "unknown KV format 'int9'"),
        (("plain.edge", "hi", "--kv", "int9", *FIXED), 1, "unknown KV format 'int9'"),
        (("plain.edge", "hi", "--context", "65", *FIXED), 1, "planned for 2 to 64 tokens"),
        (("plain.edge", "hi", "--memory-limit", "10 parsecs", *FIXED), 1, "a size such as 512MiB"),
        (("plain.edge", "hi", "--memory-limit", "1KiB", *FIXED), 2, "but the memory limit gives"),
    ],
)  # fmt: skip
def test_mistakes(
    folder: Path, capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], code: int, message: str
) -> None:
    words = [str(folder / argv[0]), *argv[1:]] if argv else []
    got, out, err = call(capsys, *words)
    assert got == code and message in err
    if "--json" in words:
        assert message in json.loads(out)["error"]["message"]
    else:
        assert out == ""


def test_another_device_is_refused_but_tried_on_request(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = call(capsys, folder / "orin.edge", "hi", "--raw", "--json")
    assert code == 1 and json.loads(out)["error"]["type"] == "DeviceMismatch"
    assert "orin-nano-8gb" in err and "--backend cpu" in err
    code, _, err = call(capsys, folder / "orin.edge", "hi", "--raw", *FIXED)
    assert code == 0 and "note: planned for orin-nano-8gb" in err


def test_profiles_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capsys, "--profiles")
    assert code == 0 and "orin-nano-8gb" in out


def test_help_has_examples_for_each_kind_of_use(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["--help"])
    out = capsys.readouterr().out
    assert caught.value.code == 0
    assert all(line in out for line in run.EXAMPLES) and "exit codes: 0 done, 1 bad input" in out


def test_a_models_control_characters_do_not_reach_the_terminal() -> None:
    assert run._visible("a\x1b[2Jb\x9b\t\né") == "a\\x1b[2Jb\\x9b\t\né"


def test_an_interrupt_ends_with_130(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("minijinja")
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-m", "edge_runtime.cli.run", str(folder / "chat.edge"), "--backend", "reference"],
        stdin=read, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip
    os.write(write, b"hi\n")
    assert process.stderr is not None
    while "first token" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    for end in (read, write):
        os.close(end)
