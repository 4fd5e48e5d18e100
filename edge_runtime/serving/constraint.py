"""Where an answer stands in its grammar: which tokens may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import GrammarError

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer


class Compiled:
    """A grammar over one model's tokens; its lexer is shared by all answers that follow it.

    broken: the lexer reached a limit, so that every later answer would fail: compile it again.
    """

    def __init__(self, matcher: LLMatcher, tokenizer: LLTokenizer, vocabulary: Vocabulary) -> None:
        self.matcher = matcher
        self.known = tokenizer.vocab_size  # ids beyond it are the model's padding
        self.size = vocabulary.size
        self.ends = np.array(vocabulary.eos, np.intp)
        self.broken = False

    def start(self) -> Constraint:
        return Constraint(self, self.matcher.deep_copy())


class Constraint:
    """The state of one answer. One thread at a time; others of the same grammar may run in other threads.

    Where the grammar leaves only one text, `mask` allows only the tokens that the tokenizer makes of it, as
    the model saw it in training. So a mask may be narrower than all that would spell a valid answer.
    """

    def __init__(self, compiled: Compiled, matcher: LLMatcher, ended: bool = False) -> None:
        self._compiled = compiled
        self._matcher = matcher
        self._ended = ended
        self._bits = np.zeros(-(-compiled.known // 32), np.int32)
        self._address = self._bits.ctypes.data  # which costs as much as the mask itself
        self._mask = np.zeros(compiled.size, bool)

    @property
    def may_end(self) -> bool:
        """Whether the answer so far is a whole one."""
        return self._ended or self._matcher.is_accepting()

    @property
    def is_done(self) -> bool:
        """Whether nothing but an end token may follow, or has followed."""
        return self._ended or self._matcher.is_stopped()

    def mask(self) -> Array:
        """Tokens that may come next: bool (vocab,), overwritten by the next call. After an end token, none.

        Raises GrammarError when the parser reached a limit or no token continues the answer.
        """
        out = self._mask
        out[:] = False
        if self._ended:
            return out
        if not self._matcher.is_stopped():
            self._matcher.unsafe_compute_mask_ptr(self._address, self._bits.nbytes)
            self._check()
            count = min(len(out), self._compiled.known)
            out[:count] = np.unpackbits(self._bits.view(np.uint8), count=count, bitorder="little")
        out[self._compiled.ends] = self._matcher.is_accepting()
        return out

    def advance(self, token: int) -> None:
        """Take the token that was chosen. Raises GrammarError when the grammar does not allow it."""
        if token in self._compiled.ends and self.may_end and not self._ended:
            self._ended = True
        elif self.is_done or not self._take(token):
            raise GrammarError(f"token {token} does not follow the grammar")

    def forced(self) -> list[int]:
        """The tokens that must come next, up to where there is a choice or only an end token may follow."""
        ahead = self.fork()
        tokens: list[int] = []
        while not ahead.is_done and (next_ones := ahead._matcher.compute_ff_tokens()):
            if next_ones[0] >= len(self._mask):
                break
            ahead.advance(next_ones[0])
            tokens.append(next_ones[0])
        return tokens

    def masks(self, tokens: Sequence[int]) -> Array:
        """Masks along drafted tokens: bool (n + 1, vocab), the first before any of them; n, the number that
        the masks allow one after the other, ends at the first that is not. The state stays as it is."""
        ahead = self.fork()
        rows = [ahead.mask().copy()]
        for token in tokens:
            if not 0 <= token < len(self._mask) or not rows[-1][token]:
                break
            ahead.advance(token)
            rows.append(ahead.mask().copy())
        return np.stack(rows)

    def allowed_prefix(self, tokens: Sequence[int]) -> int:
        """How many of the drafted tokens the masks allow. The state stays as it is."""
        return len(self.masks(tokens)) - 1

    def fork(self) -> Constraint:
        """A copy that goes its own way, for drafting ahead. Costs about 2 us: the lexer is shared."""
        return Constraint(self._compiled, self._matcher.deep_copy(), self._ended)

    def _take(self, token: int) -> bool:
        if not 0 <= token < min(len(self._mask), self._compiled.known):
            return False
        taken = self._matcher.try_consume_tokens([token]) == 1
        self._check()
        return taken

    def _check(self) -> None:
        if not self._matcher.is_error():
            return
        self._compiled.broken = True
        words = self._matcher.get_error().removesuffix("<non-verbose/>").strip()
        if words == "NoExtensionBias":
            words = "none of the model's tokens continues the answer"
        raise GrammarError(f"the grammar cannot go on: {words[:300]}")
