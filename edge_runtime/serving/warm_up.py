"""Every shape of step run before the first request: what is slow the first time is slow before it matters."""

from __future__ import annotations

from collections.abc import Iterator

from edge_runtime.backends.protocol import Executor
from edge_runtime.engine.plan import StepShape
from edge_runtime.serving.batches import Batches
from edge_runtime.serving.pages import PagePool
from edge_runtime.serving.request import Request
from edge_runtime.serving.scheduler import Item
from edge_runtime.serving.sequence import Sequence
from edge_runtime.serving.speculative import Proposer
from edge_runtime.serving.tokenizer import Tokenizer
from edge_runtime.serving.verification import Proposal


def warm_up(
    executor: Executor, proposer: Proposer | None, pool: PagePool, step: StepShape, tokenizer: Tokenizer
) -> None:
    """Prompt chunks of 1, 2, 4, ... step.tokens; decoding of 1 to step.sequences sequences, plainly and with
    guesses: one sequence with each number of them, several with as many as a step takes. What a backend
    prepares for a size of step is made for all sizes first, also those that there are no free pages to run.

    Only free pages are used, none whose content is kept. Nothing may be in flight. Raises NumericError.
    """
    executor.warm_up(range(1, step.tokens + 1))
    if proposer is not None:
        proposer.warm_up(step.sequences)
    warm = _WarmUp(executor, pool, step, tokenizer)
    warm.chunks()
    lengths = () if proposer is None else tuple(proposer.lengths)
    longest = max((n for n in lengths if warm.fits(1, n)), default=0)
    with_room = warm.open(step.sequences, min(step.context, 2 + longest))
    try:
        for count in range(1, len(with_room) + 1):
            some = with_room[:count]
            warm.decode(some)
            if proposer is not None:
                fitting = [n for n in lengths if n <= longest and warm.fits(count, n)]
                for length in fitting if count == 1 else fitting[-1:]:
                    warm.guess(some, proposer, length)
    finally:
        warm.close(with_room)
        if proposer is not None:
            proposer.forget()


class _WarmUp:
    def __init__(self, executor: Executor, pool: PagePool, step: StepShape, tokenizer: Tokenizer) -> None:
        self._executor = executor
        self._pool = pool
        self._step = step
        self._tokenizer = tokenizer
        self._width = -(-step.context // pool.page_tokens)
        self._batches = Batches(step.sequences, self._width)
        self._token = tokenizer.vocabulary.bos or 0  # any will do

    def fits(self, count: int, guesses: int) -> bool:
        """Whether a step takes so many sequences with so many guesses each."""
        rows = count * (1 + guesses)
        return rows <= min(self._step.tokens, self._step.logits) and 2 + guesses <= self._step.context

    def chunks(self) -> None:
        """Parts of a prompt, as long as a step takes, the context and the free pages hold."""
        most = min(self._step.tokens, self._step.context, self._free * self._pool.page_tokens)
        for tokens in _doubled(most):
            opened = self.open(1, tokens)
            try:
                for s in opened:
                    s.tokens = [self._token] * tokens
                    self._run([Item(s, 0, tokens, choose=True)])
            finally:
                self.close(opened)

    def decode(self, sequences: list[Sequence]) -> None:
        """A step of one token of each."""
        self._run([Item(s, 0, 1, choose=True) for s in sequences])

    def guess(self, sequences: list[Sequence], proposer: Proposer, length: int) -> None:
        """Guesses made and verified behind one token of the answer."""
        if proposer.name == "medusa":  # it reads the row that the last token was chosen from
            for s, row in zip(sequences, self._executor.hidden, strict=False):
                s.hidden = row.copy()
        for s in sequences:
            s.tokens = [self._token] * 2
            s.computed = 1
            self._extend(s, 2 + length)
        able = [(s, n) for s in sequences if (n := min(length, proposer.ready(s))) > 0]
        proposals = proposer.propose(able) if able else []
        if len(proposals) < len(sequences):  # there was nothing to look up, or a draft's context is short
            proposals = [Proposal([self._token] * length)] * len(sequences)
        self._run([Item(s, 1, 1, choose=True, proposal=p) for s, p in zip(sequences, proposals, strict=True)])
        for s in sequences:
            s.tokens, s.computed, s.draft_computed, s.hidden = [self._token], 0, 0, None
            if s.pages is not None:
                s.pages.trim(0)
        self.decode(sequences)  # leaves positions and hidden rows as the next length expects them

    def open(self, count: int, tokens: int) -> list[Sequence]:
        """Up to `count` sequences with room for so many tokens each, in pages that are free."""
        opened: list[Sequence] = []
        need = self._pool.pages_for(tokens)
        for slot in range(min(count, self._free // max(1, need))):
            table = self._pool.open(tokens, self._width)
            if table is None:
                break
            request = Request(prompt=[self._token], ignore_eos=True)
            s = Sequence(0, request, [self._token], tokens, self._tokenizer)
            s.pages, s.slot = table, slot
            opened.append(s)
        return opened

    def close(self, sequences: list[Sequence]) -> None:
        for s in sequences:
            if s.pages is not None:
                s.pages.close()
                s.pages = None

    @property
    def _free(self) -> int:
        """Pages that hold nothing that anybody may want."""
        return self._pool.available - self._pool.kept

    def _run(self, items: list[Item]) -> None:
        for item in items:
            self._extend(item.sequence, item.start + item.rows)
        self._executor.likeliest(self._batches.make(items))

    def _extend(self, s: Sequence, tokens: int) -> None:
        if s.pages is not None and s.pages.tokens < tokens:
            s.pages.extend(tokens - s.pages.tokens)


def _doubled(most: int) -> Iterator[int]:
    """1, 2, 4, ... and `most` itself."""
    count = 1
    while count < most:
        yield count
        count *= 2
    if most > 0:
        yield most
