"""The planner: a Format and packing for each tensor, KV formats and step shape, for one profile's budgets.

With a format asked for, matrices take it. The embedding and the head take it too when it is a float or int8,
and int8_row otherwise (every answer passes through the head; 4 bits there cost more than they save), unless
`head_weights` says otherwise. With `auto`, every tensor has a format of its own, by the integer program of
allocation.py. Vectors stay f32. What does not fit is never planned silently: `choose` gives the plans and
`fitting.py` the smallest changes, all measured by the one memory function.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from builders.allocation import (
    Inputs,
    Limits,
    Pair,
    allocate,
    stored,
)
from builders.companions import ALONE, Companions, check_companions, companion_shapes
from builders.device_formats import caches, precision, running_pairs, runs
from builders.losses import Losses, losses_of
from builders.sensitivity import Sensitivity
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import PAGE_TOKENS, kv_format, v_format
from edge_runtime.engine.manifest import DRAFT, LANGUAGE
from edge_runtime.engine.memory import adapter_nbytes, memory_plan
from edge_runtime.engine.plan import KvPlan, Plan, StepShape, TensorPlan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import predict
from edge_runtime.errors import BadConfig, Unsupported, nearest

AUTO = "auto"
DEFAULT = "default"  # KEEP for such a checkpoint, else DEFAULT_WEIGHTS; the pipeline settles it
KEEP = "keep"  # of a checkpoint that is already quantized: every matrix as it is there
# What edge-build takes when nothing is said: decoding on a robot is bound by the bytes of its weights.
DEFAULT_WEIGHTS = "int4_g64"
# Best quality first: what `fitting.py` proposes in place of a format that does not fit.
QUALITY_ORDER = ("f16", "int8_row", "int4_g32", "int4_g64", "int4_g128")
HEAD_FORMAT = "int8_row"
# Cache pairs that `--kv auto` chooses from, best quality first (losses.KV_LOSSES); fp8 is never the best.
KV_CHOICES = (
    ("f16", "f16"),
    ("f16", "int8"),
    ("int8c", "int8"),
    ("f16", "int4"),
    ("int8c", "int4"),
    ("int8", "int8"),
    ("int8", "int4"),
    ("int4c", "int4"),
    ("int4", "int4"),
)
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

    Budgets: max_memory in bytes, of the whole plan; bits a weight on average, scales included, of all that
    are not vectors; the predicted speed of one sequence. formats: what `auto` chooses from. kv_choices: cache
    pairs that it chooses from, in place of kv_k and kv_v.
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
    max_memory: int | None = None
    bits: float | None = None
    min_tokens_per_second: float | None = None
    max_first_token_ms: float | None = None
    formats: tuple[str, ...] = ()
    kv_choices: tuple[Pair, ...] = ()

    @property
    def in_blocks(self) -> bool:
        """Whether blocks of the vocabulary have formats of their own."""
        return self.weights == AUTO and self.head_weights is None


def default_context(longest: int, asked: int | None) -> int:
    """The context asked for, or what is planned when nobody asked."""
    return min(longest, DEFAULT_CONTEXT) if asked is None else asked


def resolve(program: Program, profile: Profile, request: Request, beside: Companions = ALONE) -> Request:
    """Check every option against the programs and the profile; fill in context and draft length.

    Raises BadConfig for a wrong value, Unsupported for a format that the device lacks.
    """
    profile.mode(request.power_mode)
    whole = (request.weights, request.head_weights, request.draft_weights)
    asked = (*whole, *request.kept.values(), *request.formats)
    formats = [f for f in asked if f not in (None, AUTO, KEEP)]
    if request.weights == KEEP and not request.kept:
        raise BadConfig("--weights keep is for checkpoints that are already quantized; name a format")
    for name in formats:
        if name not in FORMATS:
            raise BadConfig(f"unknown weight format {name!r}; {nearest(str(name), [*FORMATS, AUTO])}")
        if not runs(profile, str(name)):
            usable = ", ".join(f for f in FORMATS if runs(profile, f))
            what = name if profile.supports(precision(str(name))) else precision(str(name))
            raise Unsupported(f"profile {profile.name!r} has no {what}; it runs: {usable}")
    request = replace(request, kv_choices=running_pairs(profile, request.kv_choices))
    pairs = [(request.kv_k, request.kv_v), *request.kv_choices]
    for k, v in (*pairs, *([request.draft_kv] if request.draft_kv else ())):
        kv_format(k)
        v_format(v)
        if not running_pairs(profile, [(k, v)]):
            usable = ", ".join(caches(profile))
            raise Unsupported(f"profile {profile.name!r} has no KV cache {k},{v}; its caches: {usable}")
    context = default_context(program.max_context, request.context)
    if not 1 <= context <= program.max_context:
        raise BadConfig(f"context {context} is outside 1 to {program.max_context}, the model's longest")
    kv_tokens = context if request.kv_tokens is None else request.kv_tokens
    limits = {
        "--sequences": (request.sequences, 1, 1024),
        "--step-tokens": (request.step_tokens, 1, 8192),
        "--kv-tokens": (kv_tokens, context, 1 << 24),
    }
    for name, budget in (
        ("--max-memory", request.max_memory),
        ("--bits", request.bits),
        ("--min-tokens-per-second", request.min_tokens_per_second),
        ("--max-first-token-ms", request.max_first_token_ms),
    ):
        if budget is not None and not 0 < budget < float("inf"):
            raise BadConfig(f"{name} is {budget}, expected a number above 0")
    for option, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise BadConfig(f"{option} is {value}, expected {low} to {high}")
    if request.page_tokens not in PAGE_TOKENS:
        raise BadConfig(f"--page-tokens is {request.page_tokens}, expected one of {PAGE_TOKENS}")
    check_companions(program, beside, context)
    return replace(request, context=context, draft_length=beside.draft_length(request.draft_length))


def make_plans(
    program: Program,
    profile: Profile,
    request: Request,
    beside: Companions = ALONE,
    formats: Mapping[str, str] | None = None,
) -> Plans:
    """The plans of a resolved request whose `weights` is a format, or whose tensors have these `formats`.

    They may be larger than the device."""
    profile = limited(profile, request)
    context = default_context(program.max_context, request.context)
    if formats is None:
        tensors = _tensors(program, profile, request.weights, request.head_weights, request.kept)
    else:
        tensors = {n: stored(profile, s, formats.get(n, "f32")) for n, s in program.tensors.items()}
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
        adapters=sum(
            adapter_nbytes(program, step, ranks, backend=profile.backend) for ranks in beside.adapters
        ),
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
        backend=profile.backend,
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
        if weights in (KEEP, AUTO):
            weights = DEFAULT_WEIGHTS if runs(profile, DEFAULT_WEIGHTS) else usable(profile)[-1]
        tensors = _tensors(program, profile, weights, request.head_weights)
        cache, shape = companion_shapes(name, kv, step, request.draft_kv or (request.kv_k, request.kv_v))
        plans[name] = _plan(program, profile, request.power_mode, tensors, cache, shape)
    return plans


def choose(
    program: Program,
    profile: Profile,
    request: Request,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> tuple[Plans, Request]:
    """The plans and the request with every default filled in.

    `auto` takes the formats of least predicted loss that keep every budget: by `sensitivity` where there is
    one, else by the model of losses.py. When nothing keeps them, the plan that comes closest: the smallest
    when memory is too small, else the fastest of those that fit; ask `fits` and `unmet`.
    """
    request = resolve(program, profile, request, beside)
    if request.weights != AUTO and not request.kv_choices:
        return make_plans(program, profile, request, beside), request
    made, solution, _ = allocate(inputs_of(program, profile, request, beside, sensitivity))
    formats, pair = made.formats(solution)
    settled = replace(request, kv_k=pair[0], kv_v=pair[1])
    return make_plans(program, profile, settled, beside, formats), settled


def inputs_of(
    program: Program,
    profile: Profile,
    request: Request,
    beside: Companions = ALONE,
    sensitivity: Sensitivity | None = None,
) -> Inputs:
    """What the integer program of a resolved request is made of."""
    formats = candidates(profile, request)
    losses = losses_of(program, sensitivity, formats)

    def plan_of(chosen: Mapping[str, str], pair: Pair) -> Plans:
        return make_plans(program, profile, replace(request, kv_k=pair[0], kv_v=pair[1]), beside, chosen)

    return Inputs(
        program,
        profile,
        request.power_mode,
        _choices(program, profile, request, losses, formats),
        request.kv_choices or ((request.kv_k, request.kv_v),),
        limits_of(profile, request),
        losses,
        plan_of,
    )


def candidates(profile: Profile, request: Request) -> tuple[str, ...]:
    """What `auto` chooses from: the formats asked for, or all that the device runs but f32, which no
    checkpoint needs."""
    found = request.formats or [f for f in FORMATS if f != "f32" and runs(profile, f)]
    if not found:
        raise Unsupported(f"profile {profile.name!r} runs no format but f32; give --weights")
    return tuple(dict.fromkeys(found))


def limited(profile: Profile, request: Request) -> Profile:
    """The profile as the plan may use it: no more memory than asked for."""
    memory = profile.memory
    if request.max_memory is None or request.max_memory >= memory.total_bytes - memory.reserve_bytes:
        return profile
    less = msgspec.structs.replace(memory, total_bytes=memory.reserve_bytes + request.max_memory)
    return msgspec.structs.replace(profile, memory=less)


def limits_of(profile: Profile, request: Request) -> Limits:
    rate, first = request.min_tokens_per_second, request.max_first_token_ms
    return Limits(
        memory=limited(profile, request).memory_available(),
        bits=request.bits,
        decode=None if rate is None else 1.0 / rate,
        first=None if first is None else 1e-3 * first,
    )


def _choices(
    program: Program, profile: Profile, request: Request, losses: Losses, formats: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """tensor -> formats that it may have: one where a format is asked for, or no loss is known."""
    weights = HEAD_FORMAT if request.weights == AUTO and profile.supports("int8") else request.weights
    plain = _tensors(program, profile, weights, request.head_weights, request.kept)
    found: dict[str, tuple[str, ...]] = {}
    for name, spec in program.tensors.items():
        if spec.role == "vector":
            continue
        named = spec.role != "matrix" and request.head_weights is not None
        free = request.weights == AUTO and not named and losses.knows(name)
        usable = tuple(f for f in formats if losses.of(name, f) is not None) if free else ()
        found[name] = usable or (plain[name].format,)
    return found


def fits(plans: Plans) -> bool:
    """Whether the device holds all of them: the language part's plan counts the others."""
    memory = plans[LANGUAGE].memory
    return memory.need <= memory.have


def usable(profile: Profile) -> list[str]:
    return [name for name in QUALITY_ORDER if runs(profile, name)]


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
        if not runs(profile, head):
            head = "f16"
    by_role = {"matrix": weights, "embedding": head, "head": head, "vector": "f32"}
    chosen = {name: kept.get(name, by_role[spec.role]) for name, spec in program.tensors.items()}
    return {name: stored(profile, spec, chosen[name]) for name, spec in program.tensors.items()}
