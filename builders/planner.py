"""The planner: a Format and packing for each tensor, KV formats and step shape, for one profile's memory.

Matrices take the format asked for. The embedding and the head take it too when it is a float or int8, and
int8_row otherwise (every answer passes through the head; 4 bits there cost more than they save), unless
`head_weights` says otherwise. Vectors stay f32. What does not fit is never planned silently: `choose` gives
the plan and `changes_that_fit` the smallest changes, all measured by the one memory function.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from builders.roofline import predict
from edge_runtime.engine.formats import FORMATS, get_format
from edge_runtime.engine.kv import KV_FORMATS, PAGE_TOKENS, kv_format
from edge_runtime.engine.memory import memory_plan
from edge_runtime.engine.packing import cpu_packing
from edge_runtime.engine.plan import KvPlan, Plan, StepShape, TensorPlan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, DoesNotFit, Unsupported, nearest

AUTO = "auto"
# What edge-build takes when nothing is said: decoding on a robot is bound by the bytes of its weights.
DEFAULT_WEIGHTS = "int4_g64"
# Best quality first; `auto` takes the first that fits and that the device's precisions allow.
QUALITY_ORDER = ("f16", "int8_row", "int4_g32", "int4_g64", "int4_g128")
KV_ORDER = ("f16", "int8", "int4")
HEAD_FORMAT = "int8_row"
DEFAULT_CONTEXT = 4096
SHORTEST_CONTEXT = 128
PLAN_THREADS = 8  # scratch of a cpu plan is sized for this many threads
DEVICE_CODE = 8 << 20  # allowance for cubin and PTX of a cuda engine


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of the planner. None means: the planner's default.

    kv_tokens: tokens that the KV pool holds for all sequences together (default: one full context).
    """

    weights: str = AUTO
    head_weights: str | None = None
    kv_k: str = "int8"
    kv_v: str = "int8"
    context: int | None = None
    sequences: int = 4
    kv_tokens: int | None = None
    step_tokens: int = 128
    page_tokens: int = 16
    power_mode: str | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the request that makes the plan fit: option -> value, and what it then needs in bytes."""

    options: dict[str, str | int]
    need: int


def precision(format_name: str) -> str:
    """The precision class that a profile lists: f32, f16, bf16, int8, int4, nf4, fp8."""
    get_format(format_name)
    return format_name.split("_")[0]


def default_context(longest: int, asked: int | None) -> int:
    """The context asked for, or what is planned when nobody asked."""
    return min(longest, DEFAULT_CONTEXT) if asked is None else asked


def resolve(program: Program, profile: Profile, request: Request) -> Request:
    """Check every option against the program and the profile, and fill in the context.

    Raises BadConfig for a wrong value, Unsupported for a format that the device lacks.
    """
    profile.mode(request.power_mode)
    formats = [f for f in (request.weights, request.head_weights) if f not in (None, AUTO)]
    for name in formats:
        if name not in FORMATS:
            raise BadConfig(f"unknown weight format {name!r}; {nearest(str(name), [*FORMATS, AUTO])}")
        if not profile.supports(precision(str(name))):
            usable = ", ".join(f for f in FORMATS if profile.supports(precision(f)))
            raise Unsupported(f"profile {profile.name!r} has no {precision(str(name))}; it runs: {usable}")
    for kv in (request.kv_k, request.kv_v):
        kv_format(kv)
    context = default_context(program.max_context, request.context)
    if not 1 <= context <= program.max_context:
        raise BadConfig(f"context {context} is outside 1 to {program.max_context}, the model's longest")
    kv_tokens = context if request.kv_tokens is None else request.kv_tokens
    limits = {
        "--sequences": (request.sequences, 1, 1024),
        "--step-tokens": (request.step_tokens, 1, 8192),
        "--kv-tokens": (kv_tokens, context, 1 << 24),
    }
    for option, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise BadConfig(f"{option} is {value}, expected {low} to {high}")
    if request.page_tokens not in PAGE_TOKENS:
        raise BadConfig(f"--page-tokens is {request.page_tokens}, expected one of {PAGE_TOKENS}")
    return replace(request, context=context)


def make_plan(program: Program, profile: Profile, request: Request) -> Plan:
    """The plan of a resolved request whose `weights` is a format. It may be larger than the device."""
    mode = profile.mode(request.power_mode)
    context = default_context(program.max_context, request.context)
    tensors = _tensors(program, profile, request.weights, request.head_weights)
    kv_tokens = max(request.kv_tokens or 0, context)
    page = request.page_tokens
    kv = KvPlan(k=request.kv_k, v=request.kv_v, page_tokens=page, pages=-(-kv_tokens // page))
    tokens = max(min(request.step_tokens, context), request.sequences)
    step = StepShape(context=context, sequences=request.sequences, tokens=tokens, logits=request.sequences)
    memory = memory_plan(
        program,
        tensors,
        kv,
        step,
        threads=_threads(profile),
        total=profile.memory.total_bytes,
        reserve=profile.memory.reserve_bytes,
        context=profile.memory.context_bytes,
        device_code=DEVICE_CODE if profile.backend == "cuda" else 0,
    )
    predicted = predict(program, tensors, kv, step, profile, mode)
    return Plan(
        profile=profile.name,
        power_mode=mode.mode_name,
        tensors=tensors,
        kv=kv,
        step=step,
        memory=memory,
        predicted=predicted,
    )


def choose(program: Program, profile: Profile, request: Request) -> tuple[Plan, Request]:
    """The plan and the request with every default filled in.

    `auto` is the first of QUALITY_ORDER that fits, or the smallest when none does; ask `fits`.
    """
    request = resolve(program, profile, request)
    if request.weights != AUTO:
        return make_plan(program, profile, request), request
    last: tuple[Plan, Request] | None = None
    for name in _usable(profile):
        tried = replace(request, weights=name)
        last = make_plan(program, profile, tried), tried
        if fits(last[0]):
            return last
    if last is None:
        raise Unsupported(f"profile {profile.name!r} has none of {', '.join(QUALITY_ORDER)}; give --weights")
    return last


def require_fit(program: Program, profile: Profile, request: Request) -> Plan:
    """The plan of a request. Raises DoesNotFit, naming the smallest changes, when the device is too small."""
    plan, resolved = choose(program, profile, request)
    if not fits(plan):
        changes = changes_that_fit(program, profile, resolved)
        raise DoesNotFit(
            f"{_mib(plan.memory.need)} are needed, {profile.name} gives {_mib(plan.memory.have)} "
            f"({profile.memory_source}); {advice(changes)}",
            need=plan.memory.need,
            have=plan.memory.have,
            source=profile.memory_source,
        )
    return plan


def advice(changes: list[Change]) -> str:
    """The changes as one clause: ``to fit, use --weights int4_g64, or --context 2048``."""
    if not changes:
        return "no format, context or KV format makes it fit; take a larger device or a smaller model"
    ways = (" ".join(f"--{k} {v}" for k, v in change.options.items()) for change in changes)
    return "to fit, use " + ", or ".join(ways)


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"


def fits(plan: Plan) -> bool:
    return plan.memory.need <= plan.memory.have


def changes_that_fit(program: Program, profile: Profile, request: Request) -> list[Change]:
    """The smallest single changes of a resolved request that make it fit; when no single one does, the
    smallest set of changes; [] when nothing does. Every one is checked by the memory function."""
    singles = [
        found
        for found in (
            _first_fit(program, profile, request, _lower_weights(profile, request)),
            _first_fit(program, profile, request, _lower_kv(request)),
            _longest_context(program, profile, request, {}),
        )
        if found is not None
    ]
    if singles:
        return singles
    # Format first, then KV, then context: in the order of what each costs the user in answers.
    for weights in [{}, *_lower_weights(profile, request)]:
        for kv in [{}, *_lower_kv(request)]:
            if weights and kv and (hit := _try(program, profile, request, {**weights, **kv})):
                return [hit]
    for weights in [{}, *_lower_weights(profile, request)]:
        for kv in [{}, *_lower_kv(request)]:
            if hit := _longest_context(program, profile, request, {**weights, **kv}):
                return [hit]
    return []


def _usable(profile: Profile) -> list[str]:
    return [name for name in QUALITY_ORDER if profile.supports(precision(name))]


def _threads(profile: Profile) -> int:
    if profile.backend != "cpu":
        return 1
    return max(PLAN_THREADS, os.cpu_count() or 1) if profile.memory_source != "profile" else PLAN_THREADS


def _tensors(program: Program, profile: Profile, weights: str, head: str | None) -> dict[str, TensorPlan]:
    if head is None:
        head = weights if precision(weights) in ("f32", "f16", "bf16", "int8") else HEAD_FORMAT
        if not profile.supports(precision(head)):
            head = "f16"
    by_role = {"matrix": weights, "embedding": head, "head": head, "vector": "f32"}
    plans = {}
    for name, spec in program.tensors.items():
        fmt = by_role[spec.role]
        rows = profile.backend != "cpu" or spec.role == "vector"
        plans[name] = TensorPlan(fmt, "rows" if rows else cpu_packing(fmt))
    return plans


Options = dict[str, str | int]


def _lower_weights(profile: Profile, request: Request) -> list[Options]:
    """Smaller formats, best first; at the end the smallest one for embedding and head too."""

    def bits(name: str) -> float:
        return get_format(name).bits_per_weight(4096, 4096)

    usable = _usable(profile)
    ways: list[Options] = [{"weights": name} for name in usable if bits(name) < bits(request.weights)]
    if usable and (request.head_weights is None or bits(usable[-1]) < bits(request.head_weights)):
        ways.append({"weights": usable[-1], "head-weights": usable[-1]})
    return ways


def _lower_kv(request: Request) -> list[Options]:
    def bits(name: str) -> float:
        return get_format(KV_FORMATS[name]).bits_per_weight(1, 128)

    now = bits(request.kv_k) + bits(request.kv_v)
    return [{"kv": name} for name in KV_ORDER if 2 * bits(name) < now]


def _with(request: Request, options: Options) -> Request:
    changed = request
    for option, value in options.items():
        if option == "kv":
            changed = replace(changed, kv_k=str(value), kv_v=str(value))
        elif option == "context":
            changed = replace(changed, context=int(value), kv_tokens=None)
        elif option == "head-weights":
            changed = replace(changed, head_weights=str(value))
        else:
            changed = replace(changed, weights=str(value))
    return changed


def _try(program: Program, profile: Profile, request: Request, options: Options) -> Change | None:
    plan = make_plan(program, profile, _with(request, options))
    return Change(options, plan.memory.need) if fits(plan) else None


def _first_fit(program: Program, profile: Profile, request: Request, ways: list[Options]) -> Change | None:
    return next((hit for way in ways if (hit := _try(program, profile, request, way))), None)


def _longest_context(program: Program, profile: Profile, request: Request, options: Options) -> Change | None:
    """The longest shorter context, in whole pages, with which the rest fits (need grows with the context)."""
    page = request.page_tokens
    low, high = SHORTEST_CONTEXT // page, ((request.context or 0) - 1) // page
    best: Change | None = None
    while low <= high:
        middle = (low + high) // 2
        hit = _try(program, profile, request, {**options, "context": middle * page})
        if hit is None:
            high = middle - 1
        else:
            best, low = hit, middle + 1
    return best
