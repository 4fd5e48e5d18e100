"""A session without a model: an executor whose next token depends on everything the sequence holds.

It keeps token ids where a backend keeps keys and values, and reads them back through the page tables. A page
given to the wrong sequence, a wrong position or a lost token changes the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from speaking_engine import SPECIAL, TEMPLATE, tokenizer_json, vocabulary
from toy_engine import toy_manifest

from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.plan import KvPlan, MemoryPlan, Plan, Prediction, StepShape
from edge_runtime.errors import NumericError
from edge_runtime.serving import tokenizer as serving
from edge_runtime.serving.chat import ChatTemplate
from edge_runtime.serving.session import Session


def make_tokenizer() -> serving.Tokenizer:
    return serving.Tokenizer(tokenizer_json(), vocabulary())


def next_token(history: Sequence[int], vocab: int) -> int:
    """What the fake model says after a sequence: never a special token."""
    value = 7
    for position, token in enumerate(history):
        value = (value * 31 + (position + 1) * (token + 11)) % 1_000_003
    return len(SPECIAL) + value % (vocab - len(SPECIAL))


def continuation(prompt: Sequence[int], count: int, vocab: int) -> list[int]:
    """The greedy answer of `count` tokens."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, vocab))
    return tokens[len(prompt) :]


class HistoryExecutor:
    """Executor over token ids. `spoil(history)` says which sequences give NaN; `script` sets the answer."""

    def __init__(self, kv: KvPlan, step: StepShape, vocab: int) -> None:
        self.kv, self.step, self.vocab = kv, step, vocab
        self.cache = np.full((kv.pages, kv.page_tokens), -1, np.int64)
        self.batches: list[StepBatch] = []
        self.spoil: Callable[[list[int]], bool] = lambda history: False
        self.raises = True  # a spoiled step raises, as the native backends do; else it gives NaN
        self.script: Callable[[list[int]], int] | None = None
        self.closed = False

    def forward(self, batch: StepBatch) -> np.ndarray:
        assert not self.closed
        for array in (batch.tokens, batch.positions, batch.sequence, batch.page_tables, batch.logit_rows):
            assert array.dtype == np.int32 and array.flags.c_contiguous
        assert 0 < len(batch.tokens) <= self.step.tokens
        assert len(batch.page_tables) <= self.step.sequences
        assert len(batch.logit_rows) <= self.step.logits
        assert (np.diff(batch.logit_rows) > 0).all()
        self.batches.append(batch)
        size = self.kv.page_tokens
        for token, position, row in zip(batch.tokens, batch.positions, batch.sequence, strict=True):
            page = batch.page_tables[row, position // size]
            assert page >= 0
            self.cache[page, position % size] = token
        logits = np.zeros((len(batch.logit_rows), self.vocab), np.float32)
        for i, t in enumerate(batch.logit_rows):
            history = self._history(batch, int(batch.sequence[t]), int(batch.positions[t]))
            if self.spoil(history):
                if self.raises:
                    raise NumericError("NaN in layer 0")
                logits[i] = np.nan
                continue
            chosen = self.script(history) if self.script else next_token(history, self.vocab)
            logits[i, chosen] = 5.0
        return logits

    def _history(self, batch: StepBatch, row: int, last: int) -> list[int]:
        size = self.kv.page_tokens
        return [int(self.cache[batch.page_tables[row, p // size], p % size]) for p in range(last + 1)]

    def copy_page(self, source: int, target: int) -> None:
        self.cache[target] = self.cache[source]

    @property
    def memory_bytes(self) -> int:
        return self.cache.nbytes

    def close(self) -> None:
        self.closed = True


def make_session(
    *,
    context: int = 64,
    sequences: int = 4,
    tokens: int = 16,
    logits: int | None = None,
    pages: int = 16,
    page_tokens: int = 16,
    max_waiting: int = 64,
    template: str | None = TEMPLATE,
    script: Callable[[list[int]], int] | None = None,
) -> tuple[Session, HistoryExecutor]:
    names = vocabulary()
    kv = KvPlan(k="f16", v="f16", page_tokens=page_tokens, pages=pages)
    step = StepShape(
        context=context, sequences=sequences, tokens=tokens, logits=sequences if logits is None else logits
    )
    memory = MemoryPlan(
        weights=0, kv=0, buffers=0, draft=0, device_code=0, context=0, reserve=0, total=1 << 30
    )
    plan = Plan(
        profile="cpu",
        power_mode="default",
        tensors={},
        kv=kv,
        step=step,
        memory=memory,
        predicted=Prediction(decode_tokens_per_s=1.0, first_token_ms=1.0, prompt_tokens=1),
    )
    executor = HistoryExecutor(kv, step, names.size)
    executor.script = script
    session = Session(
        manifest=toy_manifest({}),
        executor=executor,
        tokenizer=make_tokenizer(),
        chat_template=None if template is None else ChatTemplate(template.encode()),
        plan=plan,
        step=step,
        kv=kv,
        memory=memory,
        mapped_bytes=0,
        backend="fake",
        max_waiting=max_waiting,
    )
    return session, executor


def assert_idle(session: Session) -> None:
    """Nothing is left behind: no request, no page, no promise of one."""
    assert session.in_flight == 0
    assert session.pages_used == 0
    assert session._pool.available == session._pool.pages
    assert all(session._pool.references(page) == 0 for page in range(session._pool.pages))
