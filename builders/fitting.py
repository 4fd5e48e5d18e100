"""What would make a plan keep its budgets that does not: the smallest changes of a request, each measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from builders.allocation import SLACK
from builders.budgets import parse_bytes
from builders.companions import ALONE, Companions
from builders.device_formats import running_pairs
from builders.planner import AUTO, KEEP, Plans, Request, candidates, choose, fits, usable
from builders.sensitivity import Sensitivity
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import kv_pair, row_nbytes
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import BudgetNotMet, DoesNotFit, EdgeError

KV_ORDER = ("f16", "int8", "int4c", "int4")  # best quality first, see bench/kv_quality.py
SHORTEST_CONTEXT = 128
_EXACT = 1.0 + 2 * SLACK  # budgets are kept to this factor
Options = dict[str, str | int | float]


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the request that makes the plan fit: option -> value, and what it then needs in bytes."""

    options: Options
    need: int

    @property
    def text(self) -> str:
        """As it is given on the command line."""
        return " ".join(f"--{option} {value}" for option, value in self.options.items())


def require_fit(
    program: Program,
    profile: Profile,
    request: Request,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> tuple[Plans, Request]:
    """As `choose`. Raises DoesNotFit when the device is too small, BudgetNotMet when speed or bits cannot be
    had; both name the smallest changes."""
    plans, resolved = choose(program, profile, request, beside, sensitivity)
    error, _ = shortfall(program, profile, resolved, plans, beside, sensitivity)
    if error is not None:
        raise error
    return plans, resolved


def shortfall(
    program: Program,
    profile: Profile,
    request: Request,
    plans: Plans,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> tuple[EdgeError | None, list[Change]]:
    """What chosen plans of a resolved request fall short of, and the changes that would help; (None, [])
    when they keep every budget."""
    if not fits(plans):
        changes = changes_that_fit(program, profile, request, beside, sensitivity)
        return does_not_fit(plans, profile, request, changes), changes
    missed = unmet(program, request, plans)
    if not missed:
        return None, []
    changes = changes_that_meet(program, profile, request, plans, beside, sensitivity)
    have, mode = plans[LANGUAGE].memory.have, plans[LANGUAGE].power_mode
    where = f"within {_mib(have)} of {profile.name}, mode {mode}"
    least = "the best plan has" if request.weights == AUTO else f"--weights {request.weights} has"
    text = "; ".join(f"{asked}, {where} {least} {got}" for asked, got in missed)
    return BudgetNotMet(f"{text}; {advice(changes, 'to keep it')}"), changes


def unmet(program: Program, request: Request, plans: Plans) -> list[tuple[str, str]]:
    """(what was asked for, what the plan has instead) of each budget of speed or bits that it breaks."""
    predicted = plans[LANGUAGE].predicted
    missed: list[tuple[str, str]] = []
    rate, first, bits = request.min_tokens_per_second, request.max_first_token_ms, request.bits
    if bits is not None and bits_per_weight(program, plans) > bits * _EXACT:
        missed.append(
            (f"--bits {bits:g} is asked for", f"{bits_per_weight(program, plans):.3f} bits a weight")
        )
    if rate is not None and predicted.decode_tokens_per_s * _EXACT < rate:
        missed.append((f"{rate:.5g} tokens/s are asked for", f"{predicted.decode_tokens_per_s:.5g} tokens/s"))
    if first is not None and predicted.first_token_ms > first * _EXACT:
        asked = f"a first token after {first:.4g} ms is asked for"
        missed.append((asked, f"it after {predicted.first_token_ms:.4g} ms"))
    return missed


def bits_per_weight(program: Program, plans: Plans) -> float:
    """Bits of the language part's tensors that are not vectors, scales included, padding left out."""
    chosen = {n: t for n, t in plans[LANGUAGE].tensors.items() if program.tensors[n].role != "vector"}
    specs = {n: program.tensors[n] for n in chosen}
    nbytes = sum(get_format(t.format).nbytes(specs[n].rows, specs[n].cols) for n, t in chosen.items())
    return 8.0 * nbytes / sum(s.size for s in specs.values())


def does_not_fit(plans: Plans, profile: Profile, request: Request, changes: Sequence[Change]) -> DoesNotFit:
    memory = plans[LANGUAGE].memory
    source = profile.memory_source if memory.have == profile.memory_available() else "--max-memory"
    least = " at the least" if request.weights == AUTO else ""
    gives = f"{profile.name} gives {_mib(memory.have)} ({source})"
    if source == "--max-memory":
        gives = f"--max-memory allows {_mib(memory.have)}"
    return DoesNotFit(
        f"{_mib(memory.need)} are needed{least}, {gives}; {advice(changes)}",
        need=memory.need,
        have=memory.have,
        source=source,
    )


def advice(changes: Sequence[Change], aim: str = "to fit") -> str:
    """The changes as one clause: ``to fit, use --weights int4_g64, or --context 2048``."""
    if not changes:
        return "no format, context or KV format makes it fit; take a larger device or a smaller model"
    return f"{aim}, use " + ", or ".join(change.text for change in changes)


def changes_that_meet(
    program: Program,
    profile: Profile,
    request: Request,
    plans: Plans,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> list[Change]:
    """Single changes of a resolved request that fits but breaks a budget of speed or bits, with which all are
    kept: formats chosen freely, another power mode, a smaller KV cache, and the budgets that are possible."""
    search = _Search(program, profile, request, beside, sensitivity)
    ways: list[Options] = [] if request.weights == AUTO else [{"weights": AUTO}]
    found = [search.first(ways)] if ways else []
    modes = [m for m in profile.power_modes if m != plans[LANGUAGE].power_mode]
    modes.sort(key=lambda m: profile.power_modes[m].bandwidth_gbps)
    found.append(search.first([{"power-mode": mode} for mode in modes]))
    found.append(search.first(_lower_kv(profile, request)))
    predicted, eased = plans[LANGUAGE].predicted, Options()
    if request.bits is not None and bits_per_weight(program, plans) > request.bits:
        eased["bits"] = _rounded(bits_per_weight(program, plans), up=True)
    rate, first = request.min_tokens_per_second, request.max_first_token_ms
    if rate is not None and predicted.decode_tokens_per_s < rate:
        eased["min-tokens-per-second"] = _rounded(predicted.decode_tokens_per_s, up=False)
    if first is not None and predicted.first_token_ms > first:
        eased["max-first-token-ms"] = _rounded(predicted.first_token_ms, up=True)
    found.append(search.attempt(eased))
    return [change for change in found if change is not None]


def changes_that_fit(
    program: Program,
    profile: Profile,
    request: Request,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> list[Change]:
    """The smallest single changes of a resolved request that make it fit; when no single one does, the
    smallest set of changes; [] when nothing does. Every one is checked by the memory function."""
    search = _Search(program, profile, request, beside, sensitivity)
    weights, kv = _lower_weights(profile, request), _lower_kv(profile, request)
    found = [search.first(weights), search.first(kv), search.longest_context({})]
    if request.max_memory is not None:
        found.append(search.more_memory())
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
    sensitivity: Sensitivity | None

    def attempt(self, options: Options) -> Change | None:
        """The change, when with it every budget is kept."""
        asked = _with(self.request, options)
        plans, settled = choose(self.program, self.profile, asked, self.beside, self.sensitivity)
        kept = fits(plans) and not unmet(self.program, settled, plans)
        return Change(options, plans[LANGUAGE].memory.need) if kept else None

    def more_memory(self) -> Change | None:
        """The least --max-memory, in whole MiB, where the device has more than was allowed."""
        asked = replace(self.request, max_memory=None)
        smallest = replace(asked, max_memory=1) if asked.weights == AUTO else asked
        plans, _ = choose(self.program, self.profile, smallest, self.beside, self.sensitivity)
        mib = -(-plans[LANGUAGE].memory.need // 2**20)
        return self.attempt({"max-memory": f"{mib}MiB"})

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
    if request.weights == AUTO:  # it has tried whatever it may
        everything = candidates(profile, replace(request, formats=()))
        least = min(everything, key=bits)
        bound = request.formats and least not in request.formats
        return [{"formats": least}] if bound or request.head_weights is not None else []
    now = math.inf if request.weights == KEEP else bits(request.weights)
    ways: list[Options] = [{"weights": name} for name in names if bits(name) < now]
    if names and (request.head_weights is None or bits(names[-1]) < bits(request.head_weights)):
        ways.append({"weights": names[-1], "head-weights": names[-1]})
    return ways


def _lower_kv(profile: Profile, request: Request) -> list[Options]:
    def nbytes(k: str, v: str) -> float:
        return row_nbytes(k, 128, request.page_tokens) + row_nbytes(v, 128, request.page_tokens)

    now = nbytes(request.kv_k, request.kv_v)
    known = [names for names in KV_ORDER if running_pairs(profile, [kv_pair(names)])]
    return [{"kv": names} for names in known if nbytes(*kv_pair(names)) < now]


def _with(request: Request, options: Options) -> Request:
    """The request with options changed, each as it is written on the command line."""
    changed = request
    for option, value in options.items():
        match option:
            case "kv":
                k, v = kv_pair(str(value))
                changed = replace(changed, kv_k=k, kv_v=v, kv_choices=())
            case "context":
                changed = replace(changed, context=int(value), kv_tokens=None)
            case "formats":
                changed = replace(changed, formats=tuple(str(value).split(",")), head_weights=None)
            case "max-memory":
                changed = replace(changed, max_memory=parse_bytes("--max-memory", str(value)))
            case _:
                changed = replace(changed, **{option.replace("-", "_"): value})
    return changed


def _rounded(value: float, *, up: bool) -> float:
    """Three digits that a plan with this value keeps."""
    step = 10.0 ** (math.floor(math.log10(value)) - 2)
    whole = math.ceil(value / step) if up else math.floor(value / step)
    return float(f"{whole * step:.6g}")


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
