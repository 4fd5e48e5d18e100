"""The whole build: the file holds what the algorithm chose, byte for byte, made within bounded memory."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hf_folders import llama_config, llama_shapes, write_model
from safetensors.numpy import load_file, save_file

from builders.pipeline import Options, build, settled
from builders.planner import DEFAULT, KEEP, Request
from builders.watcher import Watcher
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.backends.reference import BACKEND
from edge_runtime.engine.file import Engine, read_engine
from edge_runtime.errors import BadCheckpoint, BadConfig, BuildError, DoesNotFit, Unsupported, ValueOutOfRange

ROOT = Path(__file__).resolve().parents[2]


def options(model: Path, target: Path, **changes: Any) -> Options:
    request = Request(weights=changes.pop("weights", "int4_g32"), **changes.pop("request", {}))
    return Options(model, target, changes.pop("profile", "cpu"), request, text_tokens=64, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("pipeline") / "toy")


def decoded(engine: Engine) -> dict[str, np.ndarray]:
    return {name: decode(tensor) for name, tensor in engine.part("language").weights.items()}


def test_an_f32_engine_holds_the_checkpoint_exactly(model: Path, tmp_path: Path) -> None:
    done = build(options(model, tmp_path / "m.edge", weights="f32"))
    want = load_file(model / "model.safetensors")
    with read_engine(tmp_path / "m.edge") as engine:
        got = decoded(engine)
        assert bytes(engine.blob("tokenizer.json")) == (model / "tokenizer.json").read_bytes()
    # Every checkpoint tensor is in the engine under its own name, in the checkpoint's numbers
    stored = {hashlib.sha256(np.ascontiguousarray(a).tobytes()).hexdigest() for a in got.values()}
    for key, value in want.items():
        assert hashlib.sha256(value.tobytes()).hexdigest() in stored, key
    assert done.manifest.quality is not None and done.manifest.quality.sqnr_db == {}


def test_no_gpu_gets_f32_weights(model: Path, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"'orin-agx-64gb' has no f32; it runs: .*int4_g64"):
        build(options(model, tmp_path / "m.edge", weights="f32", profile="orin"))


def test_sqnr_in_the_report_is_the_one_of_the_file(model: Path, tmp_path: Path) -> None:
    build(options(model, tmp_path / "f32.edge", weights="f32"))
    done = build(options(model, tmp_path / "m.edge"))
    with read_engine(tmp_path / "f32.edge") as exact, read_engine(tmp_path / "m.edge") as engine:
        want, got = decoded(exact), decoded(engine)
    assert done.manifest.quality is not None
    sqnr = done.manifest.quality.sqnr_db
    assert len(sqnr) == sum(a.shape[0] > 1 for a in got.values())
    for name, db in sqnr.items():
        noise = np.square(got[name].astype(np.float64) - want[name]).sum()
        signal = np.square(want[name].astype(np.float64)).sum()
        assert db == pytest.approx(10 * np.log10(signal / noise), abs=0.01)
        assert db > (18 if "embed" not in name else 40)  # 4 bits give about 20 dB, 8 bits about 45


def test_the_same_inputs_give_the_same_bytes(model: Path, tmp_path: Path) -> None:
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        build(options(model, tmp_path / place / "m.edge"))
    assert (tmp_path / "a" / "m.edge").read_bytes() == (tmp_path / "b" / "m.edge").read_bytes()


def test_shards_give_the_same_planes(model: Path, tmp_path: Path) -> None:
    sharded = write_model(tmp_path / "toy", shards=3)
    digests = [
        build(options(m, tmp_path / f"{i}.edge")).manifest.planes for i, m in enumerate((model, sharded))
    ]
    assert digests[0] == digests[1]


def test_provenance_names_every_file_and_no_path(model: Path, tmp_path: Path) -> None:
    found = build(options(model, tmp_path / "m.edge", recipe={"weights": "int4_g32"})).manifest
    assert found.provenance.source == "toy" and found.provenance.model_type == "llama"
    assert found.provenance.algorithm == "rtn"
    assert set(found.provenance.source_sha256) == {"config.json", "model.safetensors", "tokenizer.json"}
    for name, digest in found.provenance.source_sha256.items():
        assert digest == hashlib.sha256((model / name).read_bytes()).hexdigest()
    assert str(tmp_path).encode() not in (tmp_path / "m.edge").read_bytes()


def test_the_known_answer_is_the_greedy_one(model: Path, tmp_path: Path) -> None:
    build(options(model, tmp_path / "m.edge", profile="orin"))  # no CUDA here: the reference gives it
    with read_engine(tmp_path / "m.edge") as engine:
        known, part = engine.manifest.known_answer, engine.part("language")
        assert known is not None and known.backend == "reference"
        assert len(known.answer) == 16 and len(known.prompt) == 8
        executor = BACKEND.load(Part(part.program, part.weights, part.plan.kv, part.plan.step))
        tokens = list(known.prompt)
        table = np.arange(part.plan.kv.pages, dtype=np.int32)[None]
        for want in known.answer:  # every token from the whole text anew
            n = len(tokens)
            at = np.arange(n, dtype=np.int32)
            row = np.array([n - 1], np.int32)
            batch = StepBatch(np.array(tokens, np.int32), at, np.zeros(n, np.int32), table, row)
            scores = executor.forward(batch)[0]
            assert scores[want] >= scores.max() - 1e-4
            tokens.append(want)


def test_each_phase_leaves_one_json(model: Path, tmp_path: Path) -> None:
    build(options(model, tmp_path / "m.edge", keep_json=tmp_path / "json"))
    found = {p.stem: json.loads(p.read_text()) for p in (tmp_path / "json").iterdir()}
    assert set(found) == {"read", "plan", "quantize", "verify", "pack"}
    assert found["plan"]["language"]["profile"] == "cpu"
    assert found["verify"]["quality"]["tokens"] > 0


def test_progress_counts_every_tensor(model: Path, tmp_path: Path) -> None:
    class Counting(Watcher):
        def __init__(self) -> None:
            self.phases: dict[str, list[int]] = {}

        def phase(self, name: str, steps: int) -> None:
            self.phases[name] = [steps, 0]

        def step(self, what: str) -> None:
            list(self.phases.values())[-1][1] += 1

    watcher = Counting()
    build(options(model, tmp_path / "m.edge"), watcher)
    assert list(watcher.phases) == ["quantize", "verify", "pack"]
    assert all(steps == done for steps, done in watcher.phases.values())


def test_without_measuring_there_is_no_quality(model: Path, tmp_path: Path) -> None:
    assert build(options(model, tmp_path / "m.edge", measure=False)).manifest.quality is None


@pytest.mark.parametrize(
    "weights", ["fp8_e4m3_tensor", "fp8_e5m2", "nf4_g64", "int8_g64", "int4_g128_zp", "bf16"]
)
def test_other_formats_build_and_open(model: Path, tmp_path: Path, weights: str) -> None:
    done = build(options(model, tmp_path / "m.edge", weights=weights))
    read_engine(tmp_path / "m.edge", verify=True).close()
    assert done.manifest.quality is not None and done.manifest.quality.kl_mean < 0.2


# --- what is refused ---------------------------------------------------------------------------------------


def damaged(tmp_path: Path, change: Any) -> Path:
    folder = write_model(tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_a_damaged_tensor_is_named(tmp_path: Path) -> None:
    def nan(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan

    with pytest.raises(ValueOutOfRange, match=r"layers\.1\..*NaN or Inf"):
        build(options(damaged(tmp_path, nan), tmp_path / "m.edge"))
    assert not list(tmp_path.glob("*.edge")) and not list(tmp_path.glob(".*"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = damaged(tmp_path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(BadCheckpoint, match=r"'model\.layers\.1\.mlp\.up_proj\.weight' is missing"):
        build(options(folder, tmp_path / "m.edge"))


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    def cut(tensors: dict[str, Any]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"][:31].copy()

    with pytest.raises(BadCheckpoint, match=r"'model\.norm\.weight' has shape \(31,\)"):
        build(options(damaged(tmp_path, cut), tmp_path / "m.edge"))


def test_what_does_not_fit_is_refused_before_any_work(model: Path, tmp_path: Path) -> None:
    small = tmp_path / "tiny.yaml"
    text = (ROOT / "profiles" / "cpu.yaml").read_text()
    for key, size in (("total_bytes", "8 GiB"), ("reserve_bytes", "2 GiB")):
        text = text.replace(f"{key}: {size}", f"{key}: {'60 KiB' if key[0] == 't' else '1 KiB'}")
    small.write_text(text.replace("name: cpu", "name: tiny"))
    with pytest.raises(DoesNotFit, match="are needed, tiny gives") as caught:
        build(options(model, tmp_path / "m.edge", profile=str(small)))
    assert caught.value.need > caught.value.have == 59 * 1024
    assert not (tmp_path / "m.edge").exists()


def test_targets_that_should_not_be_written_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("precious")
    for target, words in (
        (tmp_path / "notes.txt", "not an engine"),
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "m.edge", "is not a folder"),
        (model / "m.edge", "inside the model folder"),
    ):
        with pytest.raises(BuildError, match=words):
            build(options(model, target))
    assert (tmp_path / "notes.txt").read_text() == "precious"
    build(options(model, tmp_path / "notes.txt", force=True))
    build(options(model, tmp_path / "notes.txt"))  # now it is an engine: no force is needed


def test_a_full_disk_is_refused_before_any_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("builders.pack.shutil.disk_usage", lambda _: usage)
    with pytest.raises(BuildError, match="1 MiB free"):
        build(options(model, tmp_path / "m.edge"))


def test_an_unknown_algorithm_is_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(BadConfig, match="did you mean 'rtn'"):
        build(options(model, tmp_path / "m.edge", algorithm="rtm"))


# --- memory ------------------------------------------------------------------------------------------------


def peak_of(warm: Path, model: Path, target: Path, algorithm: str) -> int:
    """Peak memory of an int4_g64 build above the start of a child of its own, in bytes."""
    child = [sys.executable, str(Path(__file__).with_name("peak_child.py")), str(warm), str(model)]
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), MALLOC_ARENA_MAX="1")
    done = subprocess.run(
        [*child, str(target), "int4_g64", algorithm], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_gptq_build_takes_a_quarter_of_the_f16_size_and_the_work_of_one_layer(tmp_path: Path) -> None:
    """As for a model of 1.1B parameters, with 96 MiB in place of its 1 GiB: that the weights in f32, or the
    statistics of all layers, would not fit into."""
    pytest.importorskip("torch")
    config = llama_config(
        hidden_size=384,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=2,
        num_hidden_layers=10,
    )
    model = write_model(tmp_path / "deep", config, dtype="float16")
    size = (model / "model.safetensors").stat().st_size
    assert size > 20 << 20
    used = peak_of(write_model(tmp_path / "warm"), model, tmp_path / "m.edge", "gptq")
    assert used < size / 4 + (96 << 20), f"peak {used >> 20} MiB of a checkpoint of {size >> 20} MiB"


def test_peak_memory_stays_below_two_layers_and_the_embedding(tmp_path: Path) -> None:
    """Of the f32 checkpoint, in a child of its own, with nothing allowed on top."""
    config = llama_config(
        hidden_size=512,
        intermediate_size=1376,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=8000,
        max_position_embeddings=512,
    )
    model = write_model(tmp_path / "big", config, shards=3)
    warm = write_model(tmp_path / "warm")
    nbytes = {k: 4 * int(np.prod(s)) for k, s in llama_shapes(config).items()}
    layer = sum(n for k, n in nbytes.items() if k.startswith("model.layers.0."))
    limit = 2 * layer + nbytes["model.embed_tokens.weight"]
    assert sum(nbytes.values()) > 2.5 * limit  # the model as a whole would not do
    used = peak_of(warm, model, tmp_path / "m.edge", "rtn")
    assert used < limit, f"peak {used >> 10} KiB, limit {limit >> 10} KiB"
    read_engine(tmp_path / "m.edge", verify=True).close()


def test_the_rotary_table_is_the_one_for_the_planned_context() -> None:
    """Phi-3's longrope has two tables; a context within the original length takes the short one."""
    from builders.archs import read_program
    from builders.parts import read_architecture

    half = 4
    scaling = {"type": "longrope", "short_factor": [1.0] * half, "long_factor": [4.0] * half}
    config = llama_config(
        model_type="phi3",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_scaling=scaling,
        pad_token_id=0,
    )

    def table(context: int | None) -> list[float]:
        sources = read_architecture(config, context).sources.values()
        return next(s.constant for s in sources if s.constant is not None).reshape(-1).tolist()

    assert table(None) == table(4096)  # 4096 is the default
    assert table(8192) != table(4096)
    assert read_program(config).program.max_context == 131072


