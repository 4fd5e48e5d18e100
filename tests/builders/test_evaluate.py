"""Quality figures against direct sums and against transformers; the limits that the formats are held to."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hf_folders import llama_config, write_model

from builders.archs import read_program
from builders.comparison import compare, logits
from builders.evaluate import EvaluationText, compare_models, read_text
from builders.hidden import hidden_states
from builders.pipeline import Options, build
from builders.planner import Request
from builders.sources import Source, open_source, read_vocabulary
from builders.weights import CheckpointWeights
from edge_runtime import open_engine
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Quality
from edge_runtime.engine.ops import Logits
from edge_runtime.engine.plan import KvPlan
from edge_runtime.errors import BadCheckpoint, BadConfig

F16 = KvPlan(k="f16", v="f16", page_tokens=16, pages=1)


def log_softmax(z: Array) -> Array:
    z = z.astype(np.float64)
    return (
        z
        - np.log(np.exp(z - z.max(axis=1, keepdims=True)).sum(axis=1, keepdims=True))
        - z.max(axis=1)[:, None]
    )


@pytest.mark.parametrize("block", [1, 7, 100, 1000])
@pytest.mark.parametrize("scale", [1.0, 20.0])
def test_online_comparison_equals_the_direct_one(block: int, scale: float) -> None:
    rng = np.random.default_rng(5)
    f = (rng.normal(0, scale, (40, 333)) + np.arange(333) * 0.1 * scale).astype(
        np.float32
    )  # the maximum moves
    q = (f + rng.normal(0, 0.3 * scale, f.shape)).astype(np.float32)
    targets = rng.integers(0, 333, 40)

    def blocks() -> Iterator[tuple[int, Array, Array]]:
        for start in range(0, 333, block):
            yield start, f[:, start : start + block], q[:, start : start + block]

    found = compare(blocks(), targets)
    log_f, log_q = log_softmax(f), log_softmax(q)
    kl = (np.exp(log_f) * (log_f - log_q)).sum(axis=1)
    rows = np.arange(40)
    assert found.tokens == 40
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-9)
    assert found.kl_p99 == pytest.approx(np.quantile(kl, 0.99), rel=1e-9)
    assert found.perplexity_f32 == pytest.approx(np.exp(-log_f[rows, targets].mean()), rel=1e-9)
    assert found.perplexity == pytest.approx(np.exp(-log_q[rows, targets].mean()), rel=1e-9)
    assert found.top1_agreement == (f.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_equal_models_differ_by_nothing() -> None:
    z = np.random.default_rng(1).normal(0, 4, (30, 64)).astype(np.float32)
    found = compare(iter([(0, z, z)]), np.zeros(30, np.int64))
    assert (found.kl_mean, found.kl_p99, found.top1_agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.perplexity_f32


def test_logits_obey_scale_bias_and_softcap() -> None:
    rng = np.random.default_rng(2)
    x, w, b = (rng.normal(0, 3, s).astype(np.float32) for s in ((4, 8), (6, 8), (6,)))
    found = logits(Logits(x="x", weight="w", scale=0.5, softcap=30.0, bias="b"), x, w, b)
    want = 30.0 * np.tanh(0.5 * (x.astype(np.float64) @ w.T + b) / 30.0)
    np.testing.assert_allclose(found, want, atol=1e-5)


def text_of(ids: list[list[int]]) -> EvaluationText:
    return EvaluationText("test", tuple(np.array(w, np.int32) for w in ids))


def test_f32_perplexity_equals_transformers(real_model: Path, story_text: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    (tmp_path / "story.txt").write_text(story_text)
    with open_source(real_model) as source:
        vocabulary = read_vocabulary(source, 512)
        text = read_text(source, vocabulary, tmp_path / "story.txt", limit=400, window=256)
        weights = CheckpointWeights(read_program(source.config), source)
        found = compare_models(weights, weights, F16, text)
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32)
    losses = []
    for window in text.windows:
        ids = torch.tensor(window.astype(np.int64))[None]
        with torch.no_grad():
            scores = model(ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none"))
    want = float(torch.exp(torch.cat(losses).mean()))
    assert found.perplexity_f32 == pytest.approx(want, rel=1e-5)
    assert found.tokens == text.predicted == 400


def test_windows_are_independent_of_each_other(tmp_path: Path) -> None:
    with open_source(write_model(tmp_path / "m")) as source:
        weights = CheckpointWeights(read_program(source.config), source)
        a, b = [1, 5, 9, 200, 7], [1, 77, 78]
        both = hidden_states(weights, F16, text_of([a, b]).windows)
        alone = [hidden_states(weights, F16, text_of([w]).windows) for w in (a, b)]
    # BLAS rounds by shape, nothing else may differ
    np.testing.assert_allclose(both, np.concatenate(alone), atol=1e-5)
    assert both.shape == (6, 32)


# --- limits of the formats, on really trained models ------------------------------------------------------


def quality_of(model: Path, folder: Path, story: str, weights: str, kv: str) -> Quality:
    (folder / "story.txt").write_text(story)
    request = Request(weights=weights, kv_k=kv, kv_v=kv)
    done = build(Options(model, folder / "m.edge", "cpu", request, text=folder / "story.txt"))
    assert done.manifest.quality is not None
    return done.manifest.quality


def test_f16_changes_nothing_that_counts(real_model: Path, tmp_path: Path, story_text: str) -> None:
    found = quality_of(real_model, tmp_path, story_text, "f16", "f16")
    assert found.perplexity == pytest.approx(found.perplexity_f32, rel=1e-3)
    assert found.kl_mean < 1e-5 and found.top1_agreement >= 0.99
    assert found.bits_per_weight == 16.0


def test_int8_row_keeps_98_percent_of_top_tokens(real_model: Path, tmp_path: Path, story_text: str) -> None:
    found = quality_of(real_model, tmp_path, story_text, "int8_row", "f16")
    assert found.tokens >= 500
    assert found.top1_agreement >= 0.98
    assert found.kl_mean < 0.002


def test_int4_g32_stays_within_its_limit(real_model: Path, tmp_path: Path, story_text: str) -> None:
    limit = {"stories260K": 1.10, "llama2xs": 1.18}[real_model.name]
    for text in (story_text, None):
        request = Request(weights="int4_g32")
        path = tmp_path / "story.txt" if text else None
        if path and text:
            path.write_text(text)
        found = build(Options(real_model, tmp_path / "m.edge", "cpu", request, text=path)).manifest.quality
        assert found is not None
        assert 1.0 < found.perplexity / found.perplexity_f32 <= limit


def test_fewer_bits_cost_more(real_model: Path, tmp_path: Path, story_text: str) -> None:
    kl = [
        quality_of(real_model, tmp_path, story_text, w, "f16").kl_mean
        for w in ("f16", "int8_row", "int4_g32")
    ]
    assert kl == sorted(kl)
    kl = [quality_of(real_model, tmp_path, story_text, "f16", kv).kl_mean for kv in ("f16", "int8", "int4")]
    assert kl == sorted(kl)  # the plan's KV formats are in the figures


# --- texts ------------------------------------------------------------------------------------------------


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Source]:
    with open_source(write_model(tmp_path / "m", llama_config())) as opened:
        yield opened


def test_text_is_cut_into_equal_windows_that_begin_with_bos(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 10)
    text = read_text(source, read_vocabulary(source, 300), path, limit=95, window=21)
    assert [len(w) for w in text.windows] == [20] * 5
    assert all(w[0] == 1 for w in text.windows)
    letters = np.concatenate([w[1:] for w in text.windows])
    assert bytes((letters[:10] - 3).tolist()).decode() == "abcdefghij"
    assert text.name == "t.txt" and text.predicted == 95


def test_the_builtin_text_is_used_when_none_is_given(source: Source) -> None:
    text = read_text(source, read_vocabulary(source, 300), None, limit=512, window=128)
    assert text.name == "builtin-robot-english-1" and text.predicted == 512


@pytest.mark.parametrize(
    ("data", "words"), [(b"", "0 tokens"), (b"\xff\xfe", "not UTF-8"), (None, "cannot read")]
)
def test_unusable_texts_are_refused(source: Source, tmp_path: Path, data: bytes | None, words: str) -> None:
    path = tmp_path / "t.txt"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(BadConfig, match=words):
        read_text(source, read_vocabulary(source, 300), path, limit=100, window=64)


@pytest.mark.parametrize("data", [b"{}", b'{"model": {"type": "Evil"}}', b'{"model": {"vocab": {"a": 0}}}'])
def test_broken_tokenizers_are_refused(tmp_path: Path, data: bytes) -> None:
    folder = write_model(tmp_path / "broken")
    (folder / "tokenizer.json").write_bytes(data)
    with open_source(folder) as opened, pytest.raises(BadCheckpoint, match=r"tokenizer\.json cannot be used"):
        read_text(opened, read_vocabulary(opened, 300), None, limit=100, window=64)


def test_a_folder_of_texts_is_one_text(source: Source, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("abc")
    (folder / "b.jsonl").write_text('{"text": "de"}\n{"prompt": "f", "completion": "g"}\n')
    (folder / "c.bin").write_bytes(b"\xff")  # of no kind that is read
    text = read_text(source, read_vocabulary(source, 300), folder, limit=100, window=64)
    (window,) = text.windows
    # bos before every passage, eos after an answer
    assert window.tolist() == [
        1,
        *(3 + b for b in b"abc"),
        1,
        *(3 + b for b in b"de"),
        1,
        *(3 + b for b in b"fg"),
        2,
    ]
    assert text.name == "texts"
    short = read_text(source, read_vocabulary(source, 300), folder, limit=5, window=64)
    assert short.windows[0].tolist() == window.tolist()[:6]


def test_chats_are_measured_as_the_runtime_has_them(tmp_path: Path) -> None:
    planner = Path(__file__).resolve().parents[2] / "examples" / "planner" / "model"
    chat = [{"role": "user", "content": "stop </s>"}, {"role": "assistant", "content": "[]"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
    build(Options(planner, tmp_path / "m.edge", "cpu", text=tmp_path / "chat.jsonl"))
    with open_engine(tmp_path / "m.edge", backend="reference") as session:
        ids = session.chat_prompt(chat, answer=False)
        bos = session.tokenizer.vocabulary.bos
    with open_source(planner) as opened:
        vocabulary = read_vocabulary(opened, 10_000)
        text = read_text(opened, vocabulary, tmp_path / "chat.jsonl", limit=1000, window=512)
    assert text.windows[0].tolist() == ([bos] if bos is not None and ids[0] != bos else []) + ids
