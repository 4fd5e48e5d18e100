"""Task files, and accuracy: against transformers' generation and log-probabilities, and a real session."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import write_model

from builders.archs import read_program
from builders.pipeline import Options, build
from builders.planner import Request, make_plans
from builders.runner import REFERENCE, Runner, checkpoint_runner, native_backend
from builders.sources import Source, open_source, read_vocabulary
from builders.task import Task, is_right, log_likelihood
from builders.task_file import Case, TaskFile, read_task, same_json
from builders.watcher import Watcher
from builders.weights import CheckpointWeights
from edge_runtime import Sampling, open_engine
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.profile import load_profile
from edge_runtime.errors import BadConfig

ROOT = Path(__file__).resolve().parents[2]
PLANNER = ROOT / "examples" / "planner"
STORIES = ROOT.parent / "shared" / "data" / "models" / "stories260K"


def task_file(folder: Path, *records: dict[str, Any]) -> Path:
    path = folder / "cases.jsonl"
    path.write_text("\n".join(map(json.dumps, records)) + "\n", encoding="utf-8")
    return path


# --- the file ---------------------------------------------------------------------------------------------

GOOD: dict[str, Any] = {"prompt": "a", "expected": "b"}
CHOICE: dict[str, Any] = {"prompt": "a", "expected": "b", "scoring": "choice", "choices": ["b", "c"]}


def test_a_file_is_read_with_its_defaults(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "x"}]
    records = (
        GOOD,
        {"messages": messages, "expected": '{"a": 1}', "scoring": "json", "max_tokens": 7},
        {"prompt": "a", "expected": [1, None], "scoring": "json"},
        CHOICE | {"expected": "c"},
    )
    path = task_file(tmp_path, *records)
    path.write_text(
        path.read_text().replace("\n", "\n\n", 1), encoding="utf-8"
    )  # an empty line counts as one
    found = read_task(path)
    assert found.name == "cases.jsonl"
    assert found.cases == (
        Case(1, "a", "b", "exact", (), 256),
        Case(3, tuple(messages), {"a": 1}, "json", (), 7),
        Case(4, "a", [1, None], "json", (), 256),
        Case(5, "a", 1, "choice", ("b", "c"), 256),
    )


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (GOOD | {"expectd": 1}, "unknown key 'expectd': did you mean 'expected'"),
        (GOOD | {"message": []}, "unknown key 'message': did you mean 'messages'"),
        (GOOD | {"scoring": "jsn"}, "unknown scoring 'jsn': did you mean 'json'"),
        ({"expected": "b"}, "either 'prompt' or 'messages'"),
        (GOOD | {"messages": [{"role": "user", "content": "x"}]}, "either 'prompt' or 'messages'"),
        ({"prompt": "a"}, "'expected' is missing"),
        ({"prompt": "", "expected": "b"}, "at least one character"),
        ({"messages": [{"role": "user"}], "expected": "b"}, "'messages': expected"),
        (GOOD | {"expected": 3}, "'expected' is int, expected text"),
        (GOOD | {"scoring": "json", "expected": "{"}, "text that is no JSON"),
        (GOOD | {"max_tokens": 0}, "'max_tokens' is 0"),
        (GOOD | {"max_tokens": True}, "'max_tokens' is True"),
        (GOOD | {"choices": ["b"]}, "'choices' has no meaning"),
        (CHOICE | {"choices": ["b"]}, "expected 2 to 64 texts"),
        (CHOICE | {"choices": ["b", "b"]}, "texts that differ"),
        (CHOICE | {"expected": "bb"}, "none of the choices: did you mean 'b'"),
        (CHOICE | {"max_tokens": 3}, "'max_tokens' has no meaning"),
        ([1], "list, expected an object"),
    ],
)
def test_mistakes_name_the_line(record: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(record)}\n")
    with pytest.raises(BadConfig, match=r"cases\.jsonl line 2: ") as caught:
        read_task(path)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "holds no cases"),
        (b"{'a'", "line 1: not valid JSON"),
        (b'{"prompt": "a", "expected": NaN}', "line 1: not valid JSON"),
        (b"[" * 100_000, "line 1: not valid JSON"),
        (b"\xff", "not UTF-8"),
        (None, "cannot read"),
    ],
)
def test_files_that_are_no_task_are_refused(data: bytes | None, words: str, tmp_path: Path) -> None:
    if data is not None:
        (tmp_path / "t.jsonl").write_bytes(data)
    with pytest.raises(BadConfig, match=words):
        read_task(tmp_path / "t.jsonl")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ('{"a": 1, "b": [true, null]}', '{"b": [true, null], "a": 1.0}', True),
        ("1", "true", False),
        ("[0]", "[false]", False),
        ("[1, 2]", "[2, 1]", False),
        ('{"a": 1}', '{"a": 1, "b": 2}', False),
        ('"1"', "1", False),
    ],
)
def test_json_values_are_equal_or_not(a: str, b: str, same: bool) -> None:
    assert same_json(json.loads(a), json.loads(b)) is same


@pytest.mark.parametrize(
    ("scoring", "expected", "answer", "right"),
    [
        ("exact", " a b", "a b\n", True),
        ("exact", "a b", "a  b", False),
        ("json", {"a": 1}, ' {"a":1} ', True),
        ("json", {"a": 1}, '{"a":1', False),
        ("json", {"a": 1}, "[" * 100_000, False),
        ("json", [], "[NaN]", False),
    ],
)
def test_answers_are_right_or_not(scoring: str, expected: Any, answer: str, right: bool) -> None:
    assert is_right(Case(1, "a", expected, scoring, (), 9), answer) is right


# --- against transformers ---------------------------------------------------------------------------------


@pytest.fixture(params=["cpu", "reference"])
def stories(request: pytest.FixtureRequest) -> Any:
    """stories260K: its open source, an f32 runner with two places and short steps, and it in transformers."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    if not (STORIES / "model.safetensors").is_file():
        pytest.skip(f"stories260K is not at {STORIES}")
    profile = load_profile("cpu")
    backend = REFERENCE if request.param == "reference" else native_backend(profile)
    if backend is None:
        pytest.skip("the native library is not built")
    model = transformers.AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32)
    with open_source(STORIES) as source:
        program = read_program(source.config).program
        weights = CheckpointWeights(read_program(source.config), source)
        asked = Request(weights="f32", context=128, step_tokens=7, sequences=2)
        plan = make_plans(program, profile, asked)[LANGUAGE]
        with checkpoint_runner(backend, weights, plan, context=128, places=2) as runner:
            yield source, runner, model


