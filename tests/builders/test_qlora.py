"""QLoRA on a toy: only A and B learn, on an engine's very planes; PEFT and the runtime read the folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from arch_cases import CASES, SMALL
from hf_folders import write_model
from safetensors import SafetensorError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


from builders import low_rank, qlora  # noqa: E402
from builders.completions import completions, cross_entropy  # noqa: E402
from builders.lessons import Lesson  # noqa: E402
from builders.low_rank import LowRankProgram, chosen_targets, write_peft  # noqa: E402
from builders.packed_base import PackedBase, Words, engine_base, read_base  # noqa: E402
from builders.parts import Extras  # noqa: E402
from builders.pipeline import Options, build  # noqa: E402
from builders.planner import Request  # noqa: E402
from builders.role_formats import Formats  # noqa: E402
from edge_runtime import open_engine  # noqa: E402
from edge_runtime.backends.protocol import StepBatch  # noqa: E402
from edge_runtime.backends.reference import ReferenceExecutor  # noqa: E402
from edge_runtime.engine.file import read_engine  # noqa: E402
from edge_runtime.engine.manifest import Vocabulary  # noqa: E402
from edge_runtime.engine.peft import read_peft  # noqa: E402
from edge_runtime.engine.plan import KvPlan, StepShape  # noqa: E402
from edge_runtime.errors import BadConfig, BuildError  # noqa: E402

TEXT = "the robot goes to the kitchen and grasps the red mug. " * 40
FORMATS = Formats("nf4_g64")
IDS = [*range(40, 64)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("qlora") / "toy")
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def engine_path(model: Path) -> Path:
    path = model.parent / "toy.edge"
    build(Options(model, path, "cpu", Request(weights="nf4_g64"), measure=False))
    return path


@pytest.fixture(scope="module")
def base(model: Path) -> PackedBase:
    return read_base(model, FORMATS)


def train(model: Path, out: Path, *more: str) -> dict[str, Any]:
    text = out.parent / "text.txt"
    text.write_text(TEXT)
    words = [str(model), "--data", str(text), "--heldout", str(text), "-o", str(out), "--length", "48"]
    words += ["--batch-tokens", "384", "--threads", "1", "--rank", "4", "--rate", "0.02", *more]
    return dict(qlora.run(qlora.make_parser().parse_args(words)).data)


def reference_logits(base: PackedBase, adapter: Any = None) -> np.ndarray:
    """Logits (tokens, vocabulary) of IDS by the numpy executor on the base's planes, f32 cache."""
    n = len(IDS)
    kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=-(-n // 16))
    step = StepShape(context=n, sequences=1, tokens=n, logits=n)
    executor = ReferenceExecutor(base.program, base.weights, kv, step)
    number = -1 if adapter is None else executor.add_adapter(adapter)
    at = np.arange(n, dtype=np.int32)
    table = np.arange(kv.pages, dtype=np.int32)[None]
    batch = StepBatch(
        np.array(IDS, np.int32), at, np.zeros(n, np.int32), table, at, adapters=np.array([number], np.int32)
    )
    return np.asarray(executor.forward(batch))


def torch_logits(model: LowRankProgram) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([IDS]))[0].numpy())


