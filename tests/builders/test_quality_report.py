"""The quality report against figures recomputed in plain numpy from transformers' states and logits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hf_folders import llama_config, write_model

from builders.archs import read_program
from builders.evaluate import EvaluationText, compare_models, read_text
from builders.hidden import layer_ends
from builders.pipeline import Options, build
from builders.planner import Request
from builders.sources import open_source, read_vocabulary
from builders.weights import CheckpointWeights, EngineWeights
from edge_runtime.backends.cpu import BACKEND as CPU
from edge_runtime.backends.numpy_weights import decode
from edge_runtime.backends.protocol import Part, StepBatch
from edge_runtime.engine.file import Engine, read_engine
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Quality
from edge_runtime.engine.plan import StepShape

WINDOWS = ([1, 5, 9, 200, 7, 45, 46, 47, 102], [1, 77, 78, 99, 250, 31])


def options(model: Path, target: Path, **changes: Any) -> Options:
    return Options(model, target, "cpu", Request(weights="int4_g32", kv_k="f16", kv_v="f16"), **changes)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Engine]]:
    """A toy of three layers and its engine."""
    folder = tmp_path_factory.mktemp("report")
    model = write_model(folder / "toy", llama_config(num_hidden_layers=3))
    build(options(model, folder / "toy.edge", text_tokens=64))
    with read_engine(folder / "toy.edge") as opened:
        yield model, opened


def torch_run(model: Any, windows: tuple[list[int], ...]) -> tuple[list[Array], Array]:
    """transformers: residual stream after each layer (tokens, hidden), and logits of all but last tokens."""
    torch = pytest.importorskip("torch")
    layers: list[list[Array]] = [[] for _ in model.model.layers]

    def keep(states: list[Array], out: Any) -> None:
        states.append(
            (out[0] if isinstance(out, tuple) else out).reshape(-1, model.config.hidden_size).numpy()
        )

    hooks = [
        layer.register_forward_hook(lambda _module, _given, out, states=states: keep(states, out))
        for layer, states in zip(model.model.layers, layers, strict=True)
    ]
    scores = []
    with torch.no_grad():
        for window in windows:
            scores.append(model(torch.tensor([window])).logits[0, :-1].numpy())
    for hook in hooks:
        hook.remove()
    return [np.concatenate(states) for states in layers], np.concatenate(scores)


def torch_models(folder: Path, engine: Engine) -> tuple[Any, Any]:
    """The checkpoint in transformers, and a copy whose matrices are what the engine's planes decode to."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    exact, coarse = (load(folder, dtype=torch.float32, attn_implementation="eager") for _ in range(2))
    part = engine.part("language")
    origins = engine.manifest.parts["language"].origins
    state = coarse.state_dict()
    for name, origin in origins.items():
        values = decode(part.weights[name])
        state[f"{origin.key}.weight"][origin.row : origin.row + len(values)] = torch.from_numpy(values)
    state["model.embed_tokens.weight"][:] = torch.from_numpy(decode(part.weights["embed"]))
    coarse.load_state_dict(state)
    return exact, coarse


def log_softmax(z: Array) -> Array:
    z = z.astype(np.float64)
    z -= z.max(axis=1, keepdims=True)
    return z - np.log(np.exp(z).sum(axis=1, keepdims=True))


def figures(f: Array, q: Array, targets: Array) -> dict[str, float]:
    """The report's figures of logits f (f32) and q, directly."""
    log_f, log_q = log_softmax(f), log_softmax(q)
    kl = (np.exp(log_f) * (log_f - log_q)).sum(axis=1)
    rows = np.arange(len(targets))
    return {
        "perplexity": float(np.exp(-log_q[rows, targets].mean())),
        "perplexity_f32": float(np.exp(-log_f[rows, targets].mean())),
        "kl_mean": float(kl.mean()),
        "kl_p99": float(np.quantile(kl, 0.99)),
        "top1_agreement": float((f.argmax(axis=1) == q.argmax(axis=1)).mean()),
    }


