"""The KL divergence of models' answers from one model's, by the rows that each has before its logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from builders.segment_runner import load
from builders.torch_program import TorchProgram
from builders.weights import Weights, row_blocks
from edge_runtime.engine.ops import weights as names_of
from edge_runtime.engine.program import Program

Span = tuple[int, int]
Head = Mapping[str, Tensor]  # the tensors that the logits read, on the device
_Each = Callable[[Callable[[Span], float], Iterable[Span]], Iterable[float]]


def load_head(weights: Weights, device: str) -> dict[str, Tensor]:
    names = (name for op in weights.program.heads for name in names_of(op))
    return {name: load(weights, name, device) for name in names}


class Answers:
    """A model's answers to rows (tokens, hidden), on the device, that others' are held against.

    They are taken in blocks of tokens, of about `items` log-probabilities in f64; `kept` ones are made once
    and stay in memory, for many others.
    """

    def __init__(self, program: Program, head: Head, rows: Tensor, items: int, *, kept: bool = False) -> None:
        self._program, self._head, self._rows = program, head, rows
        self._spans = row_blocks(len(rows), program.vocab_size, items)
        self._kept = {span: self._of(head, rows, span) for span in self._spans} if kept else {}

    def kl(self, head: Head, rows: Tensor, each: _Each = map) -> float:
        """KL(model || other), the mean over all tokens in nats, of another's rows of the same tokens. `each`
        goes through the blocks, and gives their sums in order."""

        def measure(span: Span) -> float:
            want = self._kept[span] if self._kept else self._of(self._head, self._rows, span)
            got = self._of(head, rows, span)
            return float((want.exp() * (want - got)).sum())

        total = 0.0
        for part in each(measure, self._spans):  # not sum(): from Python 3.12 on that adds in another way
            total += part
        return max(total / len(rows), 0.0)  # rounding may leave -1e-16 where both are equal

    def _of(self, head: Head, rows: Tensor, span: Span) -> Tensor:
        with torch.no_grad():
            logits = TorchProgram(self._program, head.__getitem__, checked=True).logits(rows[slice(*span)])
            return logits.double().log_softmax(-1)
