"""A session without a model: an executor whose next token depends on everything the sequence holds.

It keeps token ids where a backend keeps keys and values, and reads them back through the page tables. A page
given to the wrong sequence, a wrong position or a lost token changes the answer. So does an adapter: what a
sequence stored with one is another history than what it stored with none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import perf_counter

import numpy as np
from speaking_engine import SPECIAL, TEMPLATE, tokenizer_json, vocabulary
from toy_engine import toy_manifest

from edge_runtime.backends.chain import run_chain
from edge_runtime.backends.likeliest import HostLogits
from edge_runtime.backends.protocol import StepBatch
from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.plan import KvPlan, MemoryPlan, Plan, Prediction, StepShape
from edge_runtime.errors import BadRequest, NumericError
from edge_runtime.serving import tokenizer as serving
from edge_runtime.serving.chat import ChatTemplate
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.session import Session
from edge_runtime.serving.speculative import Proposer


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


ADAPTED = 1_000_000  # a token stored with adapter n is kept as token + (n + 1) * ADAPTED


def adapted(tokens: Sequence[int], adapter: int) -> list[int]:
    """Tokens as the cache holds them under an adapter (-1 = none)."""
    return [token + (adapter + 1) * ADAPTED for token in tokens]


def adapted_continuation(prompt: Sequence[int], count: int, vocab: int, adapter: int) -> list[int]:
    """The greedy answer of `count` tokens of a sequence that uses an adapter from its first token on."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(adapted(tokens, adapter), vocab))
    return tokens[len(prompt) :]


