"""QAT on a toy: it learns what rounding lost, goes on when stopped, and its engine is what was trained."""

from __future__ import annotations

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import write_model
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from builders import qat, trained_folder, training  # noqa: E402
from builders.completions import completions, cross_entropy, distillation, measure  # noqa: E402
from builders.lessons import Lesson  # noqa: E402
from builders.pipeline import Options, build  # noqa: E402
from builders.planner import Request  # noqa: E402
from builders.qat_model import QatModel, open_model, teacher_of  # noqa: E402
from builders.role_formats import Formats  # noqa: E402
from builders.sources import open_source  # noqa: E402
from builders.torch_program import TorchProgram  # noqa: E402
from edge_runtime.backends import cpu, reference  # noqa: E402
from edge_runtime.backends.protocol import Part, StepBatch  # noqa: E402
from edge_runtime.engine.file import read_engine  # noqa: E402
from edge_runtime.engine.formats import get_format  # noqa: E402
from edge_runtime.engine.packing import unpack  # noqa: E402
from edge_runtime.engine.plan import KvPlan, StepShape  # noqa: E402
from edge_runtime.errors import BadCheckpoint, BadConfig, BuildError  # noqa: E402

TEXT = "the robot goes to the kitchen and picks the red mug. " * 60


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy that has learned TEXT, so that there is something to lose: trained by the same code in f32."""
    folder = write_model(tmp_path_factory.mktemp("qat") / "toy")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    out = folder.parent / "learned"
    train(folder, out, "--weights", "f32", "--head-weights", "f32", "--steps", "120", "--rate", "0.01")
    assert json.loads((out / "edge_qat.json").read_text())["formats"] == {}
    for name in ("edge_qat.json", "edge_qat.safetensors"):
        (out / name).unlink()
    return out


def train(model: Path, out: Path, *more: str) -> dict[str, Any]:
    text = model.parent / "text.txt"
    text.write_text(TEXT)
    words = [str(model), "--data", str(text), "--heldout", str(text), "-o", str(out), "--length", "48"]
    words += ["--batch-tokens", "384", "--threads", "1", *more]
    return dict(qat.run(qat.make_parser().parse_args(words)).data)


@pytest.fixture(scope="module")
def trained(model: Path) -> tuple[Path, dict[str, Any]]:
    out = model.parent / "int2"
    return out, train(model, out, "--weights", "int2_g32", "--steps", "60", "--rate", "0.003")


def test_training_wins_back_what_rounding_lost(trained: tuple[Path, dict[str, Any]]) -> None:
    found = trained[1]["heldout"]
    lost = found["before"]["loss"] - found["f32"]["loss"]
    assert lost > 0.2
    assert found["after"]["loss"] < found["f32"]["loss"] + 0.5 * lost


@pytest.mark.parametrize("more", [("--distill",), ("--learn-scales",)], ids=lambda m: m[0])
def test_distillation_and_learned_scales_learn_too(model: Path, tmp_path: Path, more: tuple[str]) -> None:
    found = train(model, tmp_path / "o", "--weights", "int2_g32", "--steps", "40", "--rate", "0.003", *more)
    losses = found["heldout"]
    assert losses["after"]["loss"] < losses["before"]["loss"] - 0.1


def test_the_loss_is_taken_on_completions_alone(model: Path) -> None:
    batch = [Lesson((5, 60, 70, 80, 90), 3), Lesson((40, 41, 42), 1)]
    asked = completions(batch)
    assert asked.targets.tolist() == [80, 90, 41, 42]
    with open_model(model) as source, torch.no_grad():
        teacher = teacher_of(QatModel(source, Formats("int4_g32")).weights)
        picked = []
        for lesson in batch:
            scores = torch.log_softmax(teacher(torch.tensor([lesson.ids]))[0].double(), -1)
            picked += [float(scores[i - 1, lesson.ids[i]]) for i in range(lesson.start, len(lesson.ids))]
        assert float(cross_entropy(teacher, asked)) == pytest.approx(-np.mean(picked), rel=1e-5)
        assert measure(teacher, batch, 64).loss == pytest.approx(-np.mean(picked), rel=1e-5)
        assert float(distillation(teacher, teacher, asked)) == pytest.approx(0.0, abs=1e-6)


def test_gradients_are_those_of_finite_differences_where_nothing_is_rounded(model: Path) -> None:
    with open_model(model) as source:
        student = QatModel(source, Formats("f32", "f32"))
        asked = completions([Lesson(tuple(range(10, 40)), 1)])
        student.requantize()
        cross_entropy(student.program, asked).backward()
        for key in (
            "model.layers.0.self_attn.q_proj.weight",
            "model.norm.weight",
            "model.embed_tokens.weight",
        ):
            tensor = student.tensors[key]
            at = int(tensor.grad.abs().argmax())
            found = []
            for step in (1e-2, -1e-2):
                with torch.no_grad():
                    tensor.view(-1)[at] += step
                student.requantize()
                found.append(float(cross_entropy(student.program, asked).detach()))
                with torch.no_grad():
                    tensor.view(-1)[at] -= step
            slope = (found[0] - found[1]) / 2e-2
            assert slope == pytest.approx(float(tensor.grad.view(-1)[at]), rel=0.05)


def test_a_run_that_was_interrupted_ends_as_if_it_had_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--weights", "int3_g32", "--steps", "14", "--refit", "4", "--rate", "0.003")
    train(model, tmp_path / "whole", *options)
    steps = qat.train

    def interrupted(*args: Any) -> Iterator[float]:
        for number, done in enumerate(steps(*args)):
            yield done
            if number == 5:
                raise KeyboardInterrupt

    monkeypatch.setattr(qat, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "two", *options)
    assert not (tmp_path / "two" / "model.safetensors").exists()
    monkeypatch.setattr(qat, "train", steps)
    with pytest.raises(BadConfig, match="other options"):
        train(model, tmp_path / "two", *options[:-1], "0.004")
    train(model, tmp_path / "two", *options)
    for name in ("model.safetensors", "edge_qat.safetensors", "edge_qat.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (tmp_path / "two" / "training.safetensors").exists()


def test_a_step_that_is_cut_in_two_leaves_the_state_before(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--weights", "int3_g32", "--steps", "6", "--rate", "0.003")
    train(model, tmp_path / "whole", *options)
    step, count = torch.optim.AdamW.step, itertools.count(1)

    def interrupted(self: Any) -> None:
        step(self)
        if next(count) == 4:
            raise KeyboardInterrupt  # the weights have changed, and the number of the step has not

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupted)
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "two", *options)
    monkeypatch.undo()
    train(model, tmp_path / "two", *options)
    name = "model.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_learned_scales_survive_an_interruption(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--weights", "int3_g32", "--steps", "6", "--rate", "0.003", "--learn-scales")
    train(model, tmp_path / "whole", *options)
    steps = qat.train

    def interrupted(*args: Any) -> Iterator[float]:
        for number, done in enumerate(steps(*args)):
            yield done
            if number == 2:
                raise KeyboardInterrupt

    monkeypatch.setattr(qat, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "two", *options)
    monkeypatch.setattr(qat, "train", steps)
    train(model, tmp_path / "two", *options)
    name = "edge_qat.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def engine_logits(path: Path, backend: Any, ids: list[int]) -> np.ndarray:
    """Logits (tokens, vocabulary) with an f32 cache."""
    n = len(ids)
    kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=-(-n // 16))
    with read_engine(path) as engine:
        part = engine.part("language")
        step = StepShape(context=n, sequences=1, tokens=n, logits=n)
        executor = backend.load(Part(part.program, part.weights, kv, step))
        at = np.arange(n, dtype=np.int32)
        table = np.arange(kv.pages, dtype=np.int32)[None]
        found = executor.forward(StepBatch(np.array(ids, np.int32), at, np.zeros(n, np.int32), table, at))
        executor.close()
    return np.asarray(found)


def test_the_engine_has_the_trained_codes_and_says_what_training_saw(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, path = trained[0], tmp_path / "q.edge"
    build(Options(folder, path, "cpu", Request(weights="int2_g32"), measure=False))
    planes = load_file(folder / "edge_qat.safetensors")
    with read_engine(path) as engine:
        part = engine.part("language")
        for name, held in part.weights.items():
            if name == "embed" or part.program.tensors[name].role == "matrix":
                key = part.origins[name].key if name in part.origins else "model.embed_tokens"
                got = unpack(held.format, held.packing, held.planes, held.rows, held.cols)
                for plane, data in got.items():
                    assert np.array_equal(data, planes[f"{key}.weight#{plane}"])
    ids = [*range(40, 70)]
    with open_source(folder) as source:
        student = teacher_of(QatModel(source, Formats("f32", "f32")).weights)  # the values of the folder
        want = student(torch.tensor([ids]))[0].numpy()
    got = engine_logits(path, reference.BACKEND, ids)
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_the_cpu_backend_says_it_within_its_int8_activations(model: Path, tmp_path: Path) -> None:
    folder, path = tmp_path / "int4", tmp_path / "q.edge"
    train(model, folder, "--weights", "int4_g32", "--steps", "4", "--rate", "0.001")
    build(Options(folder, path, "cpu", Request(weights="int4_g32"), measure=False))
    ids = [*range(40, 70)]
    exact = engine_logits(path, reference.BACKEND, ids)
    with open_source(folder) as source:
        student = teacher_of(QatModel(source, Formats("f32", "f32")).weights)
        want = student(torch.tensor([ids]))[0].numpy()
    assert np.abs(exact - want).max() < 1e-4 * np.abs(want).max()
    if not cpu.BACKEND.available().ok:
        pytest.skip("the native library is not built")
    got = engine_logits(path, cpu.BACKEND, ids)
    assert np.abs(got - want).max() < 0.06 * np.abs(want).max()  # activations have 127 steps each side


def test_any_reader_sees_the_trained_values(trained: tuple[Path, dict[str, Any]]) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained[0]
    ids = torch.tensor([[*range(40, 70)]])
    with open_source(folder) as source:
        want = teacher_of(QatModel(source, Formats("f32", "f32")).weights)(ids)
    got = AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    difference = (got - want).detach().abs().max()
    assert float(difference) < 2e-4 * float(want.detach().abs().max())
    assert AutoTokenizer.from_pretrained(folder).encode(TEXT)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        ("value", BadCheckpoint, "changed after the training"),
        ("surplus", BadCheckpoint, "of which edge_qat.json does not speak"),
        ("missing", BadCheckpoint, "lacks 'model.layers.0.self_attn.q_proj.weight#scale'"),
        ("key", BadConfig, "unknown field `surprise`"),
        ("format", BadConfig, "int2_g32"),
        ("tensor", BadCheckpoint, "'model.nothing.weight', which model.safetensors lacks"),
        ("shape", BadCheckpoint, "plane 'scale'"),
        ("file", BadCheckpoint, "lacks edge_qat.safetensors"),
    ],
)
def test_a_folder_that_was_meddled_with_is_refused(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, damage: str, error: type[Exception], words: str
) -> None:
    folder = tmp_path / "bad"
    folder.mkdir()
    for file in trained[0].iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "edge_qat.json").read_text())
    planes = load_file(folder / "edge_qat.safetensors")
    values = load_file(folder / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    match damage:
        case "value":
            values[key][0, 0] += 1
        case "surplus":
            planes["x#q"] = planes[f"{key}#q"]
        case "missing":
            del planes[f"{key}#scale"]
        case "key":
            config["surprise"] = 1
        case "format":
            config["formats"][key] = "int2_g33"
        case "tensor":
            config["formats"]["model.nothing.weight"] = "int2_g32"
        case "shape":
            planes[f"{key}#scale"] = planes[f"{key}#scale"][:-1].copy()
    (folder / "edge_qat.json").write_text(json.dumps(config))
    save_file(planes, folder / "edge_qat.safetensors")
    save_file(values, folder / "model.safetensors")
    if damage == "file":
        (folder / "edge_qat.safetensors").unlink()
    with pytest.raises(error, match=words):
        build(Options(folder, tmp_path / "x.edge", "cpu", Request(weights="int2_g32"), measure=False))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--weights", "int5_g46"), "int5_g64"),
        (("--weights", "int4_g32", "--fit", "mze"), "mse"),
        (("--weights", "int4_g32", "--steps", "0"), "--steps is 0"),
        (("--weights", "int4_g32", "--rate", "2"), "--rate is 2"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    model: Path, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    with pytest.raises(BadConfig, match=words):
        train(model, tmp_path / "o", *more)


def test_all_of_its_time_is_told_and_what_it_is_spent_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = {"fit": 0, "requantize": 0}

    def slow(name: str) -> None:
        whole = getattr(QatModel, name)

        def wrapped(self: QatModel) -> None:
            calls[name] += 1
            time.sleep(0.1)
            whole(self)

        monkeypatch.setattr(QatModel, name, wrapped)

    slow("fit")
    slow("requantize")
    words = [str(model), "--data", str(tmp_path / "text.txt"), "--heldout", str(tmp_path / "text.txt")]
    words += ["-o", str(tmp_path / "o"), "--weights", "int4_g32", "--steps", "4", "--refit", "2", "--json"]
    (tmp_path / "text.txt").write_text(TEXT)
    assert qat.main(words) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert calls == {"fit": 2, "requantize": 4 + 2}  # fitted once for the first step, and anew at the third
    assert found["seconds"] >= 0.1 + 4 * 0.1  # rounding anew is a part of a step
    assert found["total_seconds"] >= found["seconds"] + 0.1 + 2 * 0.1
    lines = [line for line in captured.err.splitlines() if line.startswith("set-up")]
    assert lines == [
        "set-up 0%: read learned and fit int4_g32 to its weights",
        "set-up 20%: read text.txt",
        "set-up 50%: measure f32 on text.txt",
        "set-up 70%: measure int4_g32 on text.txt",
        "set-up 100%: train",
    ]
    monkeypatch.undo()
    words = [str(model), "--data", str(tmp_path / "text.txt"), "-o", str(tmp_path / "p"), "--steps", "1"]
    assert qat.main([*words, "--weights", "int4_g32"]) == 0
    assert " s with set-up" in capsys.readouterr().out


def test_a_folder_of_somebody_else_is_left_alone(model: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "config.json").write_text("mine")
    with pytest.raises(BadConfig, match=r"holds 'config\.json', and is no earlier result of builders\.qat"):
        train(model, tmp_path / "precious", "--weights", "int4_g32", "--steps", "1")
    assert (tmp_path / "precious" / "config.json").read_text() == "mine"


def test_a_disk_that_fills_up_costs_no_earlier_result(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    options = ("--weights", "int4_g32", "--steps", "3", "--rate", "0.003")
    train(model, out, *options)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    save = trained_folder.save_file

    def full(tensors: Any, path: Path, metadata: Any = None) -> None:
        save(tensors, path, metadata=metadata)
        if path.name == "model.safetensors":
            raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(trained_folder, "save_file", full)
    with pytest.raises(BuildError, match=r"out could not be written: I/O error: No space left"):
        train(model, out, *options[:-1], "0.004")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    with pytest.raises(BuildError):
        train(model, tmp_path / "none", *options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    monkeypatch.undo()
    # and before the training: room is proved
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 100_000))
    with pytest.raises(BuildError, match=r"none has 97\.7 KiB free, the training needs"):
        train(model, tmp_path / "none", *options)
    monkeypatch.undo()
    # a state that the disk does not take is said, and the run goes on
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr("safetensors.torch.save_file", _full)
    assert train(model, tmp_path / "other", *options)["steps"] == 3
    assert "note: " in (said := capsys.readouterr().err) and "could not be saved: No space left" in said
    assert not (tmp_path / "other" / "training.part").exists()


def _full(*_: Any, **__: Any) -> None:
    raise SafetensorError("No space left on device")


def test_room_is_asked_for_what_is_written(trained: tuple[Path, dict[str, Any]], model: Path) -> None:
    with open_model(model) as source:
        student = QatModel(source, Formats("int2_g32"))
        formats = {key: quantizer.format.name for key, quantizer in student.quantizers.items()}
        values = {key: tensor.numel() for key, tensor in student.tensors.items()}
        said = trained_folder.trained_nbytes(source, formats, values)
    written = sum(p.stat().st_size for p in trained[0].iterdir())
    assert said <= written <= said + trained_folder._ROOM


def test_the_model_is_never_written_over(model: Path) -> None:
    with pytest.raises(BadConfig, match="is the model itself"):
        train(model, model, "--weights", "int4_g32")


def test_a_fused_projection_is_one_tensor_in_training(tmp_path: Path) -> None:
    """Rows of a fused tensor go to several matrices of the program; a per-tensor scale is of all of it."""
    from arch_cases import CASES, SMALL

    from builders.archs import read_program

    case = next(c for c in CASES if c.model_type == "phi3")
    config = {"model_type": "phi3", **SMALL, **case.config}
    architecture = read_program(config)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, made in architecture.sources.items():
        spec = architecture.program.tensors[name]
        if made.constant is None:
            rows = made.rows[1] if made.rows else spec.rows
            rows = max(rows, shapes.get(made.key, (0,))[0])
            shapes[made.key] = (spec.cols,) if spec.role == "vector" else (rows, spec.cols)
    rng = np.random.default_rng(0)
    folder = tmp_path / "phi3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    save_file(
        {k: rng.normal(0, 0.1, s).astype(np.float32) for k, s in shapes.items()}, folder / "model.safetensors"
    )
    with open_model(folder) as source:
        student = QatModel(source, Formats("fp8_e4m3_tensor"))
        student.requantize()
        key = "model.layers.0.self_attn.qkv_proj.weight"
        fmt = get_format("fp8_e4m3_tensor")
        whole = fmt.decode(student.encode()[key][1], *shapes[key])
        program: TorchProgram = student.program
        parts = [program.weight(f"layers.0.{side}").detach().numpy() for side in "qkv"]
        assert np.array_equal(np.concatenate(parts), whole)
