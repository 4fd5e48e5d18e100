"""Stop strings: the same text however it is cut, and never a piece of a stop string."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.serving.stopping import StopText


def letter_by_letter(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain definition: the first prefix that ends in a stop string ends the text, before that string."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stops if text[:end].endswith(s)]
        if matches:
            return text[: end - max(map(len, matches))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(1, 5), max_size=30),
)
def test_any_cut_gives_the_same_text(text: str, stops: list[str], cuts: list[int]) -> None:
    want, found = letter_by_letter(text, stops)
    stop, shown, at = StopText(stops), "", 0
    for cut in [*cuts, len(text) + 1]:
        shown += stop.add(text[at : at + cut])
        at += cut
        # Whatever is still to come, this much will never have to be taken back
        assert want.startswith(shown)
        if not stop.found:
            assert not any(shown.endswith(s) for s in stops)
    if not stop.found:
        shown += stop.finish()
    assert (shown, stop.found) == (want, found)


def test_a_beginning_is_withheld_until_it_is_certain() -> None:
    stop = StopText(["\nUser:"])
    assert [stop.add(t) for t in ("Hello", " there\nU", "se", "ful", "\nUser", ": hi")] == [
        "Hello", " there", "", "\nUseful", "", "",
    ]  # fmt: skip
    assert stop.found and stop.add("more") == ""


def test_an_unfinished_beginning_is_shown_at_the_end() -> None:
    stop = StopText(["</s>"])
    assert stop.add("a </") == "a "
    assert stop.finish() == "</" and not stop.found
