"""The integer program against brute force, greedy upgrades and its own relaxation."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from builders.mixed import Budget, Option, Problem, closest, prices, solve, undominated

pytest.importorskip("scipy")


def random_problem(seed: int, units: int, options: int, rows: int, tightness: float = 0.5) -> Problem:
    """Losses fall and costs rise with the option's number, roughly; costs are whole, some options tie."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(units):
        size = int(rng.integers(1, 6))
        bits = np.sort(rng.integers(2, 17, options))
        weight = float(rng.choice([1.0, 1.0, rng.uniform(0.1, 10.0)]))  # units alike are common in models
        made.append(
            tuple(
                Option(
                    (f"{b}",),
                    weight * float(2.0 ** (-0.7 * b)),
                    tuple(float(size * b if r == 0 else rng.integers(1, 40)) for r in range(rows)),
                )
                for b in bits
            )
        )
    budgets = []
    for r in range(rows):
        least = sum(min(o.costs[r] for o in unit) for unit in made)
        most = sum(max(o.costs[r] for o in unit) for unit in made)
        budgets.append(Budget(f"row {r}", float(round(least + tightness * (most - least))) + 7.0, 7.0))
    return Problem(tuple(made), tuple(budgets))


def brute_force(problem: Problem) -> float | None:
    """Least loss over all choices."""
    best = None
    for choice in itertools.product(*(range(len(unit)) for unit in problem.units)):
        costs = problem.costs(choice)
        if all(c <= b.limit for c, b in zip(costs, problem.budgets, strict=True)):
            loss = problem.loss(choice)
            best = loss if best is None else min(best, loss)
    return best


def greedy(problem: Problem) -> float | None:
    """From the cheapest options, always the upgrade that gains most a unit of the first cost and fits."""
    choice = [min(range(len(u)), key=lambda i, u=u: (u[i].costs[0], u[i].loss)) for u in problem.units]
    limits = [b.limit for b in problem.budgets]
    if any(c > m for c, m in zip(problem.costs(choice), limits, strict=True)):
        return None
    while True:
        moves = []
        for at, unit in enumerate(problem.units):
            for i, option in enumerate(unit):
                tried = [*choice[:at], i, *choice[at + 1 :]]
                gain = unit[choice[at]].loss - option.loss
                if gain > 0 and all(c <= m for c, m in zip(problem.costs(tried), limits, strict=True)):
                    extra = option.costs[0] - unit[choice[at]].costs[0]
                    moves.append((gain / max(extra, 1e-9), tried))
        if not moves:
            return problem.loss(choice)
        choice = max(moves, key=lambda move: move[0])[1]


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    units=st.integers(1, 5),
    options=st.integers(1, 5),
    rows=st.integers(1, 3),
    tightness=st.floats(-0.1, 1.1),
)
def test_least_loss_is_brute_force_s(
    seed: int, units: int, options: int, rows: int, tightness: float
) -> None:
    problem = random_problem(seed, units, options, rows, tightness)
    want, found = brute_force(problem), solve(problem)
    assert (found is None) == (want is None)
    if found is not None and want is not None:
        assert found.loss == pytest.approx(want, rel=1e-6)
        assert found.loss == problem.loss(found.choice)
        for cost, budget in zip(problem.costs(found.choice), problem.budgets, strict=True):
            assert cost <= budget.limit


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), row=st.integers(0, 1))
def test_least_cost_is_brute_force_s(seed: int, row: int) -> None:
    problem = random_problem(seed, 4, 4, 2, 0.4)
    free = replace(problem.budgets[row], limit=math.inf)
    problem = replace(problem, budgets=tuple(free if r == row else b for r, b in enumerate(problem.budgets)))
    kept = [
        problem.costs(choice)[row]
        for choice in itertools.product(range(4), repeat=4)
        if problem.costs(choice)[1 - row] <= problem.budgets[1 - row].limit
    ]
    found = solve(problem, objective=row)
    assert (found is None) == (not kept)
    if found is not None:
        assert problem.costs(found.choice)[row] == min(kept)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rows", [1, 3])
def test_never_worse_than_greedy_and_never_better_than_the_relaxation(seed: int, rows: int) -> None:
    problem = random_problem(seed, 60, 8, rows, 0.3)
    found = solve(problem)
    rival = greedy(problem)
    assert found is not None and found.gap < 1e-6
    if rival is not None:
        assert found.loss <= rival * (1 + 1e-6)


