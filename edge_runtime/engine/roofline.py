"""Predicted speed: a roofline over the bytes and operations of a step, for a profile's power mode.

Ops run one after another, so each is bound by its own bytes or its own operations and a step is their sum:
time = sum of max(bytes / read rate, operations / compute rate) + overheads (Williams, Waterman & Patterson
2009, an op at a time). The sum is linear in each tensor's format, which is what lets the planner's integer
program hold it exactly. Rates are the power mode's times the profile's efficiency, or, where
`edge-bench --calibrate` has measured them, each format's own (`Efficiency.measured`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import row_nbytes
from edge_runtime.engine.lowering import launches_of_decoding
from edge_runtime.engine.memory import ATTENTION_TOKENS, TILE
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.packing import cpu_packing, packed_nbytes
from edge_runtime.engine.plan import KvPlan, Prediction, StepShape, TensorPlan
from edge_runtime.engine.profile import Measured, PowerMode, Profile
from edge_runtime.engine.program import Program, TensorSpec

PROMPT_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Step:
    """A step of `tokens` tokens of one sequence that holds `before`; head: whether it ends in logits."""

    tokens: int
    before: int
    head: bool


def decode_steps(step: StepShape) -> list[Step]:
    """One token of one sequence at half the context."""
    return [Step(1, step.context // 2, True)]


def prompt_steps(step: StepShape, prompt: int) -> list[Step]:
    """A prompt in chunks of `step.tokens`; each chunk reads all weights."""
    starts = range(0, prompt, step.tokens)
    return [Step(min(step.tokens, prompt - at), at, at + step.tokens >= prompt) for at in starts]


def prompt_tokens(step: StepShape) -> int:
    """Tokens of the prompt whose first token is predicted."""
    return min(PROMPT_TOKENS, step.context)


class Roofline:
    """Seconds of each piece of a program's steps on one device.

    `cached` says which share of a step's weights stays in the last cache; it has meaning where the profile is
    measured.
    """

    def __init__(self, program: Program, profile: Profile, mode: PowerMode, *, cached: float = 0.0) -> None:
        self.program = program
        self._mode, self._efficiency = mode, profile.efficiency
        self._measured: Measured | None = profile.efficiency.measured
        self._native = profile.backend == "cpu"  # runs of linears share a stage of the thread pool
        self._launches = len(program.ops) if self._native else launches_of_decoding(program)
        self._cached = cached
        self._readers: dict[str, list[AnyOp]] = {}
        for op in program.ops:
            if isinstance(op, Linear | Logits | Embed):
                self._readers.setdefault(op.weight, []).append(op)

    def tensor(self, name: str, chosen: TensorPlan, steps: Sequence[Step]) -> float:
        """Seconds of all ops that read the weights of this matrix, in these steps."""
        spec = self.program.tensors[name]
        nbytes = packed_nbytes(chosen.format, chosen.packing, spec.rows, spec.cols)
        seconds = 0.0
        for op in self._readers.get(name, ()):
            match op:
                case Linear():
                    seconds += sum(self._product(chosen.format, nbytes, spec, s.tokens) for s in steps)
                case Logits():
                    heads = sum(s.head for s in steps)
                    seconds += heads * self._product(chosen.format, nbytes, spec, 1)
                case _:  # a row a token, of a block of the vocabulary in proportion to its ids
                    row = get_format(chosen.format).nbytes(1, spec.cols) * spec.rows / self.program.vocab_size
                    seconds += sum(s.tokens for s in steps) * row / self._read_rate(chosen.format)
        return seconds

    def rest(self, kv: KvPlan, steps: Sequence[Step]) -> float:
        """Seconds that no weight's format changes, with every run of linears on one input unbroken."""
        return sum(self._attention(kv, s) + self._values(s) + self._overhead(s) for s in steps)

    def breaks(self, formats: Sequence[str], steps: Sequence[Step]) -> float:
        """Seconds lost where linears that read one input, in order, have formats that cannot share a stage.

        The cpu backend quantizes the input anew for another encoding or group, and starts another stage.
        """
        if self._measured is None or not self._native:
            return 0.0
        products, quantized = 0, 0
        for before, after in pairwise(formats):
            if family(before) != family(after) or _own_columns(after):
                products += 1
                quantized += _quantizes(after)
        stages = (products + quantized) * len(steps) * self._measured.stage_us
        units = quantized * sum(s.tokens - 1 for s in steps) * self._measured.unit_us
        return 1e-6 * (stages + units)

    def head_breaks(self, formats: Sequence[str], steps: Sequence[Step]) -> float:
        """The same of the blocks of the logits, for the one row that a step may end in."""
        return self.breaks(formats, [Step(1, s.before, True) for s in steps if s.head])

    def _product(self, fmt: str, nbytes: int, spec: TensorSpec, tokens: int) -> float:
        """One linear over `tokens` rows. Compute binds only beyond one row where rates are measured: at one
        row the measured read rate says what the kernel does. What a row of outputs costs beyond its columns
        is the format's own."""
        if self._measured is None:
            compute = 2.0 * spec.size * tokens / (_rate(fmt, self._mode) * self._efficiency.compute)
            return max(nbytes / self._read_rate(fmt), compute)
        each = self._measured.output_ns(fmt, tokens)
        outputs = spec.rows * tokens * each * 1e-9 / self._measured.threads
        speed = self._measured.speed(fmt)
        if speed is None:
            rate = _rate(fmt, self._mode) * self._efficiency.compute
            return max(nbytes / self._read_rate(fmt), 2.0 * spec.size * tokens / rate) + outputs
        compute = 2.0 * spec.size * tokens / (speed.gops * 1e9) if tokens > 1 else 0.0
        return max(nbytes / self._read_rate(fmt), compute) + outputs

    def _read_rate(self, fmt: str) -> float:
        """Bytes per second."""
        speed = None if self._measured is None else self._measured.speed(fmt)
        if speed is None:
            share = self._efficiency.formats.get(fmt, 1.0)
            return self._mode.bandwidth_gbps * 1e9 * self._efficiency.bandwidth * share
        return 1e9 / (self._cached / speed.cached_gbps + (1.0 - self._cached) / speed.gbps)

    def _attention(self, kv: KvPlan, s: Step) -> float:
        seconds = 0.0
        for op in self.program.ops:
            if not isinstance(op, Attention):
                continue
            seen = s.before + (s.tokens + 1) / 2  # mean number of keys that a token of the step sees
            seen = min(seen, op.window) if op.window else seen
            if self._measured is not None:
                seconds += seen * self._a_key(op, kv, s.tokens, self._measured)
                continue
            reach = min(s.before + s.tokens, op.window + s.tokens - 1) if op.window else s.before + s.tokens
            row = sum(row_nbytes(f, op.head_dim, kv.page_tokens) for f in (kv.k, kv.v))
            read = reach * op.kv_heads * row / (self._mode.bandwidth_gbps * 1e9 * self._efficiency.bandwidth)
            rate = self._mode.compute.fp16 * 1e12 * self._efficiency.compute
            seconds += max(read, 4.0 * op.heads * op.head_dim * seen * s.tokens / rate)
        return seconds

    @staticmethod
    def _a_key(op: Attention, kv: KvPlan, tokens: int, measured: Measured) -> float:
        """Seconds that one key costs the tokens of a step that see it. Heads are padded to whole tiles."""
        width = -(-op.head_dim // TILE) * TILE
        query = measured.query if tokens == 1 else measured.chunk_query
        products = tokens * op.heads * (width * query.value_ns + query.score_ns)
        whole = op.head_dim % TILE == 0
        each = measured.key_ns(kv.k, kv.v) if whole else measured.odd_kv_ns
        row = measured.row_ns + op.head_dim * each
        return 1e-9 * (products + -(-tokens // ATTENTION_TOKENS) * op.kv_heads * row)

    def _values(self, s: Step) -> float:
        """Ops of a value at a time: where they are measured; else they hide behind the launches."""
        if self._measured is None:
            return 0.0
        turns = -(-s.tokens // self._measured.threads)  # tokens are shared out, the values of one are not
        values = values_per_token(self.program) * self._measured.value_ns
        return turns * (values + odd_heads(self.program) * self._measured.odd_head_ns) * 1e-9

    def _overhead(self, s: Step) -> float:
        if self._measured is None:
            return self._launches * self._efficiency.launch_overhead_us * 1e-6
        measured = self._measured
        step = measured.small_step_us if is_small(self.program, measured) else measured.step_us
        host = step + s.tokens * measured.token_us
        if self._native:
            host += stages_us(self.program, s.tokens, measured)
        else:
            host += self._launches * measured.stage_us
        return host * 1e-6 + s.head * self.program.vocab_size * measured.logit_ns * 1e-9


def predict(
    program: Program,
    tensors: Mapping[str, TensorPlan],
    kv: KvPlan,
    step: StepShape,
    profile: Profile,
    mode: PowerMode,
) -> Prediction:
    """Decode rate of one sequence at half the context, and the time to the first token of a prompt of
    min(512, context) tokens."""
    seconds = timer(program, tensors, kv, profile, mode)
    prompt = prompt_tokens(step)
    measured = profile.efficiency.measured
    request = 0.0 if measured is None else measured.request_us * 1e-6
    return Prediction(
        decode_tokens_per_s=1.0 / seconds(decode_steps(step)),
        first_token_ms=1e3 * (request + seconds(prompt_steps(step, prompt))),
        prompt_tokens=prompt,
    )


def timer(
    program: Program,
    tensors: Mapping[str, TensorPlan],
    kv: KvPlan,
    profile: Profile,
    mode: PowerMode,
) -> Callable[[Sequence[Step]], float]:
    """Seconds of steps as a function of them, for weights and cache in these formats."""
    cached = cached_share(profile, weights_read(program, tensors))
    roofline = Roofline(program, profile, mode, cached=cached)
    names = {op.weight for op in program.ops if isinstance(op, Linear | Logits | Embed)}
    runs = [[tensors[n].format for n in run] for run in linear_runs(program)]
    heads = [tensors[op.weight].format for op in program.heads]

    def seconds(steps: Sequence[Step]) -> float:
        weights = sum(roofline.tensor(n, tensors[n], steps) for n in sorted(names))
        broken = sum(roofline.breaks(run, steps) for run in runs) + roofline.head_breaks(heads, steps)
        return weights + roofline.rest(kv, steps) + broken

    return seconds


def weights_read(program: Program, tensors: Mapping[str, TensorPlan]) -> int:
    """Bytes of the matrices that a step multiplies with."""
    chosen = ((program.tensors[n], tensors[n]) for n in weight_names(program))
    return sum(packed_nbytes(t.format, t.packing, s.rows, s.cols) for s, t in chosen)


def weight_names(program: Program) -> list[str]:
    """Matrices that a step multiplies with, in order, each once."""
    return list(dict.fromkeys(op.weight for op in program.ops if isinstance(op, Linear | Logits)))


def cached_share(profile: Profile, nbytes: int) -> float:
    """Share of the weights, so many bytes, that stays in the last cache from one step to the next.

    Between the cache's ends it falls with the logarithm of the bytes: what is read in turn pushes itself out.
    """
    measured = profile.efficiency.measured
    if measured is None or nbytes > max(measured.cache_bytes, measured.stream_bytes):
        return 0.0
    if nbytes <= measured.cache_bytes:
        return 1.0
    return math.log(measured.stream_bytes / nbytes) / math.log(
        measured.stream_bytes / max(1, measured.cache_bytes)
    )


def is_small(program: Program, measured: Measured) -> bool:
    """Whether a step's weights leave the host's code and data in a core's own cache.

    Told by the program alone, a byte a weight, so that a plan's formats do not change what a step costs.
    """
    weights = sum(program.tensors[n].size for n in weight_names(program))
    return weights <= measured.core_cache_bytes


def family(fmt: str) -> tuple[str, int | None]:
    """What formats must have in common for their linears to share a stage of the cpu backend: the codes that
    the input is quantized to (kernels/cpu/stages.cpp, shares_input)."""
    record = get_format(fmt)
    return (record.planes[0].encoding, record.group) if _quantizes(fmt) else ("float", None)


def linear_runs(program: Program) -> Iterator[tuple[str, ...]]:
    """Weights of linears that follow each other and read the same buffer: q, k and v; gate and up."""
    run: list[str] = []
    source = ""
    for op in program.ops:
        if isinstance(op, Linear) and (not run or op.x == source):
            run.append(op.weight)
            source = op.x
            continue
        if run:
            yield tuple(run)
        run = [op.weight] if isinstance(op, Linear) else []
        source = op.x if isinstance(op, Linear) else ""
    if run:
        yield tuple(run)


def unbroken_stages(program: Program) -> int:
    """Stages of the cpu backend's thread pool in a step whose runs of linears are all unbroken: one for each
    run, attention and the logits, and one for what is done token by token before each of them."""
    stages = 0
    before: AnyOp | None = None
    for op in program.ops:
        joins = isinstance(op, Linear | Logits) and type(op) is type(before) and op.x == before.x
        if isinstance(op, Linear | Attention | Logits) and not joins:
            stages += 2
        before = op
    return stages


def stages_us(program: Program, tokens: int, measured: Measured) -> float:
    """Microseconds of the cpu backend's stages beside their work, with every run of linears unbroken. Half of
    them go token by token, each a unit that a thread takes up."""
    stages = unbroken_stages(program)
    return stages * measured.stage_us + stages // 2 * (tokens - 1) * measured.unit_us


def odd_heads(program: Program) -> int:
    """Heads a token that are no whole vectors, each time one is rotated or its key or value appended."""
    count = 0
    for op in program.ops:
        match op:
            case Rope() if program.tensors[op.inv_freq].cols % TILE:
                count += program.buffers[op.x] // op.head_dim
            case KvAppend() if program.cache[op.layer].head_dim % TILE:
                count += 2 * program.cache[op.layer].kv_heads
            case _:
                pass
    return count


def values_per_token(program: Program) -> int:
    """Values that the ops between the products read, a token: norms, rotations, activations, sums, appends;
    and the inputs of products, which are quantized."""
    total = sum(program.buffers[program_input(run, program)] for run in linear_runs(program))
    for op in program.ops:
        match op:
            case Norm() | Rope():
                total += program.buffers[op.x]
            case Activation():
                total += program.buffers[op.x] * (1 if op.up is None else 2)
            case Add():
                total += 2 * program.buffers[op.a]
            case KvAppend():
                total += program.buffers[op.k] + program.buffers[op.v]
            case _:
                pass
    return total


def program_input(run: Sequence[str], program: Program) -> str:
    """The buffer that a run of linears reads."""
    return next(op.x for op in program.ops if isinstance(op, Linear) and op.weight == run[0])


def _own_columns(fmt: str) -> bool:
    """Whether each tensor leaves columns of its own out of the codes (LLM.int8()'s outliers)."""
    return get_format(fmt).plane("index") is not None


def _quantizes(fmt: str) -> bool:
    """Whether the cpu kernels multiply this format with int8 activations."""
    return cpu_packing(fmt) == "n16k4"


def _rate(format_name: str, mode: PowerMode) -> float:
    """Operations per second of products with this weight format: integers meet int8 activations."""
    compute = mode.compute
    if get_format(format_name).kind == "int":
        return compute.int8 * 1e12
    if format_name.startswith("fp8"):
        return (compute.fp8 or compute.fp16) * 1e12
    return compute.fp16 * 1e12