class HistoryExecutor(HostLogits):
    """Executor over token ids. `spoil(history)` says which sequences give NaN; `script` sets the answer.

    words: the answer's tokens are below it; few of them make guesses come true.
    `hidden` f32 (L, 1) is a number below 2^20 that the sequence so far decides. `inputs` are ignored.
    """

    def __init__(self, kv: KvPlan, step: StepShape, vocab: int) -> None:
        self.kv, self.step, self.vocab = kv, step, vocab
        self.words = vocab
        self.cache = np.full((kv.pages, kv.page_tokens), -1, np.int64)
        self.batches: list[StepBatch] = []
        self.spoil: Callable[[list[int]], bool] = lambda history: False
        self.raises = True  # a spoiled step raises, as the native backends do; else it gives NaN
        self.script: Callable[[list[int]], int] | None = None
        self.closed = False
        self.adapters: dict[int, Adapter] = {}
        self.hidden = np.zeros((0, 1), np.float32)

    def forward(self, batch: StepBatch) -> np.ndarray:
        assert not self.closed
        for array in (batch.tokens, batch.positions, batch.sequence, batch.page_tables, batch.logit_rows):
            assert array.dtype == np.int32 and array.flags.c_contiguous
        assert 0 < len(batch.tokens) <= self.step.tokens
        assert len(batch.page_tables) <= self.step.sequences
        assert len(batch.logit_rows) <= self.step.logits
        assert (np.diff(batch.logit_rows) > 0).all()
        self.batches.append(batch)
        parents, places, adapters = self._optional(batch)
        size = self.kv.page_tokens
        for token, place, row in zip(batch.tokens, places, batch.sequence, strict=True):
            page = batch.page_tables[row, place // size]
            assert page >= 0
            self.cache[page, place % size] = token + (adapters[row] + 1) * ADAPTED
        logits = np.zeros((len(batch.logit_rows), self.vocab), np.float32)
        self.hidden = np.zeros((len(batch.logit_rows), 1), np.float32)
        for i, t in enumerate(batch.logit_rows):
            stored = self._history(batch, int(t), parents, places)
            history = [token % ADAPTED for token in stored]
            self.hidden[i] = next_token(stored, 1 << 20)
            if self.spoil(history):
                if self.raises:
                    raise NumericError("NaN in layer 0")
                logits[i] = np.nan
                continue
            chosen = self.script(history) if self.script else next_token(stored, self.words)
            logits[i, chosen] = 5.0
        return logits

    def _optional(self, batch: StepBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """parents (T,), places (T,) and adapters (S,), with what a step without them means."""
        count, sequences = len(batch.tokens), len(batch.page_tables)
        for array, length in (
            (batch.parents, count),
            (batch.places, count),
            (batch.slots, sequences),
            (batch.adapters, sequences),
        ):
            assert array is None or (array.dtype == np.int32 and array.shape == (length,))
        assert (batch.parents is None) == (batch.places is None)
        parents = np.full(count, -1) if batch.parents is None else batch.parents
        places = batch.positions if batch.places is None else batch.places
        adapters = np.full(sequences, -1) if batch.adapters is None else batch.adapters
        assert all(number == -1 or number in self.adapters for number in adapters.tolist())
        if batch.slots is not None:
            assert len(set(batch.slots.tolist())) == sequences
            assert all(0 <= slot < self.step.sequences for slot in batch.slots.tolist())
        for t, parent in enumerate(parents.tolist()):
            assert -1 <= parent < t
            assert parent < 0 or batch.sequence[parent] == batch.sequence[t]
            assert parent < 0 or batch.positions[parent] == batch.positions[t] - 1
        keys = set(zip(batch.sequence.tolist(), places.tolist(), strict=True))
        assert len(keys) == count
        return parents, places, adapters

    def _history(self, batch: StepBatch, t: int, parents: np.ndarray, places: np.ndarray) -> list[int]:
        """What token t sees: the places below its topmost ancestor's position, then its ancestors, itself."""
        size, row = self.kv.page_tokens, batch.sequence[t]
        path = [t]
        while parents[path[-1]] >= 0:
            path.append(int(parents[path[-1]]))
        seen = [*range(int(batch.positions[path[-1]])), *(int(places[i]) for i in reversed(path))]
        return [int(self.cache[batch.page_tables[row, p // size], p % size]) for p in seen]

    def chain(self, batch: StepBatch, count: int) -> np.ndarray:
        return run_chain(self, batch, count)

    def copy_page(self, source: int, target: int) -> None:
        self.cache[target] = self.cache[source]

    def move(self, pages: np.ndarray, sources: np.ndarray, targets: np.ndarray) -> None:
        assert (np.diff(sources) > 0).all() and (np.diff(targets) > 0).all() and (sources >= targets).all()
        size = self.kv.page_tokens
        assert (pages[sources // size] >= 0).all() and (pages[targets // size] >= 0).all()
        self.cache[pages[targets // size], targets % size] = self.cache[
            pages[sources // size], sources % size
        ]

    @property
    def page_nbytes(self) -> int:
        return int(self.cache[0].nbytes)

    def read_page(self, page: int) -> np.ndarray:
        return self.cache[page].view(np.uint8).copy()

    def write_page(self, page: int, data: np.ndarray) -> None:
        assert data.dtype == np.uint8
        if data.shape != (self.page_nbytes,):
            raise BadRequest(f"a page has {self.page_nbytes} bytes, not {data.shape}")
        self.cache[page] = data.view(np.int64)

    def add_adapter(self, adapter: Adapter) -> int:
        number = next(i for i in range(len(self.adapters) + 1) if i not in self.adapters)
        self.adapters[number] = adapter
        return number

    def drop_adapter(self, number: int) -> None:
        if number not in self.adapters:
            raise BadRequest(f"adapter {number} is not loaded")
        del self.adapters[number]

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
    proposer: Callable[[KvPlan, StepShape], Proposer] | None = None,
    gated: bool = True,
    clock: Clock = perf_counter,
    kind: type[HistoryExecutor] = HistoryExecutor,
) -> tuple[Session, HistoryExecutor]:
    """proposer: makes the session's way to guess, out of the sizes that its cache and steps have."""
    names = vocabulary()
    kv = KvPlan(k="f16", v="f16", page_tokens=page_tokens, pages=pages)
    step = StepShape(
        context=context, sequences=sequences, tokens=tokens, logits=sequences if logits is None else logits
    )
    memory = MemoryPlan(
        weights=0, kv=0, buffers=0, draft=0, adapters=0, device_code=0, context=0, reserve=0, total=1 << 30
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
    executor = kind(kv, step, names.size)
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
        proposer=None if proposer is None else proposer(kv, step),
        gated=gated,
        max_waiting=max_waiting,
        clock=clock,
    )
    return session, executor


def assert_idle(session: Session) -> None:
    """Nothing is left behind: no request, no page, no promise of one."""
    assert session.in_flight == 0
    assert session.pages_used == 0
    assert session._pool.available == session._pool.pages
    assert all(session._pool.references(page) == 0 for page in range(session._pool.pages))
