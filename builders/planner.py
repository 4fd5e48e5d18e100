"""The planner: a Format and packing for each tensor, KV formats and step shape, for one profile's memory.

Matrices take the format asked for. The embedding and the head take it too when it is a float or int8, and
int8_row otherwise (every answer passes through the head; 4 bits there cost more than they save), unless
`head_weights` says otherwise. Vectors stay f32. What does not fit is never planned silently: `choose` gives
the plans and `fitting.py` the smallest changes, all measured by the one memory function.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from builders.companions import ALONE, Companions, check_companions, companion_shapes
from builders.roofline import predict
from edge_runtime.engine.formats import FORMATS, get_format
from edge_runtime.engine.kv import PAGE_TOKENS, kv_format, v_format
from edge_runtime.engine.manifest import DRAFT, LANGUAGE
from edge_runtime.engine.memory import adapter_nbytes, memory_plan
from edge_runtime.engine.packing import cpu_packing
from edge_runtime.engine.plan import KvPlan, Plan, StepShape, TensorPlan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, Unsupported, nearest

AUTO = "auto"
KEEP = "keep"  # of a checkpoint that is already quantized: every matrix as it is there
# What edge-build takes when nothing is said: decoding on a robot is bound by the bytes of its weights.
DEFAULT_WEIGHTS = "int4_g64"
# Best quality first; `auto` takes the first that fits and that the device's precisions allow.
QUALITY_ORDER = ("f16", "int8_row", "int4_g32", "int4_g64", "int4_g128")
HEAD_FORMAT = "int8_row"
DEFAULT_CONTEXT = 4096
PLAN_THREADS = 8  # scratch of a cpu plan is sized for this many threads
DEVICE_CODE = 8 << 20  # allowance for cubin and PTX of a cuda engine
Plans = dict[str, Plan]  # by part name, the language part first


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked of the planner. None means: the planner's default.

    kv_tokens: tokens that the KV pool holds for all sequences together (default: one full context).
    kept: for weights "keep", tensor -> the format that the checkpoint has it in (CheckpointWeights.kept).
    draft_weights, draft_kv: as the target's. draft_length: tokens proposed at once (default: 8 where the
    engine has a draft or Medusa heads, else 0); sizes the logits, for a step must hold their verification.
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
    draft_weights: str | None = None
    draft_kv: tuple[str, str] | None = None
    draft_length: int | None = None
    kept: Mapping[str, str] = field(default_factory=dict)


def precision(format_name: str) -> str:
    """The precision class that a profile lists: f32, f16, bf16, int2 to int6, int8, nf4, fp8, mxfp4, nvfp4.

    A k-quant's is that of its codes: q4_k is int4.
    """
    get_format(format_name)
    first, _, rest = format_name.partition("_")
    return f"int{first[1:]}" if rest == "k" else first


def default_context(longest: int, asked: int | None) -> int:
    """The context asked for, or what is planned when nobody asked."""
    return min(longest, DEFAULT_CONTEXT) if asked is None else asked


def resolve(program: Program, profile: Profile, request: Request, beside: Companions = ALONE) -> Request:
    """Check every option against the programs and the profile; fill in context and draft length.

    Raises BadConfig for a wrong value, Unsupported for a format that the device lacks.
    """
    profile.mode(request.power_mode)
    asked = (request.weights, request.head_weights, request.draft_weights, *request.kept.values())
    formats = [f for f in asked if f not in (None, AUTO, KEEP)]
    if request.weights == KEEP and not request.kept:
        raise BadConfig("--weights keep is for checkpoints that are already quantized; name a format")
    for name in formats:
        if name not in FORMATS:
            raise BadConfig(f"unknown weight format {name!r}; {nearest(str(name), [*FORMATS, AUTO])}")
        if not profile.supports(precision(str(name))):
            usable = ", ".join(f for f in FORMATS if profile.supports(precision(f)))
            raise Unsupported(f"profile {profile.name!r} has no {precision(str(name))}; it runs: {usable}")
    for k, v in ((request.kv_k, request.kv_v), *([request.draft_kv] if request.draft_kv else ())):
        kv_format(k)
        v_format(v)
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
    check_companions(program, beside, context)
    return replace(request, context=context, draft_length=beside.draft_length(request.draft_length))


def make_plans(program: Program, profile: Profile, request: Request, beside: Companions = ALONE) -> Plans:
    """The plans of a resolved request whose `weights` is a format. They may be larger than the device."""
    context = default_context(program.max_context, request.context)
    tensors = _tensors(program, profile, request.weights, request.head_weights, request.kept)
    kv_tokens = max(request.kv_tokens or 0, context)
    page = request.page_tokens
    kv = KvPlan(k=request.kv_k, v=request.kv_v, page_tokens=page, pages=-(-kv_tokens // page))
    tokens = max(min(request.step_tokens, context), request.sequences)
    length = beside.draft_length(request.draft_length)
    logits = beside.logits(length, request.sequences, tokens)
    step = StepShape(context=context, sequences=request.sequences, tokens=tokens, logits=logits)
    others = _companion_plans(profile, request, kv, step, beside)
    language = _plan(
        program,
        profile,
        request.power_mode,
        tensors,
        kv,
        step,
        context=profile.memory.context_bytes,
        device_code=DEVICE_CODE if profile.backend == "cuda" else 0,
        draft=sum(plan.memory.need for plan in others.values()),
        adapters=sum(adapter_nbytes(program, step, ranks) for ranks in beside.adapters),
    )
    return {LANGUAGE: language} | others


def _plan(
    program: Program,
    profile: Profile,
    power_mode: str | None,
    tensors: dict[str, TensorPlan],
    kv: KvPlan,
    step: StepShape,
    **beside: int,
) -> Plan:
    """The plan of one part; `beside`: bytes of what else `memory_plan` counts."""
    mode = profile.mode(power_mode)
    memory = memory_plan(
        program,
        tensors,
        kv,
        step,
        threads=_threads(profile),
        total=profile.memory.total_bytes,
        reserve=profile.memory.reserve_bytes,
        **beside,
    )
    return Plan(
        profile=profile.name,
        power_mode=mode.mode_name,
        tensors=tensors,
        kv=kv,
        step=step,
        memory=memory,
        predicted=predict(program, tensors, kv, step, profile, mode),
    )


def _companion_plans(
    profile: Profile, request: Request, kv: KvPlan, step: StepShape, beside: Companions
) -> Plans:
    """Plans of draft and heads beside a target with that KV and step; `need` of each is its `part_nbytes`."""
    plans: Plans = {}
    for name, program in beside.programs().items():
        weights = (request.draft_weights or request.weights) if name == DRAFT else request.weights
        weights = DEFAULT_WEIGHTS if weights == KEEP else weights
        tensors = _tensors(program, profile, weights, request.head_weights)
        cache, shape = companion_shapes(name, kv, step, request.draft_kv or (request.kv_k, request.kv_v))
        plans[name] = _plan(program, profile, request.power_mode, tensors, cache, shape)
    return plans


def choose(
    program: Program, profile: Profile, request: Request, beside: Companions = ALONE
) -> tuple[Plans, Request]:
    """The plans and the request with every default filled in.

    `auto` is the first of QUALITY_ORDER that fits, or the smallest when none does; ask `fits`.
    """
    request = resolve(program, profile, request, beside)
    if request.weights != AUTO:
        return make_plans(program, profile, request, beside), request
    last: tuple[Plans, Request] | None = None
    for name in usable(profile):
        tried = replace(request, weights=name)
        last = make_plans(program, profile, tried, beside), tried
        if fits(last[0]):
            return last
    if last is None:
        raise Unsupported(f"profile {profile.name!r} has none of {', '.join(QUALITY_ORDER)}; give --weights")
    return last


def fits(plans: Plans) -> bool:
    """Whether the device holds all of them: the language part's plan counts the others."""
    memory = plans[LANGUAGE].memory
    return memory.need <= memory.have