def test_a_model_of_ordinary_size_is_solved_to_the_end() -> None:
    """300 tensors, 15 formats, three budgets: the gap closes within the limit of nodes."""
    found = solve(random_problem(1, 300, 15, 3, 0.3))
    assert found is not None and found.gap < 1e-6


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_more_of_a_budget_never_gives_more_loss(seed: int) -> None:
    last = math.inf
    for tightness in (0.1, 0.2, 0.4, 0.8):
        found = solve(random_problem(seed, 12, 6, 2, tightness))
        if found is None:
            assert last == math.inf
            continue
        assert found.loss <= last * (1 + 1e-6)
        last = found.loss


def test_equal_losses_go_to_the_cheaper_option_and_equal_units_to_the_first() -> None:
    ties = (Option(("a",), 1.0, (5.0,)), Option(("b",), 1.0, (3.0,)), Option(("c",), 0.5, (9.0,)))
    problem = Problem((ties, ties, ties), (Budget("bytes", 16.0),))
    found = solve(problem)
    assert found is not None
    assert found.choice == (2, 1, 1)
    assert solve(problem) == found


def test_the_same_problem_has_the_same_answer_in_another_order_of_units() -> None:
    problem = random_problem(3, 40, 6, 2, 0.4)
    other = replace(problem, units=tuple(reversed(problem.units)))
    one, two = solve(problem), solve(other)
    assert one is not None and two is not None
    assert one.loss == pytest.approx(two.loss, rel=1e-6)
    assert solve(problem) == one


def test_useless_options_are_left_out() -> None:
    unit = (
        Option(("a",), 2.0, (1.0, 1.0)),
        Option(("b",), 1.0, (2.0, 3.0)),
        Option(("c",), 1.0, (2.0, 4.0)),  # b is as good and cheaper
        Option(("d",), 2.0, (1.0, 1.0)),  # a again
        Option(("e",), 1.5, (9.0, 0.5)),
    )
    assert undominated(unit) == [0, 1, 4]


@pytest.mark.parametrize("seed", range(5))
def test_prices_are_what_a_little_more_gains(seed: int) -> None:
    """Finite differences of the relaxation, and a bound on what the integer program gains."""
    problem = random_problem(seed, 200, 8, 2, 0.35)
    base = solve(problem)
    assert base is not None
    for row, price in enumerate(prices(problem)):
        step = 0.02 * problem.budgets[row].limit
        wider = replace(problem.budgets[row], limit=problem.budgets[row].limit + step)
        more = replace(
            problem, budgets=tuple(wider if r == row else b for r, b in enumerate(problem.budgets))
        )
        found = solve(more)
        assert found is not None
        gain = base.loss - found.loss
        # The relaxation is convex: its price bounds its gain from above, the price after the step from below;
        # with 200 units the integer program's gain lies within one option of that.
        slack = max(o.loss for unit in problem.units for o in unit) * 0.02
        assert prices(more)[row] * step - slack <= gain <= price * step + slack
        if price > 0:
            assert problem.costs(base.choice)[row] > 0.98 * problem.budgets[row].limit


def test_a_budget_that_does_not_bind_costs_nothing() -> None:
    problem = random_problem(2, 20, 5, 2, 0.4)
    loose = replace(problem.budgets[1], limit=1e9)
    assert prices(replace(problem, budgets=(problem.budgets[0], loose)))[1] == 0.0


def test_the_budget_that_cannot_be_kept_is_found() -> None:
    """Each alone can be kept; the second not beside the first."""
    unit = (Option(("small",), 1.0, (1.0, 9.0)), Option(("fast",), 0.5, (5.0, 2.0)))
    problem = Problem((unit, unit), (Budget("memory", 6.0), Budget("time", 5.0)))
    assert solve(problem) is None
    row, near = closest(problem)
    assert problem.budgets[row].name == "time"
    assert problem.costs(near.choice) == [6.0, 11.0]
    row, near = closest(replace(problem, budgets=(Budget("memory", 1.0), Budget("time", 5.0))))
    assert (row, problem.costs(near.choice)[0]) == (0, 2.0)


def test_nothing_of_the_solver_reaches_standard_output(capfd: pytest.CaptureFixture[str]) -> None:
    for seed in range(3):
        solve(random_problem(seed, 120, 10, 3, 0.3))
    assert capfd.readouterr().out == ""
