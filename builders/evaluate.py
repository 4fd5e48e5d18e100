"""What a build costs in quality: the engine's planes against the f32 checkpoint, without torch.

Both models run op by op on the reference backend, layer by layer and one tensor at a time, up to the input of
the logits; the logits are then compared block by block of the vocabulary. The engine's run uses the plan's KV
formats. Activations are f32 there; a native runner gives the engine's logits as a backend computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from builders import evaluation_text
from builders.comparison import BLOCK_ITEMS, Comparison, Positions, logits, measure, summarise
from builders.hidden import Restore, compare_hidden
from builders.runner import Runner
from builders.sources import Source
from builders.texts import ModelText, read_passages
from builders.weights import Weights, row_blocks
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.engine.plan import KvPlan
from edge_runtime.errors import BadConfig


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Token ids of the text, cut into windows that the context holds; `name` goes into the quality report."""

    name: str
    windows: tuple[Array, ...]

    @property
    def predicted(self) -> int:
        return sum(len(w) - 1 for w in self.windows)


def read_text(
    source: Source, vocabulary: Vocabulary, path: Path | None, *, limit: int, window: int
) -> EvaluationText:
    """The first `limit` tokens of a text, a folder of texts or a JSONL file of chats (see texts.py), or of
    the built-in text, in windows of at most `window` tokens.

    Every window begins with bos where the model has one. Raises BadConfig for a text that is not usable,
    BadCheckpoint for a tokenizer that is not, Unsupported for chats without minijinja.
    """
    name = evaluation_text.NAME if path is None else path.name
    ids = _ids(source, vocabulary, path, limit)
    start = [] if vocabulary.bos is None else [vocabulary.bos]
    room = window - len(start)
    ids = ids[:limit]
    count = -(-len(ids) // max(room, 1))  # windows of equal length: a short one would predict from nothing
    pieces = np.array_split(np.array(ids, np.int32), count) if ids and room > 0 else []
    windows = tuple(np.concatenate([start, p]).astype(np.int32) for p in pieces if len(start) + len(p) > 1)
    if not windows:
        raise BadConfig(f"{name} gives {len(ids)} tokens in windows of {window}; at least 2 are needed")
    return EvaluationText(name, windows)


def _ids(source: Source, vocabulary: Vocabulary, path: Path | None, limit: int) -> list[int]:
    """At least `limit` ids, or all; bos stands between two passages and not at the beginning."""
    with ModelText(source, vocabulary) as text:
        if path is None:
            return text.encode(evaluation_text.TEXT, evaluation_text.NAME)
        mark = [] if vocabulary.bos is None else [vocabulary.bos]
        found: list[int] = []
        for passage in read_passages(path):
            before, after = text.split(passage)
            ids = [*before, *after]
            if mark and ids[:1] == mark:  # of the chat template
                ids = ids[1:]
            found += [*mark, *ids] if found else ids
            if len(found) >= limit:
                break
    return found


def compare_models(
    reference: Weights,
    engine: Weights,
    kv: KvPlan,
    text: EvaluationText,
    runner: Runner | None = None,
    restore: Restore | None = None,
) -> Comparison:
    """Perplexity, KL, agreement and cosine by layer of `engine` (with its KV formats) against `reference`
    (with an f32 cache). With a `runner` of the engine its logits are those of that backend, int8 activations
    and all; the cosines are the reference backend's either way, of rows that `restore` gave back their basis.
    """
    x_f, x_q, cosines = compare_hidden(reference, engine, kv, text.windows, restore)
    if runner is None:
        targets = np.concatenate([w[1:] for w in text.windows])
        found = summarise([measure(_logit_blocks(reference, x_f, (engine, x_q)), targets)])
    else:
        found = summarise(list(_native(reference, x_f, text.windows, runner)))
    return replace(found, layer_cosine=cosines)


def _native(
    reference: Weights, x_f: Array, windows: tuple[Array, ...], runner: Runner
) -> Iterator[Positions]:
    """Figures of every step of the runner, one window after the other."""
    at = 0
    for window in windows:
        targets = window[1:]
        for given in runner.read(0, window[:-1], len(targets)):
            n = len(given)
            yield measure(_logit_blocks(reference, x_f[at : at + n], given), targets[:n])
            targets, at = targets[n:], at + n


def _logit_blocks(
    f: Weights, x_f: Array, engine: tuple[Weights, Array] | Array
) -> Iterator[tuple[int, Array, Array]]:
    """Blocks of the vocabulary for `measure`; of the engine weights and hidden states, or finished logits."""
    heads = [f.program.heads] + ([engine[0].program.heads] if isinstance(engine, tuple) else [])
    ends = sorted({op.first for ops in heads for op in ops} | {f.program.vocab_size})
    for first, end in pairwise(ends):
        # Blocks are bounded both in logits and in weights, and lie in one matrix of either.
        for a, b in row_blocks(end - first, max(len(x_f), f.program.hidden_width), BLOCK_ITEMS):
            start, stop = first + a, first + b
            logits_f = _logits(f, x_f, start, stop)
            yield (
                start,
                logits_f,
                _logits(*engine, start, stop) if isinstance(engine, tuple) else engine[:, start:stop],
            )


def _logits(weights: Weights, x: Array, start: int, stop: int) -> Array:
    """Of ids that lie in one matrix."""
    op = next(op for op in reversed(weights.program.heads) if op.first <= start)
    a, b = start - op.first, stop - op.first
    bias = None if op.bias is None else weights(op.bias)[0, a:b]
    return logits(op, x, weights.block(op.weight, a, b), bias)
