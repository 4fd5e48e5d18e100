"""The planner's last pass: plans near the one of least predicted loss are tried out whole; the best is taken.

A plan's predicted loss is a sum of figures of tensors one at a time. Errors meet in the whole model, with
feedback every tensor is rounded anew, and what looked best of a thousand figures was partly luck. So losses
are changed (`shrinkage.py`), the planner is asked for the best plan by them, the plan is tried out
(`trials.py`), and the losses whose plan has the least KL are kept: budgets, explanation and the sensitivity
file then follow as from any losses. The uniform plans of least predicted loss that keep the budgets are tried
out too, so the result is no worse than they are, in KL on the calibration text. Work is bounded by counts,
never by a clock.

What does not help: losses measured around the plan, all other tensors rounded. With feedback they are as
noisy as the differences that they should find (stories260K, 4 bits: of falls of KL predicted at 4 to 22%, at
most 3% came true; shrinking gives 9%).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import msgspec

from builders.companions import ALONE, Companions
from builders.fitting import unmet
from builders.journal import Journal
from builders.losses import measured_losses
from builders.planner import Plans, Request, choose, fits
from builders.sensitivity import Sensitivity, Tried
from builders.shrinkage import only, shaken, shrunk, uniform_formats
from builders.watcher import Watcher
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import ValueOutOfRange

LEAST = 4  # plans that are tried out; fewer tell nothing
UNIFORM = 2  # of them: the uniform plans of least predicted loss that keep the budgets
SHARES = (0.0, 0.5, 0.75, 0.25, 1.0)  # by which losses are shrunk, the likely ones first
SHAKE = 0.1  # of the logarithms of losses, for plans near the best so far


@dataclass(frozen=True, slots=True)
class Question:
    """What a plan is asked for: as `planner.choose`, of a request that was resolved."""

    program: Program
    profile: Profile
    request: Request
    beside: Companions = ALONE

    def plans(self, losses: Sensitivity) -> Plans | None:
        """The best by these losses; None where it breaks a budget."""
        plans, resolved = choose(self.program, self.profile, self.request, self.beside, losses)
        return plans if fits(plans) and not unmet(self.program, resolved, plans) else None


def refine(
    question: Question,
    found: Sensitivity,
    measure: Callable[[Plan], float],
    most: int,
    *,
    notes: Journal | None = None,
    watcher: Watcher | None = None,
) -> Sensitivity:
    """The losses whose plan has the least KL of at most `most` plans, with all that were tried in `tried`.

    measure: KL of the language part's plan, whole, in nats; ValueOutOfRange where it cannot be built. notes:
    where figures are kept and looked up. Gives `found` back where fewer than LEAST plans may be tried or no
    plan keeps the budgets.
    """
    if most < LEAST or question.plans(found) is None:
        return found
    search = _Search(question, measure, notes or Journal(None, None), watcher or Watcher(), found)
    search.watcher.phase("refine", most)
    for label, losses in _first(found, question):
        if len(search.seen) < most:
            search.take(label, losses)
    # Near plans, from the best one on. Losses that gave a plan of before cost no trial, but not for ever
    for seed in range(4 * most):
        if len(search.seen) < most:
            search.take(f"shaken {seed}", shaken(search.best, SHAKE, seed))
    return msgspec.structs.replace(search.best, tried=tuple(search.tried))


def _first(found: Sensitivity, question: Question) -> Iterator[tuple[str, Sensitivity]]:
    """The losses as they are, one format for all tensors, and the losses shrunk."""
    yield "measured", found
    uniform = 0
    for fmt in uniform_formats(found):
        if uniform < UNIFORM and question.plans(only(found, fmt)) is not None:
            uniform += 1
            yield f"{fmt} everywhere", only(found, fmt)
    for share in SHARES[1:]:
        yield f"shrunk by {share:g}", shrunk(found, question.program, share)


@dataclass(slots=True)
class _Search:
    question: Question
    measure: Callable[[Plan], float]
    notes: Journal
    watcher: Watcher
    best: Sensitivity  # of the least KL so far
    least: float = math.inf
    tried: list[Tried] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)  # plans

    def take(self, label: str, losses: Sensitivity) -> None:
        """Try the plan of these losses, unless it was tried before or breaks a budget."""
        plans = self.question.plans(losses)
        if plans is None:
            return
        plan = plans[LANGUAGE]
        key = _digest(plan)
        if key in self.seen:
            return
        self.seen.add(key)
        kl = self._measured(plan, key)
        request = self.question.request
        if len(request.kv_choices) > 1:  # a cheaper cache leaves bytes to the weights, and costs
            kl += measured_losses(self.question.program, losses).kv(plan.kv.k, plan.kv.v)
        if kl < math.inf:
            self.tried.append(Tried(plan=label, kl=kl))
        if kl < self.least:
            self.least, self.best = kl, losses
        self.watcher.step(f"{label}: KL {kl:.4g}")

    def _measured(self, plan: Plan, key: str) -> float:
        known = self.notes.get("trial", key)
        if known is not None:
            return known
        try:
            kl = self.measure(plan)
        except ValueOutOfRange:  # some tensor cannot be held after those before it were rounded
            kl = math.inf
        return self.notes.put(kl, "trial", key)


def _digest(plan: Plan) -> str:
    formats = {name: chosen.format for name, chosen in plan.tensors.items()}
    return hashlib.sha256(json.dumps([formats, plan.kv.k, plan.kv.v], sort_keys=True).encode()).hexdigest()
