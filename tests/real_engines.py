"""Engines of really trained models: the shipped planner, and the shared story models where they are.

An engine is built once a run. Its draft is a model with the same tokenizer; its Medusa heads are fitted to
answers of the model itself to other prompts, so that some guesses stand and some do not.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from builders.cli import main as edge_build
from builders.sources.medusa import CONFIG, WEIGHTS, tensor_keys
from edge_runtime import Request, Session, open_engine
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.serving import loop
from edge_runtime.serving.sampling import Sampler
from edge_runtime.serving.sequence import Sequence as Served
from edge_runtime.serving.verification import Proposal

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
PLANNER = ROOT / "examples" / "planner"
MODELS = {
    "planner": (PLANNER / "model", PLANNER / "draft"),
    "stories260K": (SHARED / "models" / "stories260K", SHARED / "models" / "llama2xs"),
    "llama2xs": (SHARED / "models" / "llama2xs", SHARED / "models" / "stories260K"),
}
HEADS = 3
FITTED = 60  # tokens of each answer that heads are fitted to


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request. rows f32 (tokens, vocabulary): the logits that each token was chosen from."""

    tokens: tuple[int, ...]
    rows: np.ndarray
    reason: str | None
    cached: int
    drafted: int
    accepted: int


class Recorder:
    """Runs requests and keeps the logits that their tokens were chosen from."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._rows: dict[Sampler, list[np.ndarray]] = {}
        walk = loop.walk

        def recorded(rows: np.ndarray, proposal: Proposal | None, sampler: Sampler) -> Iterator[object]:
            at = -1
            for choice, following in walk(rows, proposal, sampler):
                self._rows.setdefault(sampler, []).append(rows[at + 1].copy())
                yield choice, following
                at = -1 if following is None else following

        monkeypatch.setattr(loop, "walk", recorded)
        monkeypatch.setattr(Sampler, "candidates", None)  # so that all of them see logits

    def together(self, session: Session, requests: Sequence[Request]) -> list[Answer]:
        """All requests in flight at once."""
        served = [session._traffic.live[session.submit(request)] for request in requests]
        while session.in_flight:
            session.step()
        return [self.answer(s) for s in served]

    def alone(self, session: Session, requests: Sequence[Request]) -> list[Answer]:
        """One after the other, none of which finds anything in the cache."""
        found = []
        for request in requests:
            session._tree.drop(None)
            found += self.together(session, [request])
            assert found[-1].cached == 0
        return found

    def answer(self, s: Served) -> Answer:
        """Of a sequence that has ended."""
        rows = np.array(self._rows.pop(s.sampler, []), np.float32)
        return Answer(tuple(s.answer), rows, s.finish_reason, s.cached, s.record.drafted, s.record.accepted)


def same(got: Sequence[Answer], want: Sequence[Answer]) -> bool:
    """Whether all answers have the same tokens and, to the bit, the same logits."""
    return len(got) == len(want) and all(
        g.tokens == w.tokens
        and g.reason == w.reason == "length"
        and g.rows.shape == w.rows.shape
        and np.array_equal(g.rows.view(np.int32), w.rows.view(np.int32))
        for g, w in zip(got, want, strict=True)
    )


class Engines:
    """Builds engines into a folder, each once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def build(self, model: str, *options: str, name: str = "plain") -> Path:
        """The engine `name` of a model, with options of edge-build; skips where the model is absent."""
        target = self._folder / f"{model}-{name}.edge"
        if not target.is_file():
            folder, _ = MODELS[model]
            if not (folder / "model.safetensors").is_file():
                pytest.skip(f"real model {model} is not at {folder}")
            words = ["--profile", "cpu", "--weights", "int4_g64", "--kv", "f16", "--no-eval", "--json"]
            words += ["--sequences", "8", "--kv-tokens", "2048", "--step-tokens", "256", *options]
            assert edge_build([*words, "-o", str(target), str(folder)]) == 0
        return target

    def full(self, model: str) -> Path:
        """With a draft and Medusa heads."""
        if not (self._folder / f"{model}-full.edge").is_file():
            heads = self._folder / f"{model}-heads"
            with open_engine(self.build(model), speculate="off", kv="f32") as session:
                fit_heads(session, prompts(session, model, 20)[8:], heads)
            words = ("--context", "256", "--draft", str(MODELS[model][1]), "--medusa", str(heads))
            return self.build(model, *words, name="full")
        return self._folder / f"{model}-full.edge"


