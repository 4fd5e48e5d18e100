"""How long a step takes: what was measured, lines between, and nothing that one slow step could upset."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.serving.pace import Pace


def test_before_anything_was_measured_it_says_what_was_expected() -> None:
    assert Pace(0.02).predict(1) == Pace(0.02).predict(100) == 0.02
    assert Pace().predict(5) == 0.0


def test_a_size_takes_the_median_of_its_last_five_steps() -> None:
    pace = Pace()
    times = [9.0, 1.0, 1.2, 1.1, 8.0, 1.3, 1.4, 50.0, 60.0, 70.0]
    for i, seconds in enumerate(times):
        pace.note(3, seconds)
        last = sorted(times[max(0, i - 4) : i + 1])
        assert pace.predict(3) == last[(len(last) - 1) // 2]
        assert pace.knows(3) == (i >= 4)
    assert not pace.knows(4)


def test_a_step_that_was_held_up_changes_nothing_and_a_lasting_change_is_believed() -> None:
    pace = Pace()
    for _ in range(5):
        pace.note(1, 1.0)
    pace.note(1, 100.0)
    pace.note(1, 100.0)
    assert pace.predict(1) == 1.0
    pace.note(1, 3.0)
    assert pace.predict(1) == 3.0


@given(st.dictionaries(st.integers(1, 40), st.floats(1e-4, 10.0), min_size=1, max_size=8), st.integers(1, 60))
def test_it_is_linear_between_sizes_and_never_falls_with_them(
    measured: dict[int, float], tokens: int
) -> None:
    pace = Pace()
    for size, seconds in measured.items():
        pace.note(size, seconds)
    found = pace.predict(tokens)
    assert found > 0
    below = [n for n in measured if n <= tokens]
    above = [n for n in measured if n >= tokens]
    if tokens in measured:
        assert found == measured[tokens]
    elif not below:
        assert found == measured[min(above)]
    else:
        low = max(below)
        assert found >= measured[low]
        if above and measured[min(above)] >= measured[low]:
            high = min(above)
            share = (tokens - low) / (high - low)
            assert found == pytest.approx(measured[low] + share * (measured[high] - measured[low]))