def texts(count: int) -> list[str]:
    story = (ROOT / "tests" / "text" / "story.txt").read_text(encoding="utf-8").split()
    return [" ".join(story[13 * i : 13 * i + 4 + 2 * i]) for i in range(count)]


def task_of(source: Source, *cases: Case) -> Task:
    vocabulary = read_vocabulary(source, 512)
    return Task(TaskFile("cases", cases), source, vocabulary, 128)


def test_choices_have_transformers_log_probabilities(stories: tuple[Source, Runner, Any]) -> None:
    import torch

    source, runner, model = stories
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    endings = (" went to the park with her mom", " big", " fish fish and the", " and")
    for i, text in enumerate(texts(6)):
        prompt = tokenizer(text).input_ids
        want = []
        for ending in endings:
            ids = tokenizer(text + ending).input_ids
            assert ids[: len(prompt)] == prompt
            with torch.no_grad():
                scores = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), dim=-1)
            rows = range(len(prompt) - 1, len(ids) - 1)
            want.append(float(sum(scores[r, ids[r + 1]] for r in rows)))
            found = log_likelihood(runner, np.array(ids, np.int32), len(ids) - len(prompt))
            assert found == pytest.approx(want[-1], abs=2e-3)
        best = int(np.argmax(want))
        for number in (best, (best + 1) % len(endings)):
            case = Case(i, text, number, "choice", endings, 256)
            assert task_of(source, case).answered(runner) == [number == best]


def test_white_space_before_a_choice_counts_to_it(stories: tuple[Source, Runner, Any]) -> None:
    source, runner, _ = stories
    answers = []
    for prompt, choices in (("Once upon a", (" time", " cat")), ("Once upon a ", ("time", "cat"))):
        task = task_of(source, Case(1, prompt, 0, "choice", choices, 256))
        answers.append([(ids.tolist(), n) for ids, n in task._cases[0].choices])
        assert task.answered(runner) == [True]
    assert answers[0] == answers[1]


