"""Training of Medusa heads: what they see, what they are asked, that a run repeats and goes on; and that an
engine's head says what the trained one says."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import write_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from builders import medusa, training  # noqa: E402
from builders.lessons import Lesson, batches, read_lessons  # noqa: E402
from builders.medusa_heads import DECAY, Base, accuracy, ask, logits, new_heads, train_step  # noqa: E402
from builders.parts import Extras, open_contents  # noqa: E402
from builders.pipeline import Options, build  # noqa: E402
from builders.planner import Request  # noqa: E402
from edge_runtime.backends.protocol import Part, StepBatch  # noqa: E402
from edge_runtime.backends.reference import BACKEND, ReferenceExecutor  # noqa: E402
from edge_runtime.engine.file import read_engine  # noqa: E402
from edge_runtime.engine.plan import KvPlan, StepShape  # noqa: E402
from edge_runtime.errors import BadConfig  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
PLANNER = ROOT / "examples" / "planner"
TEXT = "abcdefghijklmnopqrstuvwxyz0123456789" * 60  # a letter says which ones follow
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("medusa") / "toy")
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def base(model: Path) -> Base:
    return Base(model)


def reference_hidden(folder: Path, ids: list[int]) -> np.ndarray:
    """Inputs of the logits op (tokens, hidden) by our own program on the reference backend, f32."""
    with open_contents(folder, Extras(), None) as contents:
        program, n = contents.target.program, len(ids)
        step = StepShape(context=n, sequences=1, tokens=n, logits=1)
        kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=-(-n // 16))
        executor = ReferenceExecutor(program, contents.target.weights, kv, step)
        at = np.arange(n, dtype=np.int32)
        table = np.arange(kv.pages, dtype=np.int32)[None]
        tokens = np.array(ids, np.int32)
        rows = executor.run_hidden(StepBatch(tokens, at, np.zeros(n, np.int32), table, at[-1:]))
    return np.asarray(rows)


@pytest.mark.parametrize("which", ["toy", "planner"])
def test_transformers_and_our_program_see_the_same_hidden_rows(model: Path, which: str) -> None:
    folder = model if which == "toy" else PLANNER / "model"
    base = Base(folder)
    ids = [(7 * i) % 250 + 5 for i in range(40)]
    want = reference_hidden(folder, ids)
    padded = torch.tensor([ids + [0] * 9, ids[::-1] + [0] * 9])  # rows on the right are not seen
    got = base.hidden(padded)[0, : len(ids)].numpy()
    assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()


def test_a_head_is_asked_for_the_token_after_the_next(base: Base) -> None:
    lesson = Lesson(tuple(range(10, 22)), 5)  # learned from ids[5] = 15 on, so asked from position 4 on
    asked = ask(base, [lesson, Lesson((40, 41, 42), 1)], 3)
    hidden = base.hidden(torch.tensor([lesson.ids]))[0]
    for k, (rows, targets) in enumerate(zip(asked.rows, asked.targets, strict=True), 1):
        positions = range(4, 12 - 1 - k)
        # the short row has three tokens: only head 1 finds one two places after its first
        extra = [42] if k == 1 else []
        assert targets.tolist() == [lesson.ids[p + 1 + k] for p in positions] + extra
        torch.testing.assert_close(rows[: len(positions)], hidden[list(positions)], rtol=1e-5, atol=1e-5)


def test_an_untrained_head_says_what_the_model_says(base: Base) -> None:
    heads = new_heads(base, 2, 1e-3)
    ids = torch.tensor([[5, 60, 70, 80]])
    rows = base.hidden(ids)[0]
    want = base.model(input_ids=ids).logits[0]
    torch.testing.assert_close(logits(heads, 2, rows), want, rtol=1e-5, atol=1e-5)


def test_the_loss_is_the_sum_of_the_heads_and_pieces_change_nothing(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = [Lesson(tuple(range(20, 60)), 1), Lesson(tuple(range(90, 40, -1)), 10)]
    whole, pieces = new_heads(base, 3, 1e-2), new_heads(base, 3, 1e-2)
    asked = ask(base, batch, 3)
    want = 0.0
    for k in (1, 2, 3):
        scores = torch.log_softmax(logits(whole, k, asked.rows[k - 1]).double(), -1)
        picked = scores[torch.arange(len(scores)), asked.targets[k - 1]]
        want += -float(picked.detach().mean()) * 0.8**k
    assert DECAY == 0.8
    assert train_step(whole, asked, 300) == pytest.approx(want, rel=1e-5)
    monkeypatch.setattr("builders.medusa_heads.LOGITS_AT_ONCE", 7 * 300)
    assert train_step(pieces, asked, 300) == pytest.approx(want, rel=1e-5)
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(pieces.tensors[name], tensor, rtol=1e-3, atol=1e-5)


def train(model: Path, out: Path, *more: str) -> dict[str, Any]:
    text = out.parent / "text.txt"
    text.write_text(TEXT)
    words = [
        str(model),
        "--text",
        str(text),
        "-o",
        str(out),
        "--heads",
        "2",
        "--length",
        "64",
        "--threads",
        "1",
    ]
    words += ["--batch-tokens", "256", "--rate", "0.01", "--heldout", str(text), *more]
    args = medusa.make_parser().parse_args(words)
    return dict(medusa.run(args).data)


def test_heads_learn_and_go_into_an_engine_that_says_the_same(
    model: Path, base: Base, tmp_path: Path
) -> None:
    found = train(model, tmp_path / "heads", "--steps", "150")
    assert all(share > 0.9 for share in found["accuracy"])  # a text that repeats
    untrained = accuracy(new_heads(base, 2, 1.0), base, [Lesson(tuple(range(40, 90)), 1)], 64)
    assert all(share < 0.2 for share in untrained)
    beside = Extras(medusa=tmp_path / "heads")
    done = build(
        Options(
            model, tmp_path / "m.edge", "cpu", Request(weights="f16"), beside, text_tokens=64, measure=False
        )
    )
    assert not done.notices  # the heads name these very weights as their base
    ids = base.text.encode(TEXT[:60], "text")
    rows = reference_hidden(model, ids)[-4:].astype(np.float32)
    stored = {n: t.half().float() for n, t in _load(tmp_path / "heads").items()}
    heads = new_heads(base, 2, 1e-3)
    heads.tensors.update(stored)
    with read_engine(tmp_path / "m.edge") as engine:
        for k in (1, 2):
            part = engine.part(f"medusa-{k}")
            executor = BACKEND.load(Part(part.program, part.weights, part.plan.kv, part.plan.step))
            n = len(rows)
            zeros = np.zeros(n, np.int32)
            batch = StepBatch(
                zeros, zeros, np.arange(n, dtype=np.int32), np.full((n, 1), -1, np.int32),
                np.arange(n, dtype=np.int32), inputs=rows,
            )  # fmt: skip
            got = executor.forward(batch)
            want = logits(heads, k, torch.tensor(rows)).detach().numpy()
            assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def _load(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return dict(load_file(folder / "model.safetensors"))


def test_a_run_repeats_and_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = train(model, tmp_path / "a", "--steps", "12")
    assert first["steps"] == 12 and first["total_seconds"] > first["seconds"]
    train(model, tmp_path / "b", "--steps", "12")
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)  # a state after every step
    monkeypatch.setattr(medusa, "train_step", _dies_at(7))
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "c", "--steps", "12")
    assert (tmp_path / "c" / training.STATE).exists() and not (tmp_path / "c" / "model.safetensors").exists()
    monkeypatch.undo()
    with pytest.raises(BadConfig, match=r"is of a run with other options; repeat them, or give --fresh"):
        train(model, tmp_path / "c", "--steps", "12", "--seed", "2")
    train(model, tmp_path / "c", "--steps", "12")
    want = (tmp_path / "a" / "model.safetensors").read_bytes()
    for other in ("b", "c"):
        assert (tmp_path / other / "model.safetensors").read_bytes() == want
        names = sorted(p.name for p in (tmp_path / other).iterdir())
        assert names == ["medusa_config.json", "model.safetensors"]
    train(model, tmp_path / "d", "--steps", "12", "--seed", "2")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() != want


def _dies_at(step: int) -> Any:
    count = itertools.count(1)

    def wrapped(*args: Any) -> float:
        if next(count) > step:
            raise KeyboardInterrupt
        return train_step(*args)

    return wrapped


def test_lessons_of_every_kind(model: Path, base: Base, tmp_path: Path) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(model)

    def read(name: str, text: str, length: int = 50) -> list[Lesson]:
        (tmp_path / name).write_text(text)
        return read_lessons(tmp_path / name, base.text, length)

    def ids(text: str) -> tuple[int, ...]:
        return tuple(theirs(text, add_special_tokens=False)["input_ids"])

    assert read("a.txt", "abcdefgh", 3) == [Lesson(ids("abc"), 1), Lesson(ids("def"), 1)]  # gh is too short
    (lesson,) = read("a.jsonl", '{"prompt": "abc", "completion": "de"}\n\n')
    assert lesson == Lesson((*ids("abcde"), 2), 3)
    chat = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cde"}]
    (lesson,) = read("b.jsonl", json.dumps({"messages": chat}))
    assert lesson == Lesson(ids("<s>ab<s>cde</s>"), 4)
    assert theirs.convert_ids_to_tokens(lesson.ids[lesson.start]) == "c"
    for line, message in (
        ("nonsense", "c.jsonl, line 1 is not JSON"),
        ('{"prompt": "x"}', 'line 1: expected {"text"}'),
        ('{"text": 1}', "line 1: expected"),
        ('{"text": "abc", "more": 1}', "line 1: expected"),
        (json.dumps({"messages": chat[::-1]}), "must end with the assistant's answer"),
        ('{"text": "a"}', "gives no sequence to learn from"),
    ):
        with pytest.raises(BadConfig, match=message):
            read("c.jsonl", line)


def test_batches_hold_every_lesson_once_a_pass_within_the_budget() -> None:
    lessons = [Lesson(tuple(range(n)), 1) for n in range(3, 60)]
    source = batches(lessons, 128, 1)
    for _ in range(2):
        seen: list[int] = []
        while len(seen) < len(lessons):
            batch = next(source)
            assert len(batch) == 1 or len(batch) * max(len(row.ids) for row in batch) <= 128
            seen += [len(row.ids) for row in batch]
        assert sorted(seen) == list(range(3, 60))
    again = batches(lessons, 128, 1)
    assert list(itertools.islice(again, 40)) == list(itertools.islice(batches(lessons, 128, 1), 40))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give either --text FILE or --jsonl FILE"),
        (["--text", "t", "--jsonl", "t"], "give either"),
        (["--jsonl", "notes.txt"], "expected a file that ends in .jsonl"),
        (["--text", "t", "--heads", "17"], "--heads is 17, expected 1 to 16"),
        (["--text", "t", "--steps", "0"], "--steps is 0"),
        (["--text", "t", "--minutes", "nan"], "--minutes is nan"),
        (["--text", "nowhere.txt"], "nowhere.txt: No such file"),
    ],
)
def test_mistakes_are_named(
    model: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert medusa.main([str(model), "-o", str(tmp_path / "out"), *words]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_neither_the_model_nor_a_folder_of_somebody_else_is_written_over(model: Path, tmp_path: Path) -> None:
    before = (model / "model.safetensors").read_bytes()
    with pytest.raises(BadConfig, match="is the model itself"):
        train(model, model, "--steps", "1")
    copy = write_model(tmp_path / "copy")
    with pytest.raises(BadConfig, match=r"holds 'config\.json', and is no earlier result"):
        train(model, copy, "--steps", "1")
    assert (model / "model.safetensors").read_bytes() == before


def test_loading_the_command_loads_no_torch() -> None:
    code = "import sys, builders.medusa; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], check=False, env=env).returncode == 0
