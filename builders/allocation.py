"""The planner's choice as an integer program: what each tensor may be stored as, and what that costs.

Rows: bytes of memory, bits per weight, seconds of a decode step, seconds to the first token, and bytes of the
last cache where a measured profile knows two speeds of reading. Bytes are `packed_nbytes` of each tensor;
everything else that a plan needs is what `engine/memory.py` says of a plan with the cache in question, less
its weights. Seconds are engine/roofline.py's, which is a sum over ops.

Where breaking a run of linears (q, k, v; gate, up) costs a stage of the cpu backend, the run is one unit
whose options are combinations of formats, so that the break is priced and not forbidden: values often want
more bits than queries. Elsewhere each tensor is a unit of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from builders.losses import Losses
from builders.mixed import Budget, Option, Problem, Solution, closest, solve, undominated
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.packing import cpu_packing, packed_nbytes
from edge_runtime.engine.plan import Plan, TensorPlan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.engine.roofline import (
    Roofline,
    Step,
    decode_steps,
    family,
    linear_runs,
    prompt_steps,
    prompt_tokens,
    weight_names,
)

MEMORY, BITS, DECODE, FIRST, CACHE = "memory", "bits", "decode", "first-token", "cache"
_SLACK = 1e-9  # seconds are sums of floats; a plan's own sum may differ from the program's in the last bits
Pair = tuple[str, str]
PlanOf = Callable[[Mapping[str, str], Pair], Mapping[str, Plan]]
Choices = Mapping[str, Sequence[str]]  # tensor -> formats that it may have


@dataclass(frozen=True, slots=True)
class Limits:
    """Budgets of one plan; None: no such budget. memory: bytes. bits: a weight, of all that are not vectors.
    decode, first: seconds."""

    memory: int
    bits: float | None = None
    decode: float | None = None
    first: float | None = None

    @property
    def timed(self) -> bool:
        return self.decode is not None or self.first is not None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the integer program is made of. `choices` has every tensor that is no vector; pairs: K,V caches;
    `plan_of(formats, pair)` is the whole plan of a choice."""

    program: Program
    profile: Profile
    power_mode: str | None
    choices: Choices
    pairs: Sequence[Pair]
    limits: Limits
    losses: Losses
    plan_of: PlanOf


@dataclass(frozen=True, slots=True)
class Allocation:
    """A problem over a program's tensors. names[i]: the tensors of unit i; () for that of the KV cache."""

    problem: Problem
    names: tuple[tuple[str, ...], ...]

    def formats(self, solution: Solution) -> tuple[dict[str, str], Pair]:
        """Tensor -> format, and the K,V pair."""
        chosen: dict[str, str] = {}
        pair: Pair = ("", "")
        for names, unit, i in zip(self.names, self.problem.units, solution.choice, strict=True):
            if names:
                chosen.update(zip(names, unit[i].label, strict=True))
            else:
                pair = (unit[i].label[0], unit[i].label[1])
        return chosen, pair

    def row(self, name: str) -> int | None:
        """Index of the budget of that name, if there is one."""
        return next((i for i, b in enumerate(self.problem.budgets) if b.name == name), None)


def stored(profile: Profile, spec: TensorSpec, fmt: str) -> TensorPlan:
    """How a tensor in a format lies in an engine for a profile."""
    rows = profile.backend != "cpu" or spec.role == "vector"
    return TensorPlan(fmt, "rows" if rows else cpu_packing(fmt))


