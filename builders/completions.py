"""A batch of lessons as torch sees it, and the losses that are taken on what is learned of it.

Rows are padded on the right, where a causal model's other tokens cannot see it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from builders.lessons import Lesson, batches

LOGITS_AT_ONCE = 1 << 23  # of one product with the head while measuring: bounds memory of large vocabularies


class Model(Protocol):
    """What a TorchProgram gives: hidden (rows, length, hidden) of ids (rows, length), and logits of rows."""

    def hidden(self, tokens: Tensor) -> Tensor: ...

    def logits(self, hidden: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Completions:
    """ids (rows, length); `targets[i]` is learned after position `places[i, 1]` of row `places[i, 0]`."""

    ids: Tensor
    places: Tensor
    targets: Tensor

    def rows(self, model: Model) -> Tensor:
        """Hidden rows (n, hidden) at the places."""
        return model.hidden(self.ids)[self.places[:, 0], self.places[:, 1]]


def completions(batch: Sequence[Lesson]) -> Completions:
    width = max(len(lesson.ids) for lesson in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    for i, lesson in enumerate(batch):
        ids[i, : len(lesson.ids)] = torch.tensor(lesson.ids)
    length = torch.tensor([len(lesson.ids) for lesson in batch])[:, None]
    start = torch.tensor([lesson.start for lesson in batch])[:, None]
    at = torch.arange(width)[None]
    places = ((at >= start - 1) & (at + 1 < length)).nonzero()
    return Completions(ids, places, ids[places[:, 0], places[:, 1] + 1])


def cross_entropy(model: Model, asked: Completions) -> Tensor:
    """Mean over the learned tokens, nats."""
    return F.cross_entropy(model.logits(asked.rows(model)), asked.targets)


def distillation(model: Model, teacher: Model, asked: Completions) -> Tensor:
    """Mean KL(teacher || model) over the places, nats: the loss of LLM-QAT (Liu et al. 2023, 2305.17888)."""
    with torch.no_grad():
        wanted = F.log_softmax(teacher.logits(asked.rows(teacher)), -1)
    said = F.log_softmax(model.logits(asked.rows(model)), -1)
    return F.kl_div(said, wanted, reduction="batchmean", log_target=True)


@dataclass(frozen=True, slots=True)
class Measured:
    """Over `tokens` learned tokens: mean cross-entropy in nats, and the share of right first choices."""

    loss: float
    accuracy: float
    tokens: int


@torch.no_grad()
def measure(model: Model, lessons: Sequence[Lesson], tokens: int) -> Measured:
    """Each lesson once, in batches of at most `tokens`."""
    loss, right, count, seen = 0.0, 0, 0, 0
    for batch in batches(lessons, tokens, 0):
        asked = completions(batch)
        rows = asked.rows(model)
        vocabulary = model.logits(rows[:1]).shape[-1]
        piece = max(LOGITS_AT_ONCE // vocabulary, 1)
        for x, wanted in zip(rows.split(piece), asked.targets.split(piece), strict=True):
            scores = model.logits(x)
            loss += float(F.cross_entropy(scores, wanted, reduction="sum"))
            right += int((scores.argmax(-1) == wanted).sum())
        count += len(asked.targets)
        seen += len(batch)
        if seen >= len(lessons):
            break
    return Measured(loss / count, right / count, count)
