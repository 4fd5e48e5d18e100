"""Look-up against the plain definition: what followed the longest run of last tokens when it last came."""

from __future__ import annotations

from history_model import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving.lookup import Lookup
from edge_runtime.serving.ngrams import NgramIndex
from edge_runtime.serving.request import Request
from edge_runtime.serving.sampling import Choice
from edge_runtime.serving.sequence import Sequence

TOKENIZER = make_tokenizer()


def naive(tokens: list[int]) -> int | None:
    for n in (4, 3, 2):
        for end in range(len(tokens) - 1, n - 1, -1):
            if tokens[end - n : end] == tokens[-n:]:
                return end
    return None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60), st.lists(st.integers(1, 9), max_size=20))
def test_the_latest_place_of_the_longest_run_is_found_however_the_text_grew(
    text: list[int], pieces: list[int]
) -> None:
    index, at = NgramIndex(), 0
    for piece in [*pieces, len(text) + 1]:
        at += piece
        assert index.find(text[:at]) == naive(text[:at])


def test_guesses_are_what_followed_and_never_beyond_the_text() -> None:
    lookup = Lookup(6)
    prompt = [9, 7, 8, 5, 6, 7, 8]
    sequence = Sequence(1, Request(prompt=prompt, max_tokens=9), prompt, 9, TOKENIZER)
    assert lookup.ready(sequence) == 4
    (proposal,) = lookup.propose([(sequence, 4)])
    assert proposal is not None and list(proposal.tokens) == [5, 6, 7, 8] and proposal.odds is None
    (proposal,) = lookup.propose([(sequence, 2)])
    assert proposal is not None and list(proposal.tokens) == [5, 6]
    sequence.commit(Choice(10))
    assert lookup.ready(sequence) == 0
    assert lookup.propose([(sequence, 3)]) == [None]
