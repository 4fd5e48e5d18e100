"""The planner's choice as an integer program: what each tensor may be stored as, and what that costs.

Rows: bytes of memory, bits per weight, seconds of a decode step, seconds to the first token, and bytes of the
last cache where a measured profile knows two speeds of reading. Bytes are `packed_nbytes` of each tensor;
everything else that a plan needs is what `engine/memory.py` says of a plan with the cache in question, less
its weights. Seconds are engine/roofline.py's, which is a sum over ops.

On the cpu backend linears that read one input (q, k, v; gate, up) share stages of the thread pool where their
formats agree. A cost of pairs of choices would make a program of products; a stage is short, so the program
is solved twice instead and the better answer kept: with every tensor free, paying as if all runs were broken,
and with one format for each run, paying for no break. A plan is then never slower than the budget says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from builders.losses import Losses
from builders.mixed import Budget, Option, Problem, Solution, closest, solve
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.packing import backend_packing, packed_nbytes
from edge_runtime.engine.plan import Plan, TensorPlan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program, TensorSpec
from edge_runtime.engine.roofline import (
    Roofline,
    Step,
    decode_steps,
    linear_runs,
    prompt_steps,
    prompt_tokens,
    weight_names,
)

MEMORY, BITS, DECODE, FIRST, CACHE = "memory", "bits", "decode", "first-token", "cache"
SLACK = 1e-9  # of a budget: a plan's own sum of seconds may differ from the program's in the last bits
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
    return TensorPlan(fmt, "rows" if spec.role == "vector" else backend_packing(profile.backend, fmt))


def state(given: Inputs, *, cached: bool = False, tied: bool = False) -> Allocation:
    """The integer program. `cached`: all products' weights must stay in the last cache, and are read at its
    speed; `tied`: linears that read one input have the same format."""
    program, profile, choices, limits = given.program, given.profile, given.choices, given.limits
    base = {name: formats[0] for name, formats in choices.items()}
    plans = {pair: given.plan_of(base, pair)[LANGUAGE] for pair in given.pairs}
    shape = next(iter(plans.values())).step
    roofline = Roofline(program, profile, profile.mode(given.power_mode), cached=float(cached))
    steps = {DECODE: decode_steps(shape), FIRST: prompt_steps(shape, prompt_tokens(shape))}
    measured = profile.efficiency.measured
    request_s = 0.0 if measured is None else measured.request_us * 1e-6
    size = sum(program.tensors[name].size for name in choices)
    budgets = [Budget(CACHE, float(measured.cache_bytes))] if cached and measured is not None else []
    budgets.append(Budget(MEMORY, float(limits.memory)))
    if limits.bits is not None:
        budgets.append(Budget(BITS, limits.bits * size / 8.0 * (1.0 + SLACK)))
    if limits.decode is not None:
        budgets.append(Budget(DECODE, limits.decode * (1.0 + SLACK)))
    if limits.first is not None:
        budgets.append(Budget(FIRST, limits.first * (1.0 + SLACK), request_s))
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
        known = given.losses.knows(name)  # else it has no choice, and its loss is none of the program's
        loss = given.losses.of(name, fmt) if known else None
        return Option((fmt,), loss or 0.0, tuple(cost(row, name, fmt) for row in rows))

    singles = {name: tuple(option(name, f) for f in formats) for name, formats in choices.items()}
    runs = [tuple(n for n in run if n in choices) for run in linear_runs(program)]
    names = _units(choices, runs if tied else [])

    def broken(run: tuple[str, ...]) -> tuple[float, ...]:
        """Of a run in one format: none, but for formats that leave out columns of each tensor's own."""
        return tuple(roofline.breaks(run, steps[row]) if row in (DECODE, FIRST) else 0.0 for row in rows)

    units = [_together([singles[n] for n in of], broken) for of in names]
    shares = {r: 0.0 if tied else _breaks(roofline, runs, steps[r]) for r in (DECODE, FIRST)}
    apart = ("f16", "int8_row") * len(program.heads)  # blocks of the logits, no two neighbours alike
    for r in shares:
        shares[r] += roofline.head_breaks(apart[: len(program.heads)], steps[r])
    names.append(())
    caches = []
    for pair, plan in plans.items():
        rest = (_cache_cost(row, plan, base, program, roofline, steps) + shares.get(row, 0.0) for row in rows)
        loss = given.losses.kv(*pair) if len(plans) > 1 else 0.0
        caches.append(Option(pair, loss, tuple(rest)))
    units.append(tuple(caches))
    return Allocation(Problem(tuple(units), tuple(budgets)), tuple(names))


def allocate(given: Inputs) -> tuple[Allocation, Solution, str | None]:
    """The best plan of all: weights streamed from memory, or, where a measured profile and a speed budget
    make it matter, small enough to stay in the last cache. Weights of which a part stays there count as
    streamed: the plan is then faster than it was asked to be.

    When no plan keeps the budgets, the one that comes closest (see `mixed.closest`), with the name of the
    budget that it breaks.
    """
    timed = given.limits.timed and given.profile.efficiency.measured is not None
    ways = [(c, t) for t in (False, True) for c in (False, True)] if timed else [(False, False)]
    stated = [state(given, cached=cached, tied=tied) for cached, tied in ways]
    stated = [a for a in stated if all(a.problem.units)]  # a run of given formats may have none in common
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


def _units(choices: Choices, runs: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Tensors whose formats are chosen as one: these runs, and every other tensor alone; in their order."""
    of = {name: run for run in runs for name in run}
    return list(dict.fromkeys(of.get(name, (name,)) for name in choices))


def _together(
    tensors: Sequence[Sequence[Option]], broken: Callable[[tuple[str, ...]], tuple[float, ...]]
) -> tuple[Option, ...]:
    """Options of tensors that have the same format: those that all of them may have."""
    if len(tensors) == 1:
        return tuple(tensors[0])
    by_format = [{o.label[0]: o for o in options} for options in tensors]
    common = [fmt for fmt in by_format[0] if all(fmt in more for more in by_format)]
    found = []
    for fmt in common:
        same = [options[fmt] for options in by_format]
        label = (fmt,) * len(same)
        costs = tuple(map(sum, zip(broken(label), *(o.costs for o in same), strict=True)))
        found.append(Option(label, sum(o.loss for o in same), costs))
    return tuple(found)


def _breaks(roofline: Roofline, runs: Sequence[tuple[str, ...]], steps: Sequence[Step]) -> float:
    """Seconds lost when no two neighbours of any run agree."""
    return roofline.breaks(("f16", "int8_row"), steps) * sum(len(run) - 1 for run in runs)


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