def randomized(base: PackedBase, targets: list[str], seed: int = 5) -> LowRankProgram:
    """An adapter whose A and B are f16 numbers, so that writing loses nothing."""
    model = LowRankProgram(base, targets, 4, 6.0, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.tensors.values():
            tensor.copy_((torch.randn(tensor.shape, generator=generator) * 0.2).half().float())
    return model


def test_an_untrained_adapter_changes_nothing(base: PackedBase) -> None:
    want = reference_logits(base)
    got = torch_logits(LowRankProgram(base, ["all"], 4, 16.0, 1))
    assert np.abs(got - want).max() < 1e-4 * np.abs(want).max()


def test_the_bases_of_a_folder_and_of_its_engine_are_the_same_planes(
    base: PackedBase, engine_path: Path
) -> None:
    engine = read_engine(engine_path)
    again = engine_base(engine)
    engine.close()
    assert again.formats == base.formats and again.nbytes == base.nbytes
    for name in base.program.tensors:
        assert np.array_equal(again.weights(name), base.weights(name))
    assert np.array_equal(torch_logits(randomized(again, ["q"])), torch_logits(randomized(base, ["q"])))


def test_the_base_stays_packed(base: PackedBase) -> None:
    matrices = [s for s in base.program.tensors.values() if s.role == "matrix"]
    packed = sum(s.size // 2 + 2 * s.rows * -(-s.cols // 64) for s in matrices)  # nibbles and f16 scales
    rest = sum(s.size + 4 * s.rows for s in base.program.tensors.values() if s.role == "head")
    vectors = sum(4 * s.size for s in base.program.tensors.values() if s.role == "vector")
    assert base.nbytes == packed + rest + vectors


@pytest.mark.parametrize("targets", [["all"], ["q", "v"], ["down_proj"]], ids=lambda t: "+".join(t))
def test_what_is_written_is_what_the_runtime_reads_and_computes(
    base: PackedBase, tmp_path: Path, targets: list[str]
) -> None:
    model = randomized(base, targets)
    write_peft(tmp_path / "a", model, base.name)
    adapter = read_peft(tmp_path / "a", base.origins, base.program)
    assert set(adapter) == set(model.updates)
    for name, low in adapter.items():
        update = model.updates[name]
        a, b = (model.tensors[f"{update.module}.lora_{side}.weight"].detach().numpy() for side in "AB")
        assert np.array_equal(low.a, a) and np.array_equal(low.b, b[update.start : update.stop])
        assert low.scale == 6.0 / 4
    want = torch_logits(model)
    assert np.abs(reference_logits(base, adapter) - want).max() < 2e-4 * np.abs(want).max()
    # and merged: the update added to the decoded weights, without any adapter
    merged = {name: base.weights(name) for name in base.program.tensors}
    for name, low in adapter.items():
        merged[name] = merged[name] + np.float32(low.scale) * (low.b.astype("f4") @ low.a.astype("f4"))
    n = len(IDS)
    kv = KvPlan(k="f32", v="f32", page_tokens=16, pages=2)
    executor = ReferenceExecutor(
        base.program, merged.__getitem__, kv, StepShape(context=n, sequences=1, tokens=n, logits=n)
    )
    at = np.arange(n, dtype=np.int32)
    got = executor.forward(
        StepBatch(np.array(IDS, np.int32), at, np.zeros(n, np.int32), np.array([[0, 1]], np.int32), at)
    )
    assert np.abs(got - want).max() < 2e-4 * np.abs(want).max()


def test_gradients_reach_a_and_b_alone_and_are_those_of_plain_autograd(base: PackedBase) -> None:
    model = randomized(base, ["all"])
    asked = completions([Lesson(tuple(IDS), 1)])
    cross_entropy(model, asked).backward()
    assert all(t.grad is not None and bool(t.grad.any()) for t in model.tensors.values())
    kept = [t for t in model._kept.values()]
    assert not any(t.requires_grad for t in kept)
    # The same loss with decoded weights that autograd keeps by itself
    plain = randomized(base, ["all"])
    frozen = {name: torch.from_numpy(base.weights(name)) for name in base.program.tensors}

    def product(op: Any, x: Any) -> Any:
        out = x @ frozen[op.weight].T
        update = plain.updates.get(op.weight)
        if update is None:
            return out
        a, b = (plain.tensors[f"{update.module}.lora_{side}.weight"] for side in "AB")
        return out + 1.5 * (x @ (b[update.start : update.stop] @ a).T)

    plain.product = product  # type: ignore[method-assign]
    cross_entropy(plain, asked).backward()
    for name, tensor in model.tensors.items():
        torch.testing.assert_close(tensor.grad, plain.tensors[name].grad, rtol=1e-3, atol=1e-6)


def test_no_decoded_weight_lives_between_the_passes(base: PackedBase) -> None:
    """What autograd keeps for the backward pass never has the shape of a base matrix."""
    model = randomized(base, ["q"])
    shapes = {(s.rows, s.cols) for s in base.program.tensors.values() if s.role != "vector"}
    kept: list[tuple[int, ...]] = []
    rows = tuple(range(3, 3 + 41))  # 41 tokens: no activation has a matrix' shape
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(tuple(t.shape)), t)[1], lambda t: t):
        loss = cross_entropy(model, completions([Lesson(rows, 1)]))
    loss.backward()
    assert kept and not shapes & {*kept, *(shape[::-1] for shape in kept)}


def test_an_adapter_learns_on_the_engine_and_the_session_takes_it(
    model: Path, engine_path: Path, tmp_path: Path
) -> None:
    found = train(engine_path, tmp_path / "a", "--steps", "80")
    assert found["heldout"]["after"]["loss"] < 0.5 * found["heldout"]["before"]["loss"]
    prompt = "the robot goes to the "
    with open_engine(engine_path, backend="reference", adapters={"learned": tmp_path / "a"}) as session:
        with_it = session.complete(prompt, max_tokens=12, adapter="learned").text
        assert with_it == session.complete(prompt, max_tokens=12, adapter="learned").text
        assert with_it in TEXT
        assert session.complete(prompt, max_tokens=12).text != with_it
    beside = Extras(adapters={"learned": tmp_path / "a"})
    path = tmp_path / "with.edge"
    build(Options(model, path, "cpu", Request(weights="nf4_g64"), beside, measure=False))
    with open_engine(path, backend="reference") as session:
        assert session.complete(prompt, max_tokens=12, adapter="learned").text == with_it