_EVENTS: list[tuple[str, str]] | None = None  # what the audit hook saw; None while nobody looks


def _audit(event: str, args: tuple[object, ...]) -> None:
    if _EVENTS is not None and event.split(".")[0] in _WATCHED:
        _EVENTS.append((event, str(args[0]) if args else ""))


_WATCHED = {"exec", "compile", "import", "subprocess", "socket", "pickle", "marshal", "ctypes", "open"}


def test_a_build_runs_no_code_and_opens_only_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_model(tmp_path / "hostile")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    for name in ("evil.py", "__init__.py", "conftest.py", "usercustomize.py", "pytorch_model.bin"):
        (folder / name).write_text("raise SystemExit('code of a model folder was run')")
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ x.__class__ }}"}')
    once = options(folder, tmp_path / "m.edge", profile="orin")
    build(once)  # loads every module that a build needs
    sys.addaudithook(_audit)
    monkeypatch.setattr(sys.modules[__name__], "_EVENTS", [])
    build(once)
    seen = _EVENTS
    monkeypatch.undo()
    # compile and exec are msgspec's, reading its own annotations; none may come from the folder
    quiet = ("open", "compile", "exec")
    gpu = ("ctypes.dlopen", "libcuda.so.1")  # is there one to run the known answer on?
    loud = [e for e in seen or () if e != gpu and e[0] not in quiet]
    assert seen and not loud and not [e for e in seen if e[0] != "open" and "hostile" in e[1]]
    opened = {Path(path).name for event, path in seen if event == "open" and path.startswith(str(folder))}
    assert opened == {"config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"}


