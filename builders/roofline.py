"""Predicted speed: a roofline over the bytes and operations of a step, for a profile's power mode.

time = max(bytes / (bandwidth x efficiency), operations / (rate x efficiency)) + launches x overhead
(Williams, Waterman & Patterson 2009). The efficiencies are the profile's, measured where it says so.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import row_nbytes
from edge_runtime.engine.ops import Attention, Embed, Linear, Logits
from edge_runtime.engine.packing import packed_nbytes
from edge_runtime.engine.plan import KvPlan, Prediction, StepShape, TensorPlan
from edge_runtime.engine.profile import PowerMode, Profile
from edge_runtime.engine.program import Program

PROMPT_TOKENS = 512


def predict(
    program: Program,
    tensors: Mapping[str, TensorPlan],
    kv: KvPlan,
    step: StepShape,
    profile: Profile,
    mode: PowerMode,
) -> Prediction:
    """Decode rate of one sequence at half the context, and the time to the first token of a prompt.

    The prompt has min(512, context) tokens, taken in chunks of `step.tokens`; each chunk reads all weights.
    """
    bandwidth = mode.bandwidth_gbps * 1e9 * profile.efficiency.bandwidth
    overhead = len(program.ops) * profile.efficiency.launch_overhead_us * 1e-6

    def seconds(tokens: int, before: int, with_head: bool) -> float:
        """One step of `tokens` tokens of a sequence that already holds `before`."""
        read, compute = 0.0, 0.0
        for op in program.ops:
            match op:
                case Linear() | Logits():
                    if isinstance(op, Logits) and not with_head:
                        continue
                    spec, plan = program.tensors[op.weight], tensors[op.weight]
                    rows = 1 if isinstance(op, Logits) else tokens
                    read += packed_nbytes(plan.format, plan.packing, spec.rows, spec.cols)
                    compute += 2.0 * spec.size * rows / _rate(plan.format, mode)
                case Embed():
                    spec = program.tensors[op.weight]
                    read += tokens * get_format(tensors[op.weight].format).nbytes(1, spec.cols)
                case Attention():
                    seen = before + (tokens + 1) / 2  # mean number of keys that a token of the step sees
                    seen = min(seen, op.window) if op.window else seen
                    reach = min(before + tokens, op.window + tokens - 1) if op.window else before + tokens
                    row = sum(row_nbytes(f, op.head_dim, kv.page_tokens) for f in (kv.k, kv.v))
                    read += reach * op.kv_heads * row
                    compute += 4.0 * op.heads * op.head_dim * seen * tokens / (mode.compute.fp16 * 1e12)
        return max(read / bandwidth, compute / profile.efficiency.compute) + overhead

    prompt = min(PROMPT_TOKENS, step.context)
    first = sum(
        seconds(min(step.tokens, prompt - done), done, done + step.tokens >= prompt)
        for done in range(0, prompt, step.tokens)
    )
    return Prediction(
        decode_tokens_per_s=1.0 / seconds(1, step.context // 2, True),
        first_token_ms=1e3 * first,
        prompt_tokens=prompt,
    )


def _rate(format_name: str, mode: PowerMode) -> float:
    """Operations per second of products with this weight format: integers meet int8 activations."""
    compute = mode.compute
    if get_format(format_name).kind == "int":
        return compute.int8 * 1e12
    if format_name.startswith("fp8"):
        return (compute.fp8 or compute.fp16) * 1e12
    return compute.fp16 * 1e12