def test_all_figures_are_those_of_transformers_states(engine: tuple[Path, Engine]) -> None:
    folder, opened = engine
    exact, coarse = torch_models(folder, opened)
    layers_f, logits_f = torch_run(exact, WINDOWS)
    layers_q, logits_q = torch_run(coarse, WINDOWS)
    part = opened.part("language")
    text = EvaluationText("test", tuple(np.array(w, np.int32) for w in WINDOWS))
    kv = msgspec.structs.replace(part.plan.kv, k="f32", v="f32")
    with open_source(folder) as source:
        weights = CheckpointWeights(read_program(source.config, context=part.plan.step.context), source)
        stored = EngineWeights(part.program, part.plan.tensors, lambda name: part.weights[name].planes)
        found = compare_models(weights, stored, kv, text)
    want = figures(logits_f, logits_q, np.concatenate([w[1:] for w in WINDOWS]))
    for name, value in want.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3), name
    assert found.kl_mean > 1e-3  # there is something to be measured
    assert len(found.layer_cosine) == 3
    for got, a, b in zip(found.layer_cosine, layers_f, layers_q, strict=True):
        a, b = a.astype(np.float64), b.astype(np.float64)
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert got == pytest.approx(cosine.mean(), abs=1e-6)
        assert got < 0.9999


def test_the_report_in_the_engine_is_the_one_measured(engine: tuple[Path, Engine]) -> None:
    quality = engine[1].manifest.quality
    assert quality is not None
    assert quality.backend == "reference" and quality.tokens == 64 and quality.task is None
    assert len(quality.layer_cosine) == 3 and all(0.9 < c < 0.9999 for c in quality.layer_cosine)
    assert quality.broken == ()


def test_equal_models_have_cosine_one(engine: tuple[Path, Engine]) -> None:
    with open_source(engine[0]) as source:
        weights = CheckpointWeights(read_program(source.config), source)
        kv = msgspec.structs.replace(engine[1].part("language").plan.kv, k="f32", v="f32")
        text = EvaluationText("test", tuple(np.array(w, np.int32) for w in WINDOWS))
        found = compare_models(weights, weights, kv, text)
    assert found.layer_cosine == (1.0, 1.0, 1.0) and found.kl_mean == 0.0


def test_layers_end_at_their_last_residual_add(engine: tuple[Path, Engine]) -> None:
    program = engine[1].part("language").program
    ends = layer_ends(program)
    assert len(ends) == len(program.cache) == 3
    for index, buffer in ends:
        op = program.ops[index]
        assert op.out == buffer == "hidden" and program.ops[index - 1].weight.endswith(".down")  # type: ignore[union-attr]


# --- native figures ---------------------------------------------------------------------------------------


def native_logits(path: Path, windows: list[Array]) -> Array:
    """Every window in one step of the cpu backend, its logits all at once."""
    with read_engine(path) as engine:
        part = engine.part("language")
        found = []
        for window in windows:
            n = len(window)
            pages = -(-n // part.plan.kv.page_tokens)
            kv = msgspec.structs.replace(part.plan.kv, pages=pages)
            step = StepShape(context=n, sequences=1, tokens=n, logits=n)
            executor = CPU.load(Part(part.program, part.weights, kv, step))
            at = np.arange(n, dtype=np.int32)
            table = np.arange(pages, dtype=np.int32)[None]
            batch = StepBatch(window.astype(np.int32), at, np.zeros(n, np.int32), table, at)
            found.append(executor.forward(batch)[:-1].copy())
            executor.close()
    return np.concatenate(found)


@pytest.mark.parametrize("kv", ["int8", "int8c"])
def test_native_figures_are_those_of_the_cpu_backends_logits(
    kv: str, real_model: Path, story_text: str, tmp_path: Path
) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "story.txt").write_text(story_text)
    quality: dict[str, Quality] = {}
    for backend in ("reference", "native"):
        request = Request(weights="int4_g32", kv_k=kv, kv_v="int8", context=128, step_tokens=50)
        made = Options(
            real_model,
            tmp_path / f"{backend}.edge",
            "cpu",
            request,
            text=tmp_path / "story.txt",
            text_tokens=300,
            eval_backend=backend,
        )
        found = build(made).manifest.quality
        assert found is not None
        quality[backend] = found
    got = quality["native"]
    assert got.backend == "cpu" and quality["reference"].backend == "reference"
    with open_source(real_model) as source:
        vocabulary = read_vocabulary(source, read_program(source.config).program.vocab_size)
        text = read_text(source, vocabulary, tmp_path / "story.txt", limit=300, window=128)
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    with torch.no_grad():
        f = [model(torch.tensor(w[None].astype(np.int64))).logits[0, :-1].numpy() for w in text.windows]
    q = native_logits(tmp_path / "native.edge", list(text.windows))
    want = figures(np.concatenate(f), q, np.concatenate([w[1:] for w in text.windows]))
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, rel=2e-3, abs=1e-6), name
    # int8 activations add an error of their own, and a small one beside that of 4-bit weights
    assert got.kl_mean != quality["reference"].kl_mean
    assert got.kl_mean == pytest.approx(quality["reference"].kl_mean, rel=0.25)
    assert got.layer_cosine == quality["reference"].layer_cosine