def test_a_text_that_cannot_be_measured_on_is_found_before_any_work(model: Path, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"txt": "x"}\n')

    class Silent(Watcher):
        def phase(self, name: str, steps: int) -> None:
            raise AssertionError(f"{name} began")

    with pytest.raises(BadConfig, match=r't\.jsonl, line 1: expected {"text"}'):
        build(options(model, tmp_path / "m.edge", text=tmp_path / "t.jsonl"), Silent())


@pytest.mark.parametrize(
    ("algorithm", "wanted"),
    [("rtn", "int4_g64"), ("nf4", "nf4_g64_dq"), ("fp8", "fp8_e4m3_row"), ("int8_outlier", "int8_row_o128")],
)
def test_an_algorithm_that_is_made_for_a_format_gets_it(model: Path, algorithm: str, wanted: str) -> None:
    asked = Request(weights=DEFAULT)
    assert settled(asked, algorithm, quantized=False).weights == wanted
    assert settled(asked, algorithm, quantized=True).weights == KEEP
    assert settled(Request(weights="f16"), algorithm, quantized=False).weights == "f16"


def test_a_build_of_nf4_is_in_nf4(model: Path, tmp_path: Path) -> None:
    report = build(options(model, tmp_path / "m.edge", weights=DEFAULT, algorithm="nf4"))
    part = report.manifest.parts["language"]
    chosen = {t.format for n, t in part.plan.tensors.items() if part.program.tensors[n].role == "matrix"}
    assert chosen == {"nf4_g64_dq"}


def test_a_rotation_that_unties_a_table_says_so(tmp_path: Path) -> None:
    tied = write_model(tmp_path / "tied", llama_config(tie_word_embeddings=True))
    tensors = load_file(tied / "model.safetensors")
    norm = tensors["model.norm.weight"]
    save_file(
        tensors | {"model.norm.weight": np.linspace(0.5, 2.0, norm.size).astype(norm.dtype)},
        tied / "model.safetensors",
    )
    report = build(options(tied, tmp_path / "m.edge", rotate=1))
    assert any("two tables" in notice for notice in report.notices)
    assert "rotated.head" in report.manifest.parts["language"].program.tensors
