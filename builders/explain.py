"""Why a plan is what it is: what each tensor got, what a step up or down would do, what a byte is worth.

Prices are duals of the program's linear relaxation (`mixed.prices`); beside each stands what a budget 1%
larger really gives, which is the integer program solved again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from builders.allocation import (
    BITS,
    CACHE,
    DECODE,
    FIRST,
    MEMORY,
    Allocation,
    Inputs,
    state,
    stored,
)
from builders.companions import ALONE, Companions
from builders.mixed import Problem, prices, solve
from builders.planner import Plans, Request, inputs_of
from builders.sensitivity import Sensitivity
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.packing import packed_nbytes
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import cached_share, linear_runs, weights_read

MORE = 0.01  # of a budget, for which the program is solved again
# Budget -> (unit of its use, small amount that a price is quoted for, that amount in words)
UNITS = {
    MEMORY: ("bytes", 1.0, "byte"),
    BITS: ("bytes", 1.0, "byte of weights"),
    CACHE: ("bytes", 1.0, "byte of the last cache"),
    DECODE: ("seconds", 1e-6, "microsecond of a decode step"),
    FIRST: ("seconds", 1e-6, "microsecond to the first token"),
}
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)")


@dataclass(frozen=True, slots=True)
class Move:
    """Another format for a tensor: how its bytes and the loss would change, and the quotient's magnitude."""

    format: str
    bytes: int
    loss: float
    loss_per_byte: float


@dataclass(frozen=True, slots=True)
class Reason:
    """One tensor. better: the next format up that gains most a byte; worse: the next down that loses least a
    byte; None at the ends. layer is None outside layers; kind is the name inside it."""

    name: str
    layer: int | None
    kind: str
    format: str
    weights: int
    bytes: int
    bits: float
    loss: float
    better: Move | None
    worse: Move | None


@dataclass(frozen=True, slots=True)
class Use:
    """A budget: used of limit in `unit`; price: fall of the loss for one `per` more, 0 where it does not
    bind; one_percent: fall of the loss with a limit 1% larger, None where no plan keeps the budgets."""

    name: str
    unit: str
    used: float
    limit: float
    per: str
    price: float
    one_percent: float | None


@dataclass(frozen=True, slots=True)
class Explanation:
    """loss: predicted for the weights and, where it was chosen, the cache, in `unit`. tried: plans that were
    tried out whole before the losses were settled, each with its KL in nats."""

    unit: str
    loss: float
    kv: str
    kv_loss: float
    budgets: tuple[Use, ...]
    tensors: tuple[Reason, ...]
    tried: tuple[tuple[str, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def explain(
    program: Program,
    profile: Profile,
    request: Request,
    plans: Plans,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> Explanation:
    """Of the plans that `choose` gave for the request that it resolved."""
    given = inputs_of(program, profile, request, beside, sensitivity)
    plan = plans[LANGUAGE]
    timed = given.limits.timed and cached_share(profile, weights_read(program, plan.tensors)) == 1.0
    runs = [{plan.tensors[n].format for n in run} for run in linear_runs(program)]
    made = state(given, cached=timed, tied=all(len(formats) == 1 for formats in runs))
    formats = {name: plan.tensors[name].format for name in given.choices}
    choice = _choice(made, formats, (plan.kv.k, plan.kv.v))
    pair_loss = given.losses.kv(plan.kv.k, plan.kv.v) if len(given.pairs) > 1 else 0.0
    return Explanation(
        unit=given.losses.unit,
        loss=made.problem.loss(choice),
        kv=f"{plan.kv.k},{plan.kv.v}",
        kv_loss=pair_loss,
        budgets=tuple(_uses(made.problem, choice)),
        tensors=tuple(_reason(given, name, fmt) for name, fmt in formats.items()),
        tried=() if sensitivity is None else tuple((t.plan, t.kl) for t in sensitivity.tried),
    )


def _choice(made: Allocation, formats: Mapping[str, str], pair: tuple[str, str]) -> list[int]:
    """The option of each unit that a plan took."""
    taken = []
    for names, unit in zip(made.names, made.problem.units, strict=True):
        label = tuple(formats[n] for n in names) if names else pair
        taken.append(next(i for i, o in enumerate(unit) if o.label == label))
    return taken


def _uses(problem: Problem, choice: Sequence[int]) -> list[Use]:
    now = problem.loss(choice)
    found = []
    costs, worth = problem.costs(choice), prices(problem)
    for row, budget in enumerate(problem.budgets):
        used, price = costs[row], worth[row]
        unit, amount, per = UNITS[budget.name]
        wider = replace(budget, limit=budget.limit * (1 + MORE))
        more = (*problem.budgets[:row], wider, *problem.budgets[row + 1 :])
        better = solve(replace(problem, budgets=more)) if used <= budget.limit else None
        gain = None if better is None else max(0.0, now - better.loss)
        found.append(Use(budget.name, unit, used, budget.limit, per, price * amount, gain))
    return found


def _reason(given: Inputs, name: str, fmt: str) -> Reason:
    spec = given.program.tensors[name]

    def nbytes(f: str) -> int:
        return packed_nbytes(f, stored(given.profile, spec, f).packing, spec.rows, spec.cols)

    loss = given.losses.of(name, fmt) if given.losses.knows(name) else None
    now = nbytes(fmt)
    ups: list[Move] = []
    downs: list[Move] = []
    for other in given.choices[name] if loss is not None else ():
        at = given.losses.of(name, other)
        if at is None or loss is None:
            continue
        extra, gain = nbytes(other) - now, loss - at
        move = Move(other, extra, -gain, abs(gain) / max(1, abs(extra)))
        if extra > 0 and gain > 0:
            ups.append(move)
        elif extra < 0 and gain < 0:
            downs.append(move)
    found = _LAYER.search(name)
    return Reason(
        name=name,
        layer=int(found[1]) if found else None,
        kind=found[2] if found else name,
        format=fmt,
        weights=spec.size,
        bytes=now,
        bits=get_format(fmt).bits_per_weight(spec.rows, spec.cols),
        loss=loss or 0.0,
        better=max(ups, key=lambda m: m.loss_per_byte, default=None),
        worse=min(downs, key=lambda m: m.loss_per_byte, default=None),
    )