def prompts(session: Session, model: str, count: int) -> list[list[int]]:
    """Token ids of so many different prompts of a kind that the model was trained for, 5 to 100 tokens."""
    if model == "planner":
        lines = (PLANNER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        return [session.chat_prompt([{"role": "user", "content": json.loads(x)["prompt"]}]) for x in lines]
    story = (ROOT / "tests" / "text" / "story.txt").read_text(encoding="utf-8")
    ids = session.tokenizer.encode(story, start=False)
    bos = session.tokenizer.vocabulary.bos
    assert bos is not None
    found = []
    for i in range(count):
        at, length = i * 41 % (len(ids) - 100), 4 + (i * 37) % 96
        found.append([bos, *ids[at : at + length]])
    return found


def fit_heads(session: Session, texts: list[list[int]], folder: Path) -> None:
    """Write Medusa heads whose vocabulary projections are a ridge regression, over the hidden rows of the
    model's own greedy answers, onto the token that head k is to guess; proj stays zero.
    """
    executor = session._executor
    hidden, tokens = [], []
    forward = executor.forward
    with (
        _replaced(executor, "likeliest", lambda batch: HostLogits.likeliest(executor, batch)),
        _replaced(executor, "forward", lambda batch: _note(forward(batch), executor, batch, hidden, tokens)),
    ):
        for text in texts:
            session._tree.drop(None)
            session.complete(text, max_tokens=FITTED, ignore_eos=True)
            hidden.append(None)
            tokens.append(-1)  # no text goes on in the next
    vocab = session.tokenizer.vocabulary.size
    width = next(row for row in hidden if row is not None).shape[0]
    out = {}
    for k in range(1, HEADS + 1):
        pairs = [
            (hidden[i], tokens[i + k])
            for i in range(len(tokens) - k)
            if all(row is not None for row in hidden[i : i + k + 1])
        ]
        x = np.stack([row for row, _ in pairs]).astype(np.float64)  # (n, width)
        y = np.zeros((len(pairs), vocab))
        y[np.arange(len(pairs)), [token for _, token in pairs]] = 1.0
        ridge = x.T @ x + 1e-3 * np.trace(x.T @ x) / width * np.eye(width)
        keys = tensor_keys(k)
        out[keys["head"]] = (20.0 * np.linalg.solve(ridge, x.T @ y).T).astype(np.float16)
        out[keys["proj"]] = np.zeros((width, width), np.float16)
        out[keys["proj_bias"]] = np.zeros(width, np.float16)
    folder.mkdir()
    save_file({name: np.ascontiguousarray(a) for name, a in out.items()}, folder / WEIGHTS)
    config = {"heads": HEADS, "hidden_size": width, "vocab_size": vocab, "base": "fitted", "base_sha256": {}}
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def _note(
    logits: np.ndarray, executor: object, batch: StepBatch, hidden: list[object], tokens: list[int]
) -> np.ndarray:
    """The row that a token is chosen from, and that token: head k of it guesses the k-th after that."""
    if len(batch.logit_rows):
        hidden.append(executor.hidden[-1].copy())  # type: ignore[attr-defined]
        tokens.append(int(logits[-1].argmax()))
    return logits


@contextmanager
def _replaced(thing: object, name: str, value: object) -> Iterator[None]:
    setattr(thing, name, value)
    try:
        yield
    finally:
        delattr(thing, name)
