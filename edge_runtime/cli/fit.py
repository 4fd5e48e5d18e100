"""From measured seconds to the terms of engine/roofline.py: one linear system for all of them.

The model's seconds are a sum of terms, each a count (bytes of a format, values, stages) times the cost of
one. How much a program has of each is what the model's own answer changes with that cost; the costs are those
nonnegative ones that come nearest to everything measured, parts and whole decoders alike, in relative error.
So no cost is what another measurement has left unexplained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edge_runtime.cli.experiment import Seen
from edge_runtime.cli.least_squares import F64, nonnegative
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.profile import FormatSpeed, Measured, Profile, QueryTime
from edge_runtime.engine.roofline import timer

_OVERHEADS = ("request_us", "step_us", "small_step_us", "token_us", "logit_ns")  # a session's own
_WORK = ("stage_us", "unit_us", "value_ns", "odd_head_ns", "row_ns", "odd_kv_ns")
_QUERIES = ("query", "chunk_query")
_RATES = ("gbps", "cached_gbps", "gops")  # 1e9/s; their costs are ns
_ROWS = ("output_ns", "chunk_output_ns")
_CALL = "call"  # seconds of a step of the backend alone, beside the model's terms; a session's are its own
_NO_COST = 1e30  # as a rate
_PASSES = 3
_SAME = 1e-3  # of an equation, that a pass may be off by its terms
_NUDGE = 1e-3  # of a cost, to see what it costs
_LEAST = 0.2  # of what a rate's cost is where nothing else takes time: less is the fit's noise


@dataclass(frozen=True, slots=True)
class Setting:
    """What the model takes as it is: see Measured. formats: whose costs are fitted."""

    threads: int
    cache_bytes: int
    stream_bytes: int
    core_cache_bytes: int
    formats: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fit:
    """errors: of each equation, the model's seconds as a share of those measured, less 1."""

    measured: Measured
    errors: dict[str, float]


def fit(base: Profile, setting: Setting, seen: Sequence[Seen]) -> Fit:
    """The model with every cost fitted.

    A product goes by its bytes or by its operations, whichever take longer: so each pass counts terms at the
    costs of the pass before.
    """
    names = [*_names(setting.formats), _CALL]
    given = np.array([equation.seconds for equation in seen])
    weight = np.array([equation.weight for equation in seen]) / given
    costs = np.array([1.0 if name.partition(".")[2] in _RATES else 0.0 for name in names])
    for _ in range(_PASSES):
        table = np.array([_terms(base, setting, names, costs, equation) for equation in seen])
        fixed, counts = table[:, 0], table[:, 1:]
        least = _least(names, counts, given - fixed)
        left = given - fixed - counts @ least
        costs = least + nonnegative(counts * weight[:, None], left * weight)
        near = dict(zip(names, costs.tolist(), strict=True))
        told = np.array([_seconds(base, setting, near, equation) for equation in seen])
        if (np.abs(told - (fixed + counts @ costs)) <= _SAME * given).all():
            break
    errors = {s.name: float(t / g - 1.0) for s, t, g in zip(seen, told, given, strict=True)}
    if not counts[:, names.index("small_step_us")].any():  # no decoder was small here
        near["small_step_us"] = near["step_us"]
    return Fit(_measured(setting, near), errors)


def _names(formats: Sequence[str]) -> Iterator[str]:
    """Every cost of the model, as `_measured` takes them."""
    yield from _OVERHEADS
    yield from _WORK
    yield from (f"{q}.{part}" for q in _QUERIES for part in ("value_ns", "score_ns"))
    yield from (f"kv.{name}" for name in K_FORMATS)
    yield from (f"{name}.{part}" for name in formats for part in (*_RATES, *_ROWS))


def _measured(setting: Setting, costs: Mapping[str, float]) -> Measured:
    """Those costs as the model wants them; what is not named costs nothing."""
    query, chunk = (
        QueryTime(value_ns=costs.get(f"{q}.value_ns", 0.0), score_ns=costs.get(f"{q}.score_ns", 0.0))
        for q in _QUERIES
    )
    formats = {
        name: FormatSpeed(
            **{r: 1.0 / max(costs.get(f"{name}.{r}", 0.0), 1.0 / _NO_COST) for r in _RATES},
            **{r: costs.get(f"{name}.{r}", 0.0) for r in _ROWS},
        )
        for name in setting.formats
    }
    return Measured(
        **{name: costs.get(name, 0.0) for name in (*_OVERHEADS, *_WORK)},
        threads=setting.threads,
        query=query,
        chunk_query=chunk,
        kv_ns={name: costs.get(f"kv.{name}", 0.0) for name in K_FORMATS},
        cache_bytes=setting.cache_bytes,
        stream_bytes=setting.stream_bytes,
        core_cache_bytes=setting.core_cache_bytes,
        formats=formats,
    )


def _terms(base: Profile, setting: Setting, names: Sequence[str], costs: F64, equation: Seen) -> list[float]:
    """Seconds of the equation's steps that no cost changes, then those of each cost for one of its unit, near
    `costs`."""
    near = dict(zip(names, costs.tolist(), strict=True))
    formats = {chosen.format for chosen in equation.tensors.values()}

    def has(name: str) -> bool:
        if name == _CALL or name in _OVERHEADS:
            return equation.hosted == (name != _CALL)
        owner = name.partition(".")[0]
        return owner not in setting.formats or owner in formats

    now, terms = _seconds(base, setting, near, equation), []
    for name in names:
        if not has(name):
            terms.append(0.0)
            continue
        more = max(_NUDGE * near[name], _NUDGE**2)
        terms.append((_seconds(base, setting, near | {name: near[name] + more}, equation) - now) / more)
    return [now - sum(near[name] * term for name, term in zip(names, terms, strict=True)), *terms]


def _seconds(base: Profile, setting: Setting, costs: Mapping[str, float], equation: Seen) -> float:
    """What the equation's steps take at these costs; without a session none of its own."""
    if not equation.hosted:
        costs = {name: cost for name, cost in costs.items() if name not in _OVERHEADS}
    measured = _measured(setting, costs)
    profile = base.calibrated(measured)
    work = timer(equation.program, equation.tensors, equation.kv, profile, profile.mode())
    beside = 1e-6 * measured.request_us if equation.begun else 0.0
    return work(equation.steps) + beside + (0.0 if equation.hosted else costs[_CALL])


def _least(names: Sequence[str], counts: F64, given: F64) -> F64:
    """A rate is no more than so many times what the quickest of its experiments would make of it alone."""
    least = np.zeros(len(names))
    for i, name in enumerate(names):
        has = counts[:, i] > 0
        if name.partition(".")[2] in _RATES and has.any():
            least[i] = _LEAST * float(np.min(given[has] / counts[has, i]))
    return least
