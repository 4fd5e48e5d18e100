"""Device memory of a part on the cuda backend, to the byte: the planner adds it up, the backend lays it out."""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.engine import device_code as code
from edge_runtime.engine.launches import AttentionLaunch, Lowered
from edge_runtime.engine.layout import lay_out, round_up
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.plan import MAX_DRAFT_LENGTH, KvPlan, StepShape, TensorPlan
from edge_runtime.engine.program import Program

COUNTS = 16  # EDGE_COUNTS
STEP_ARRAYS = ("tokens", "positions", "sequence", "places", "parents", "bends")  # (step.tokens) each
SPLIT_TOKENS = 8  # steps of so many tokens attend in chunks of the context


def table_width(program: Program, kv: KvPlan, step: StepShape) -> int:
    """Pages of a sequence of the longest context: columns of the page tables."""
    return -(-min(step.context, program.max_context) // kv.page_tokens)


def step_layout(program: Program, kv: KvPlan, step: StepShape) -> tuple[dict[str, int], int]:
    """Where the arrays of the step's record lie, in int32 items, and its length: counts, arrays of tokens,
    logit rows, then page tables, which are uploaded for themselves."""
    at, offsets = 0, {}
    sizes = {"counts": COUNTS, **dict.fromkeys(STEP_ARRAYS, step.tokens), "logit_rows": step.logits}
    sizes["page_tables"] = step.sequences * table_width(program, kv, step)
    for name, items in sizes.items():
        offsets[name] = at
        at += -(-items // COUNTS) * COUNTS
    return offsets, at


def device_regions(program: Program, lowered: Lowered, kv: KvPlan, step: StepShape) -> dict[str, int]:
    """Bytes of each region beside weights and KV pages.

    step: the record of the running step. answer: its status, then the likeliest token of each logit row.
    codes/scales/sums: inputs of the running linears, for whole tiles of tokens. partial: of attention split
    over the context. keys, top: of the search for the likeliest. history: of chains.
    """
    rows = max(step.tokens, step.logits)
    tokens = -(-rows // code.TILE_TOKENS) * code.TILE_TOKENS
    codes = scales = 0
    for kind, columns in lowered.inputs.items():
        codes = max(codes, columns * (1 if kind.startswith("int") else 2))
        scales = max(scales, columns // int(kind[3:]) if kind.startswith("int") else 1)
    partial = max(
        (
            code.partial_floats(launch.op, min(step.context, program.max_context))
            for launch in lowered.launches
            if isinstance(launch, AttentionLaunch)
        ),
        default=0,
    )
    freqs = sum(program.tensors[name].cols for name, _ in lowered.tables)
    _, record = step_layout(program, kv, step)
    regions = {
        "step": 4 * record,
        "answer": 4 * (1 + step.logits),
        "codes": tokens * codes,
        "scales": tokens * scales * 4,
        "sums": tokens * scales * 4,
        "angles": step.tokens * 2 * freqs * 4,
        "partial": min(step.tokens, SPLIT_TOKENS) * partial * 4,
        "inputs": 4 * step.tokens * (program.input_width or 0),
        "rows": step.logits * program.hidden_width * 4,
        "logits": step.logits * program.vocab_size * 4,
        "keys": 8 * step.logits * code.TOP * code.sample_slices(program.vocab_size),
        "top": 2 * 4 * step.logits * code.TOP,
        "history": 4 * MAX_DRAFT_LENGTH * step.logits,
        "move": 4 * (2 * step.context + table_width(program, kv, step)),
        "buffers": lay_out(program, step).nbytes,
    }
    return {name: round_up(n) for name, n in regions.items() if n}


def device_scratch_nbytes(
    program: Program, tensors: Mapping[str, TensorPlan], kv: KvPlan, step: StepShape
) -> int:
    """Bytes of buffers and scratch of a part. Raises Unsupported for what the backend has no kernel for."""
    lowered = lower(program, {name: t.format for name, t in tensors.items()}, kv)
    return sum(device_regions(program, lowered, kv, step).values())