def test_a_run_that_was_interrupted_ends_as_if_it_had_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(model, tmp_path / "whole", "--steps", "8")
    steps = qlora.train

    def interrupted(*args: Any) -> Iterator[float]:
        for number, done in enumerate(steps(*args)):
            yield done
            if number == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(qlora, "train", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(model, tmp_path / "two", "--steps", "8")
    monkeypatch.setattr(qlora, "train", steps)
    with pytest.raises(BadConfig, match="other options"):
        train(model, tmp_path / "two", "--steps", "8", "--weights", "int4_g64")
    train(model, tmp_path / "two", "--steps", "8")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_peft_reads_the_folder_and_computes_the_same(base: PackedBase, model: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="needs peft: pip install -c constraints.txt peft")
    from transformers import AutoModelForCausalLM

    ours = randomized(base, ["q", "o", "down"])
    write_peft(tmp_path / "a", ours, base.name)
    theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():  # the quantized values in place of the checkpoint's
        state = theirs.state_dict()
        for name, origin in base.origins.items():
            if f"{origin.key}.weight" in state:
                state[f"{origin.key}.weight"].copy_(torch.from_numpy(base.weights(name)))
        state["model.embed_tokens.weight"].copy_(torch.from_numpy(base.weights("embed")))
        got = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")(input_ids=torch.tensor([IDS])).logits[0]
    want = torch_logits(ours)
    assert np.abs(got.numpy() - want).max() < 2e-4 * np.abs(want).max()


def test_tensors_of_a_fused_module_share_a_and_have_their_rows_of_b() -> None:
    from builders.archs import read_program
    from builders.weights import EngineWeights
    from edge_runtime.engine.formats import get_format
    from edge_runtime.engine.packing import pack
    from edge_runtime.engine.plan import TensorPlan

    case = next(c for c in CASES if c.model_type == "phi3")
    architecture = read_program({"model_type": "phi3", **SMALL, **case.config})
    program, rng = architecture.program, np.random.default_rng(0)
    flat = {}
    for name, spec in program.tensors.items():
        values = np.float32(rng.normal(0, 0.1, (spec.rows, spec.cols)))
        flat[name] = pack("f32", "rows", get_format("f32").encode(values), spec.rows, spec.cols)
    plans = {name: TensorPlan("f32", "rows") for name in flat}
    weights = EngineWeights(program, plans, flat.__getitem__)
    words = Words(b"{}", None, Vocabulary(bos=None, eos=(), pad=None, size=program.vocab_size))
    formats = dict.fromkeys(flat, "f32")
    fused = PackedBase("phi3", program, architecture.origins(), formats, weights, 0, {}, words)
    model = LowRankProgram(fused, ["qkv"], 4, 8.0, 1)
    parts = [model.updates[f"layers.0.{side}"] for side in "qkv"]
    assert len({part.module for part in parts}) == 1
    assert parts[0].start == 0 and parts[0].stop == parts[1].start and parts[1].stop == parts[2].start
    b = model.tensors[f"{parts[0].module}.lora_B.weight"]
    assert b.shape == (parts[2].stop, 4)


def test_texts_are_read_alike_for_a_folder_and_its_engine(base: PackedBase, engine_path: Path) -> None:
    engine = read_engine(engine_path)
    ours, theirs = engine_base(engine).words, base.words
    engine.close()
    assert ours == theirs
    assert ours.chat_template is not None


def test_targets_are_names_of_modules() -> None:
    modules = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    assert chosen_targets(["q", "down_proj"], modules) == ("q_proj", "down_proj")
    assert chosen_targets(["all"], modules) == ("q_proj", "down_proj")
    with pytest.raises(BadConfig, match="'dwon' is no linear layer"):
        chosen_targets(["dwon"], modules)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--rank", "0"), "--rank is 0"),
        (("--targets", ""), "--targets"),
        (("--weights", "nf4"), "nf4_g64"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    model: Path, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    with pytest.raises(BadConfig, match=words):
        train(model, tmp_path / "o", "--steps", "1", *more)


def test_what_comes_before_the_steps_is_told(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = train(model, tmp_path / "o", "--steps", "1")
    assert found["total_seconds"] > found["seconds"]
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("set-up")]
    assert lines == [
        "set-up 0%: read toy and round its weights",
        "set-up 30%: read text.txt",
        "set-up 60%: measure on text.txt",
        "set-up 100%: train",
    ]


def test_an_adapter_is_replaced_whole_and_that_of_another_tool_is_not(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    train(model, out, "--steps", "1")
    train(model, out, "--steps", "2")
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    assert set(before) == {"adapter_model.safetensors", "adapter_config.json"}

    def full(*_: Any, **__: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(low_rank, "save_file", full)
    for path in (out, tmp_path / "none"):
        with pytest.raises(BuildError, match=rf"{path.name} could not be written: I/O error: No space left"):
            train(model, path, "--steps", "1")
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "text.txt"]
    monkeypatch.undo()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BuildError, match="none has 1000 B free, the training needs"):
        train(model, tmp_path / "none", "--steps", "1")
    config = json.loads(before["adapter_config.json"])
    for change in ({"peft_version": "0.18.0"}, {"use_dora": True}):
        (out / "adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(BadConfig, match=r"no earlier result of builders\.qlora"):
            train(model, out, "--steps", "1")


def test_an_engines_formats_are_fixed(engine_path: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="is an engine, whose formats are fixed"):
        train(engine_path, tmp_path / "o", "--weights", "int4_g64")
