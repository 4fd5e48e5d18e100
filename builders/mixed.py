"""The planner's integer program: one option for each unit, least loss, every budget kept.

A multiple-choice knapsack with a row for each budget (Sinha & Zoltners 1979), solved to optimality by HiGHS
through scipy. Units that offer the same options are one integer unknown for each option, which counts how
many of them take it: layers of one shape are alike until their losses are measured, and without this a solver
would try every order of them. Nothing here knows a tensor or a format.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edge_runtime.engine.formats import Array
from edge_runtime.errors import BuildError, Unsupported

NODES = 20_000  # of branch and bound; a limit in nodes, not seconds, keeps a plan repeatable
GAP = 1e-7  # of the loss: what a plan may be above the least
_TIE = 1e-9  # weight of costs where losses are equal
_UNIT = 1e6  # the largest loss is scaled to this, far above the solver's tolerances of 1e-6
_ROUNDS = 8  # solutions that broke a budget by the solver's tolerance before it is an error


@dataclass(frozen=True, slots=True)
class Option:
    """One way to take a unit: its loss, and what it costs of each budget."""

    label: tuple[str, ...]
    loss: float
    costs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Budget:
    """A row: the chosen options' costs and `fixed` add up to at most `limit`."""

    name: str
    limit: float
    fixed: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Units are lists of options; every option has a cost for each budget."""

    units: tuple[tuple[Option, ...], ...]
    budgets: tuple[Budget, ...]

    def costs(self, choice: Sequence[int]) -> list[float]:
        """What a choice (an option for each unit) costs of each budget, `fixed` included."""
        taken = [unit[i] for unit, i in zip(self.units, choice, strict=True)]
        return [b.fixed + sum(o.costs[r] for o in taken) for r, b in enumerate(self.budgets)]

    def loss(self, choice: Sequence[int]) -> float:
        return sum(unit[i].loss for unit, i in zip(self.units, choice, strict=True))

    def least(self, row: int) -> float:
        """The least that any choice costs of one budget, the others left aside."""
        return self.budgets[row].fixed + sum(min(o.costs[row] for o in unit) for unit in self.units)


@dataclass(frozen=True, slots=True)
class Solution:
    """choice: index of the option of each unit. gap: how far the loss may be above the least, as a share."""

    choice: tuple[int, ...]
    loss: float
    gap: float


def solve(problem: Problem, objective: int | None = None) -> Solution | None:
    """The choice of least loss, or of least cost of budget `objective`, that keeps all budgets; None when
    none does.

    Equal losses go to the cheaper option, and among equal units the first take the better one. Raises
    BuildError when the search ends without an answer, Unsupported without scipy.
    """
    table = _Table.of(problem)
    limits = [b.limit - b.fixed for b in problem.budgets]
    for _ in range(_ROUNDS):
        counts, gap = _search(table, limits, objective)
        if counts is None:
            return None
        choice = table.spread(counts)
        over = _over(problem, choice)
        if not any(over):
            return Solution(choice, problem.loss(choice), gap)
        # The solver may pass a limit by its tolerance; ask again for a little more than that.
        limits = [limit - 2 * extra if extra else limit for limit, extra in zip(limits, over, strict=True)]
    raise BuildError(
        "the planner's solver keeps breaking a budget by its tolerance; change the budget a little"
    )


def closest(problem: Problem) -> tuple[int, Solution]:
    """Of a problem that no choice solves: the first budget that cannot be kept together with those before it,
    and the choice that costs least of it while it keeps them."""
    for row in range(len(problem.budgets)):
        kept = [b if r < row else replace(b, limit=math.inf) for r, b in enumerate(problem.budgets)]
        found = solve(replace(problem, budgets=tuple(kept)), objective=row)
        if found is None:
            break
        if problem.costs(found.choice)[row] > problem.budgets[row].limit:
            return row, found
    raise BuildError("the planner's solver contradicts itself; change a budget a little")


def prices(problem: Problem) -> list[float]:
    """How fast the least loss falls with each budget, per unit of its cost: duals of the linear relaxation.

    Zero where a budget does not bind. The relaxation's loss is convex in a budget, so a step larger than one
    option gains at most this much a unit. All zero when the relaxation has no solution.
    """
    optimize = _scipy()
    table = _Table.of(problem)
    scale = table.scale
    rows = np.array([b.limit - b.fixed for b in problem.budgets], float)
    weight = table.weights()
    kept = [r for r in range(len(rows)) if np.isfinite(rows[r])]
    matrix = (table.costs[:, kept] / weight[kept]).T if kept else None
    with _quiet():
        found = optimize.linprog(
            table.losses * scale,
            A_ub=matrix,
            b_ub=None if matrix is None else rows[kept] / weight[kept],
            A_eq=table.membership,
            b_eq=table.sizes,
            bounds=(0, None),
            method="highs",
        )
    out = [0.0] * len(rows)
    if found.status == 0 and kept:
        for at, r in enumerate(kept):
            out[r] = max(0.0, float(-found.ineqlin.marginals[at] / weight[r] / scale))
    return out


def undominated(unit: Sequence[Option]) -> list[int]:
    """Indices of options that no other equals or beats in loss and every cost; of equals the first."""
    costs = np.array([o.costs for o in unit], float).reshape(len(unit), -1)
    order = sorted(range(len(unit)), key=lambda i: (unit[i].loss, unit[i].costs, i))
    kept: list[int] = []
    for i in order:  # a later one never beats an earlier one
        if not bool((costs[kept] <= costs[i]).all(axis=1).any()):
            kept.append(i)
    return sorted(kept)


def _over(problem: Problem, choice: Sequence[int]) -> list[float]:
    """By how much each budget is broken."""
    costs = problem.costs(choice)
    return [max(0.0, cost - b.limit) for cost, b in zip(costs, problem.budgets, strict=True)]


@dataclass(frozen=True, slots=True)
class _Table:
    """The problem with equal units put together and useless options left out.

    members[g]: units of group g; options[g]: indices of the options kept. One column for each (g, option).
    """

    problem: Problem
    members: list[list[int]]
    options: list[list[int]]
    losses: Array  # (columns,)
    costs: Array  # (columns, budgets)
    membership: Array  # (groups, columns)
    sizes: Array  # (groups,)

    @classmethod
    def of(cls, problem: Problem) -> _Table:
        groups: dict[tuple[Option, ...], list[int]] = {}
        for i, unit in enumerate(problem.units):
            # Labels differ between equal units of different names: only numbers make them alike
            groups.setdefault(tuple(Option((), o.loss, o.costs) for o in unit), []).append(i)
        members = list(groups.values())
        options = [undominated(problem.units[m[0]]) for m in members]
        columns = [problem.units[m[0]][o] for m, kept in zip(members, options, strict=True) for o in kept]
        owner = [g for g, kept in enumerate(options) for _ in kept]
        membership = np.zeros((len(members), len(columns)))
        membership[owner, np.arange(len(columns))] = 1.0
        return cls(
            problem,
            members,
            options,
            np.array([o.loss for o in columns]),
            np.array([o.costs for o in columns], float).reshape(len(columns), len(problem.budgets)),
            membership,
            np.array([len(m) for m in members], float),
        )

    @property
    def scale(self) -> float:
        top = float(self.losses.max(initial=0.0))
        return _UNIT / top if top > 0.0 else 1.0

    def weights(self) -> Array:
        """What each row is divided by: a typical cost, so that the solver sees numbers near 1."""
        typical = np.abs(self.costs).max(axis=0, initial=0.0) / 1e3
        return np.where(typical > 0.0, typical, 1.0)

    def spread(self, counts: Array) -> tuple[int, ...]:
        """The option of each unit: in a group, the first units take the options of least loss."""
        choice = [0] * len(self.problem.units)
        column = 0
        for group, kept in zip(self.members, self.options, strict=True):
            unit = self.problem.units[group[0]]
            taken = [
                o for o, n in zip(kept, counts[column : column + len(kept)], strict=True) for _ in range(n)
            ]
            taken.sort(key=lambda o: (unit[o].loss, o))
            for i, o in zip(group, taken, strict=True):
                choice[i] = o
            column += len(kept)
        return tuple(choice)


def _search(table: _Table, limits: Sequence[float], objective: int | None) -> tuple[Array | None, float]:
    """Counts of each column, and the gap; None when no choice keeps the limits."""
    optimize = _scipy()
    weight = table.weights()
    if objective is None:
        goal = table.losses * table.scale
        spent = (table.costs / (table.costs.max(axis=0, initial=0.0) + 1e-300)).sum(axis=1)
        goal = goal + _TIE * _UNIT * spent
    else:
        goal = table.costs[:, objective] / weight[objective]
    rows = [optimize.LinearConstraint(table.membership, table.sizes, table.sizes)]
    kept = [r for r, limit in enumerate(limits) if np.isfinite(limit)]
    if kept:
        rows.append(
            optimize.LinearConstraint(
                (table.costs[:, kept] / weight[kept]).T, -np.inf, np.array(limits)[kept] / weight[kept]
            )
        )
    with _quiet():
        found = optimize.milp(
            goal,
            integrality=np.ones(goal.size),
            bounds=optimize.Bounds(0.0, table.membership.T @ table.sizes),
            constraints=rows,
            options={"mip_rel_gap": GAP, "node_limit": NODES},
        )
    if found.x is None:
        if found.status == 2:
            return None, 0.0
        raise BuildError(f"the planner's solver found no plan: {found.message}")
    return np.rint(found.x).astype(int), max(0.0, float(found.mip_gap or 0.0))


@contextmanager
def _quiet() -> Iterator[None]:
    """HiGHS 1.x prints lines of its own to standard output, where --json writes: they go nowhere."""
    sys.stdout.flush()
    try:
        kept = os.dup(1)
    except OSError:  # no standard output at all
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _scipy() -> Any:
    try:
        from scipy import optimize
    except ImportError:
        raise Unsupported("planning with budgets needs scipy: pip install 'edge-runtime[build]'") from None
    return optimize
