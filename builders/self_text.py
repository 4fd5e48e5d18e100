"""Text that a model writes itself, to calibrate on: LLM-QAT, Liu et al. 2023 (arXiv 2305.17888), section 2.1.

Plain sampling at temperature 1 gives the distribution that the model was trained on, where no user's text is
at hand. A text that ends is followed by another in the same window. A model of chats answers questions
instead: what it would write with nobody asking is nothing that it was trained to write.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from builders.torch_device import repeatable, resolve_device
from builders.torch_program import Past, TorchProgram
from builders.weights import Weights
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Vocabulary

ROWS = 32  # windows that are written together: fixed, so that sums do not depend on the number of cores
Starts = Sequence[Sequence[int]]


def write_samples(
    weights: Weights,
    vocabulary: Vocabulary,
    starts: Starts,
    *,
    samples: int,
    length: int,
    seed: int,
    device: str = "auto",
) -> Array:
    """int32 (samples, length) windows; every text in them begins with one of `starts` (ids), chosen by seed.

    The same seed gives the same windows, and more samples the same first ones; repetitions are left out. All
    weights of the model lie in memory in f32.
    """
    device = resolve_device(device)
    held = {name: torch.from_numpy(weights(name)).clone().to(device) for name in weights.program.tensors}
    program = TorchProgram(weights.program, held.__getitem__)

    def write(start: int) -> Array:
        authors = [
            _Author((seed, row), starts, vocabulary) for row in range(start, min(start + ROWS, samples))
        ]
        with torch.no_grad():
            return _write(program, authors, length, device)

    with repeatable(device) as workers:
        windows = np.concatenate(list(workers.map(write, range(0, samples, ROWS))))
    _, first = np.unique(windows, axis=0, return_index=True)
    return np.asarray(windows[np.sort(first)])


def plain_starts(vocabulary: Vocabulary) -> Starts:
    """bos; without one the end of an earlier text, and without either any token (as LLM-QAT begins)."""
    if vocabulary.bos is not None:
        return [[vocabulary.bos]]
    return [[vocabulary.eos[0]]] if vocabulary.eos else [[i] for i in range(vocabulary.size)]


class _Author:
    """One window in the making, with a stream of random numbers of its own."""

    def __init__(self, seed: tuple[int, int], starts: Starts, vocabulary: Vocabulary) -> None:
        self._rng = np.random.default_rng(seed)
        self._starts = starts
        # A bos that also ends a text begins the next one by itself
        self._ends = frozenset(vocabulary.eos) - ({vocabulary.bos} if len(starts) == 1 else set())
        self._given = self._begin()

    def next(self, scores: Array | None) -> int:
        """The next id: what is still given, or drawn by softmax(scores), f64 (vocabulary,)."""
        if self._given:
            return self._given.pop(0)
        assert scores is not None  # a start has at least one token
        weights = np.exp(scores - scores.max())
        cumulative = np.cumsum(weights)
        at = int(np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right"))
        token = min(at, len(scores) - 1)
        if token in self._ends:
            self._given = self._begin()
        return token

    def _begin(self) -> list[int]:
        return list(self._starts[int(self._rng.integers(len(self._starts)))])


def _write(program: TorchProgram, authors: Sequence[_Author], length: int, device: str) -> Array:
    """int32 (authors, length)."""
    ids = np.empty((len(authors), length), np.int32)
    ids[:, 0] = [author.next(None) for author in authors]
    past = Past(length)
    for at in range(1, length):
        tokens = torch.from_numpy(ids[:, at - 1 : at].astype(np.int64)).to(device)
        scores = program.logits(program.hidden(tokens, past=past)[:, -1]).double().cpu().numpy()
        ids[:, at] = [author.next(row) for author, row in zip(authors, scores, strict=True)]
    return ids
