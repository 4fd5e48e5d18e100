"""Device memory of a part on cuda to the byte: the planner adds it up, the backend lays it out."""

from __future__ import annotations

from edge_runtime.engine import device_code as code
from edge_runtime.engine.angles import angle_tables
from edge_runtime.engine.device_code import padded_columns
from edge_runtime.engine.layout import lay_out, round_up
from edge_runtime.engine.ops import Attention, Linear, Logits
from edge_runtime.engine.plan import MAX_DRAFT_LENGTH, KvPlan, StepShape
from edge_runtime.engine.program import Program

INPUT_BYTES = 2  # of an input of a linear at most: f16
SMALLEST_GROUP = 16  # of inputs with one scale
COUNTS = 16  # EDGE_COUNTS
STEP_ARRAYS = ("tokens", "positions", "sequence", "places", "parents", "bends")  # (step.tokens) each
SPLIT_TOKENS = 8  # steps of so many tokens attend in chunks of the context


def table_width(program: Program, kv: KvPlan, step: StepShape) -> int:
    """Pages of a sequence of the longest context: columns of the page tables."""
    return -(-min(step.context, program.max_context) // kv.page_tokens)


def step_layout(program: Program, kv: KvPlan, step: StepShape) -> tuple[dict[str, int], int]:
    """Where the arrays of the step's record lie, in int32 items, and its length: counts, arrays of tokens,
    logit rows, addresses of adapters, two items each, then page tables, which are uploaded alone."""
    at, offsets = 0, {}
    sizes = {"counts": COUNTS, **dict.fromkeys(STEP_ARRAYS, step.tokens), "logit_rows": step.logits}
    sizes["adapters"] = 2 * step.sequences
    sizes["page_tables"] = step.sequences * table_width(program, kv, step)
    for name, items in sizes.items():
        offsets[name] = at
        at += -(-items // COUNTS) * COUNTS
    return offsets, at


def device_regions(program: Program, kv: KvPlan, step: StepShape) -> dict[str, int]:
    """Bytes of each region beside weights and KV pages, the same for every choice of weight formats.

    step: the record of the running step. answer: its status, then the likeliest token of each logit row.
    codes/scales/sums: inputs of the running linears, for whole tiles of tokens. partial: of attention split
    over the context. keys, top: of the search for the likeliest. history: of chains.
    """
    rows = max(step.tokens, step.logits)
    tokens = -(-rows // code.TILE_TOKENS) * code.TILE_TOKENS
    columns = max(
        padded_columns(program.tensors[op.weight].cols)
        for op in program.ops
        if isinstance(op, Linear | Logits)
    )
    partial = max(
        (
            code.partial_floats(op, min(step.context, program.max_context))
            for op in program.ops
            if isinstance(op, Attention)
        ),
        default=0,
    )
    freqs = sum(angle_tables(program).values())
    _, record = step_layout(program, kv, step)
    regions = {
        "step": 4 * record,
        "answer": 4 * (1 + step.logits),
        "codes": tokens * columns * INPUT_BYTES,
        "scales": tokens * columns // SMALLEST_GROUP * 4,
        "sums": tokens * columns // SMALLEST_GROUP * 4,
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


def device_scratch_nbytes(program: Program, kv: KvPlan, step: StepShape) -> int:
    """Bytes of buffers and scratch of a part."""
    return sum(device_regions(program, kv, step).values())