def state(given: Inputs, *, cached: bool = False) -> Allocation:
    """The integer program. `cached`: all products' weights must stay in the last cache, and are read at its
    speed."""
    program, profile, choices, limits = given.program, given.profile, given.choices, given.limits
    base = {name: formats[0] for name, formats in choices.items()}
    plans = {pair: given.plan_of(base, pair)[LANGUAGE] for pair in given.pairs}
    shape = next(iter(plans.values())).step
    roofline = Roofline(program, profile, profile.mode(given.power_mode), cached=cached)
    steps = {DECODE: decode_steps(shape), FIRST: prompt_steps(shape, prompt_tokens(shape))}
    measured = profile.efficiency.measured
    request_s = 0.0 if measured is None else measured.request_us * 1e-6
    size = sum(program.tensors[name].size for name in choices)
    budgets = [Budget(CACHE, float(measured.cache_bytes))] if cached and measured is not None else []
    budgets.append(Budget(MEMORY, float(limits.memory)))
    if limits.bits is not None:
        budgets.append(Budget(BITS, limits.bits * size / 8.0))
    if limits.decode is not None:
        budgets.append(Budget(DECODE, limits.decode * (1.0 - _SLACK)))
    if limits.first is not None:
        budgets.append(Budget(FIRST, limits.first * (1.0 - _SLACK), request_s))
    rows = [b.name for b in budgets]
    read = set(weight_names(program))

    def cost(row: str, name: str, fmt: str) -> float:
        spec = program.tensors[name]
        if row == BITS:
            return float(get_format(fmt).nbytes(spec.rows, spec.cols))
        chosen = stored(profile, spec, fmt)
        if row in (DECODE, FIRST):
            return roofline.tensor(name, chosen, steps[row])
        if row == CACHE and name not in read:
            return 0.0
        return float(packed_nbytes(fmt, chosen.packing, spec.rows, spec.cols))

    def option(name: str, fmt: str) -> Option:
        loss = (
            given.losses.of(name, fmt) if given.losses.knows(name) else 0.0
        )  # one that is not known has no choice
        return Option((fmt,), loss or 0.0, tuple(cost(row, name, fmt) for row in rows))

    breaks = limits.timed and roofline.breaks(("f16", "int8_row"), steps[DECODE]) > 0.0
    singles = {name: tuple(option(name, f) for f in formats) for name, formats in choices.items()}

    def broken(before: str, after: str) -> tuple[float, ...]:
        pair = (before, after)
        return tuple(roofline.breaks(pair, steps[r]) if r in (DECODE, FIRST) else 0.0 for r in rows)

    names: list[tuple[str, ...]] = []
    units: list[tuple[Option, ...]] = []
    for run in _units(program, choices, together=breaks):
        names.append(run)
        units.append(_combined([singles[n] for n in run], broken))
    names.append(())
    units.append(
        tuple(
            Option(
                pair,
                given.losses.kv(*pair) if len(given.pairs) > 1 else 0.0,
                tuple(_cache_cost(row, plan, base, program, roofline, steps) for row in rows),
            )
            for pair, plan in plans.items()
        )
    )
    return Allocation(Problem(tuple(units), tuple(budgets)), tuple(names))


def allocate(given: Inputs) -> tuple[Allocation, Solution, str | None]:
    """The best plan of all: weights streamed from memory, or, where a measured profile and a speed budget
    make it matter, small enough to stay in the last cache.

    When no plan keeps the budgets, the one that comes closest (see `mixed.closest`), with the name of the
    budget that it breaks.
    """
    ways = [False, True] if given.limits.timed and given.profile.efficiency.measured is not None else [False]
    stated = [state(given, cached=cached) for cached in ways]
    solved = [(a, found) for a in stated if (found := solve(a.problem)) is not None]
    if solved:
        return (*min(solved, key=lambda each: each[1].loss), None)
    tries = []
    for order, a in enumerate(stated):
        row, near = closest(a.problem)
        name = a.problem.budgets[row].name
        if name != CACHE:  # too large for the cache says nothing of a budget of the user's
            tries.append(
                (len(a.problem.budgets) - row, a.problem.costs(near.choice)[row], order, a, near, name)
            )
    _, _, _, made, near, name = min(tries, key=lambda each: each[:3])
    return made, near, name


def _units(program: Program, choices: Choices, *, together: bool) -> list[tuple[str, ...]]:
    """Tensors whose formats are chosen as one: runs of linears, or each alone; in the program's order."""
    runs = [tuple(n for n in run if n in choices) for run in linear_runs(program)] if together else []
    of = {name: run for run in runs for name in run}
    units = [of.get(name, (name,)) for name in choices]
    return list(dict.fromkeys(units))


def _combined(
    tensors: Sequence[Sequence[Option]], broken: Callable[[str, str], tuple[float, ...]]
) -> tuple[Option, ...]:
    """Options of a run from its tensors' options; what another one beats in everything is left out early,
    among those that end in the same family, for the next break depends on that alone."""
    made = list(tensors[0])
    for more in tensors[1:]:
        grown: dict[tuple[str, int | None], list[Option]] = {}
        for left in made:
            for right in more:
                extra = broken(left.label[-1], right.label[0])
                costs = tuple(map(sum, zip(left.costs, right.costs, extra, strict=True)))
                option = Option(left.label + right.label, left.loss + right.loss, costs)
                grown.setdefault(family(right.label[0]), []).append(option)
        made = [options[i] for options in grown.values() for i in undominated(options)]
    return tuple(made)


def _cache_cost(
    row: str,
    plan: Plan,
    base: Mapping[str, str],
    program: Program,
    roofline: Roofline,
    steps: Mapping[str, Sequence[Step]],
) -> float:
    """What a plan costs apart from the tensors that are chosen: KV cache, buffers, companions, the system."""
    if row == MEMORY:
        chosen = ((program.tensors[name], plan.tensors[name]) for name in base)
        return float(
            plan.memory.need - sum(packed_nbytes(t.format, t.packing, s.rows, s.cols) for s, t in chosen)
        )
    return roofline.rest(plan.kv, steps[row]) if row in (DECODE, FIRST) else 0.0