def usable(profile: Profile) -> list[str]:
    return [name for name in QUALITY_ORDER if profile.supports(precision(name))]


def _threads(profile: Profile) -> int:
    if profile.backend != "cpu":
        return 1
    return max(PLAN_THREADS, os.cpu_count() or 1) if profile.memory_source != "profile" else PLAN_THREADS


def _tensors(
    program: Program, profile: Profile, weights: str, head: str | None, kept: Mapping[str, str] | None = None
) -> dict[str, TensorPlan]:
    kept = {} if kept is None or weights != KEEP else kept
    if head is not None:  # asked for: it wins over what the checkpoint has
        kept = {name: fmt for name, fmt in kept.items() if program.tensors[name].role == "matrix"}
    weights = DEFAULT_WEIGHTS if weights == KEEP else weights
    if head is None:
        head = weights if precision(weights) in ("f32", "f16", "bf16", "int8") else HEAD_FORMAT
        if not profile.supports(precision(head)):
            head = "f16"
    by_role = {"matrix": weights, "embedding": head, "head": head, "vector": "f32"}
    plans: Plans = {}
    for name, spec in program.tensors.items():
        fmt = kept.get(name, by_role[spec.role])
        rows = profile.backend != "cpu" or spec.role == "vector"
        plans[name] = TensorPlan(fmt, "rows" if rows else cpu_packing(fmt))
    return plans
