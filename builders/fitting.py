"""What would make a plan fit that does not: the smallest changes of a request, each measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from builders.companions import ALONE, Companions
from builders.planner import Plans, Request, choose, fits, make_plans, usable
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import kv_pair, row_nbytes
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import DoesNotFit

KV_ORDER = ("f16", "int8", "int4c", "int4")  # best quality first, see bench/kv_quality.py
SHORTEST_CONTEXT = 128
Options = dict[str, str | int]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the request that makes the plan fit: option -> value, and what it then needs in bytes."""

    options: Options
    need: int


def require_fit(
    program: Program, profile: Profile, request: Request, beside: Companions = ALONE
) -> tuple[Plans, Request]:
    """As `choose`. Raises DoesNotFit, naming the smallest changes, when the device is too small."""
    plans, resolved = choose(program, profile, request, beside)
    if not fits(plans):
        raise does_not_fit(plans, profile, changes_that_fit(program, profile, resolved, beside))
    return plans, resolved


def does_not_fit(plans: Plans, profile: Profile, changes: Sequence[Change]) -> DoesNotFit:
    memory = plans[LANGUAGE].memory
    return DoesNotFit(
        f"{_mib(memory.need)} are needed, {profile.name} gives {_mib(memory.have)} "
        f"({profile.memory_source}); {advice(changes)}",
        need=memory.need,
        have=memory.have,
        source=profile.memory_source,
    )


def advice(changes: Sequence[Change]) -> str:
    """The changes as one clause: ``to fit, use --weights int4_g64, or --context 2048``."""
    if not changes:
        return "no format, context or KV format makes it fit; take a larger device or a smaller model"
    ways = (" ".join(f"--{k} {v}" for k, v in change.options.items()) for change in changes)
    return "to fit, use " + ", or ".join(ways)


def changes_that_fit(
    program: Program, profile: Profile, request: Request, beside: Companions = ALONE
) -> list[Change]:
    """The smallest single changes of a resolved request that make it fit; when no single one does, the
    smallest set of changes; [] when nothing does. Every one is checked by the memory function."""
    search = _Search(program, profile, request, beside)
    weights, kv = _lower_weights(profile, request), _lower_kv(request)
    found = (search.first(weights), search.first(kv), search.longest_context({}))
    if singles := [change for change in found if change is not None]:
        return singles
    # Format first, then KV, then context: in the order of what each costs the user in answers.
    both = search.first([{**w, **k} for w in weights for k in kv])
    if both is not None:
        return [both]
    for options in [{**w, **k} for w in [{}, *weights] for k in [{}, *kv]]:
        if hit := search.longest_context(options):
            return [hit]
    return []


@dataclass(frozen=True, slots=True)
class _Search:
    """Tries changes of one request."""

    program: Program
    profile: Profile
    request: Request
    beside: Companions

    def attempt(self, options: Options) -> Change | None:
        plans = make_plans(self.program, self.profile, _with(self.request, options), self.beside)
        return Change(options, plans[LANGUAGE].memory.need) if fits(plans) else None

    def first(self, ways: Sequence[Options]) -> Change | None:
        return next((hit for way in ways if (hit := self.attempt(way))), None)

    def longest_context(self, options: Options) -> Change | None:
        """The longest shorter context, in whole pages, with which the rest fits (need grows with it)."""
        page = self.request.page_tokens
        low, high = SHORTEST_CONTEXT // page, ((self.request.context or 0) - 1) // page
        best: Change | None = None
        while low <= high:
            middle = (low + high) // 2
            hit = self.attempt({**options, "context": middle * page})
            if hit is None:
                high = middle - 1
            else:
                best, low = hit, middle + 1
        return best


def _lower_weights(profile: Profile, request: Request) -> list[Options]:
    """Smaller formats, best first; at the end the smallest one for embedding and head too."""

    def bits(name: str) -> float:
        return get_format(name).bits_per_weight(4096, 4096)

    names = usable(profile)
    ways: list[Options] = [{"weights": name} for name in names if bits(name) < bits(request.weights)]
    if names and (request.head_weights is None or bits(names[-1]) < bits(request.head_weights)):
        ways.append({"weights": names[-1], "head-weights": names[-1]})
    return ways


def _lower_kv(request: Request) -> list[Options]:
    def nbytes(k: str, v: str) -> float:
        return row_nbytes(k, 128, request.page_tokens) + row_nbytes(v, 128, request.page_tokens)

    now = nbytes(request.kv_k, request.kv_v)
    return [{"kv": names} for names in KV_ORDER if nbytes(*kv_pair(names)) < now]


def _with(request: Request, options: Options) -> Request:
    changed = request
    for option, value in options.items():
        if option == "kv":
            k, v = kv_pair(str(value))
            changed = replace(changed, kv_k=k, kv_v=v)
        elif option == "context":
            changed = replace(changed, context=int(value), kv_tokens=None)
        elif option == "head-weights":
            changed = replace(changed, head_weights=str(value))
        else:
            changed = replace(changed, weights=str(value))
    return changed


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