def test_answers_are_transformers_greedy_ones(stories: tuple[Source, Runner, Any]) -> None:
    """More prompts than places, of which some end early: every answer is that of its prompt alone."""
    import torch

    source, runner, model = stories
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(STORIES)
    prompts = [tokenizer(text).input_ids for text in texts(5)]
    lengths = [20, 3, 17, 1, 30]
    want = []
    for ids, length in zip(prompts, lengths, strict=True):
        made = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids)),
            max_new_tokens=length,
            do_sample=False,
        )
        want.append(made[0, len(ids) :].tolist())
    heard: list[int] = []
    found = runner.greedy([np.array(p, np.int32) for p in prompts], lengths, {2}, heard.append)
    assert found == [ids[: ids.index(2)] if 2 in ids else ids for ids in want]
    assert sorted(heard) == list(range(5))
    stopped = runner.greedy([np.array(prompts[0], np.int32)], [20], {want[0][4]})
    assert stopped == [want[0][: want[0].index(want[0][4])]]
    # and through the task: text in, text out
    answer = tokenizer.decode(prompts[0] + want[0], skip_special_tokens=True)
    answer = answer[len(tokenizer.decode(prompts[0], skip_special_tokens=True)) :]
    cases = [Case(i, texts(1)[0], e, "exact", (), 20) for i, e in enumerate((answer, answer + "x"))]
    assert task_of(source, *cases).answered(runner) == [True, False]


# --- in a build -------------------------------------------------------------------------------------------


class Heard(Watcher):
    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.steps: list[str] = []

    def phase(self, name: str, steps: int) -> None:
        self.phases[name] = steps

    def step(self, what: str) -> None:
        self.steps.append(what)


def test_the_planner_scores_as_a_session_answers(tmp_path: Path) -> None:
    """At 4 bits everywhere some plans fail: the same ones as in a session."""
    lines = (PLANNER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    commands = [(r["prompt"], r["expected"]) for r in map(json.loads, lines)]
    records = [
        {
            "messages": [{"role": "user", "content": command}],
            "expected": plan if i % 4 else "[]",  # a quarter cannot be right
            "scoring": "json",
            "max_tokens": 200,
        }
        for i, (command, plan) in enumerate(commands)
    ]
    path = task_file(tmp_path, *records)
    request = Request(weights="int4_g128", head_weights="int4_g128", kv_k="int4", kv_v="int4")
    heard = Heard()
    done = build(
        Options(PLANNER / "model", tmp_path / "m.edge", "cpu", request, text_tokens=64, task=path), heard
    )
    assert done.manifest.quality is not None
    task = done.manifest.quality.task
    assert task is not None and (task.name, task.cases) == ("cases.jsonl", 40)
    right = 0
    with open_engine(tmp_path / "m.edge", backend=task.backend) as session:
        for (command, plan), record in zip(commands, records, strict=True):
            chat = [{"role": "user", "content": command}]
            answer = session.chat(chat, Sampling(temperature=0.0), max_tokens=200).text
            if record["expected"] == plan:
                with contextlib.suppress(ValueError):
                    right += json.loads(answer) == json.loads(plan)
    assert task.accuracy == right / 40
    assert task.accuracy_f32 is not None and 0.6 <= task.accuracy_f32 <= 0.75
    assert heard.phases["task"] == 80
    assert sum(step.startswith("engine line") for step in heard.steps) == 40
    assert sum(step.startswith("f32 line") for step in heard.steps) == 40


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "x" * 100, "expected": "y", "max_tokens": 100}, "line 1: prompt and answer need 20"),
        ({"messages": [{"role": "user", "content": "x"}], "expected": "y"}, "line 1: it has messages"),
        ({"messages": [{"role": "USER", "content": "x"}], "expected": "y"}, "line 1: "),
    ],
)
def test_cases_that_the_model_cannot_take_are_found_before_any_work(
    record: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = write_model(tmp_path / "toy")
    heard = Heard()
    with pytest.raises(BadConfig, match=words):
        build(Options(model, tmp_path / "m.edge", "cpu", task=task_file(tmp_path, record)), heard)
    assert not heard.phases and not (tmp_path / "m.edge").exists()
