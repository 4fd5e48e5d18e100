"""The one function that adds up what an engine needs; the planner and the loader both call it.

Weights, KV arena and buffers follow from the program and the plan to the byte. Scratch is what a backend
needs beside the layout: here of the cpu backend, for a given number of threads, which allocates exactly this;
of the cuda backend in device_memory.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from edge_runtime.engine.adapter import updatable
from edge_runtime.engine.angles import angle_tables
from edge_runtime.engine.device_code import RANK_PANEL, RANK_UNIT
from edge_runtime.engine.device_memory import device_scratch_nbytes
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.layout import lay_out, round_up
from edge_runtime.engine.ops import Attention, Linear, Logits
from edge_runtime.engine.packing import packed_nbytes
from edge_runtime.engine.plan import KvPlan, MemoryPlan, StepShape, TensorPlan
from edge_runtime.engine.program import Program
from edge_runtime.errors import DoesNotFit

SMALLEST_GROUP = 16  # activations are quantized per group; the smallest group needs most scales
GREATEST_GROUP = 128  # columns are padded to whole groups
TILE = 16  # keys decoded at a time
RANK_ROWS = 8  # rows of an adapter's A that are computed together
ADAPTER_RECORD = 32  # bytes of EdgeAdapter, and of EdgeUpdate
ATTENTION_TOKENS = 4  # tokens of a sequence that attend together


def weights_nbytes(program: Program, tensors: Mapping[str, TensorPlan]) -> int:
    """Bytes of all planes as stored, each rounded up to 64."""
    return sum(
        packed_nbytes(t.format, t.packing, program.tensors[name].rows, program.tensors[name].cols)
        for name, t in tensors.items()
    )


def padded_cols(program: Program) -> int:
    """Columns of the widest matrix, padded to whole groups of any format: bytes of one token's int8 codes."""
    cols = max(program.tensors[op.weight].cols for op in program.ops if isinstance(op, Linear | Logits))
    return -(-cols // GREATEST_GROUP) * GREATEST_GROUP


def attention_floats(heads_per_kv: int, head_dim: int) -> int:
    """f32 values one thread needs to attend: two tiles of 16 rows; and query, sum, shares, softmax lanes and
    maximum of each query of a block of tokens. `edge_cpu_attention_floats` of kernels/cpu agrees (tested).
    """
    stride = -(-head_dim // TILE) * TILE
    queries = heads_per_kv * ATTENTION_TOKENS
    return -(-(2 * TILE * stride + queries * (2 * stride + 2 * TILE + 1)) // TILE) * TILE


def low_rank_layout(program: Program, ranks: Mapping[str, int]) -> tuple[dict[int, int], int]:
    """Where A x of each updated op lies in a token's row of an adapter's scratch, and the row's f32 values.

    Linears, or blocks of logits, that follow each other and read the same buffer run together, so each has
    its own place. `ranks`: tensor -> rank; the offsets are by index of the op.
    """
    offsets: dict[int, int] = {}
    before: Linear | Logits | None = None
    at = stride = 0
    for i, op in enumerate(program.ops):
        joins = isinstance(op, Linear | Logits) and type(op) is type(before) and op.x == before.x
        at = at if joins else 0
        before = op if isinstance(op, Linear | Logits) else None
        if isinstance(op, Linear | Logits) and op.weight in ranks:
            offsets[i] = at
            at += -(-ranks[op.weight] // RANK_ROWS) * RANK_ROWS
            stride = max(stride, at)
    return offsets, stride


def device_adapter_regions(program: Program, step: StepShape, ranks: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each region of an adapter on the cuda backend: its records (edge_cuda.h: EdgeAdapter), A and B
    padded to what kernels/cuda/low_rank.cuh reads at once, and A x of a step."""
    regions = {"records": ADAPTER_RECORD * (1 + len(updatable(program)))}
    for name, rank in ranks.items():
        spec, padded = program.tensors[name], _up(rank, RANK_UNIT)
        regions[f"{name}.a"] = 2 * padded * _up(spec.cols, RANK_UNIT)
        regions[f"{name}.b"] = 2 * padded * _up(spec.rows, RANK_PANEL)
    _, stride = low_rank_layout(program, ranks)
    regions["u"] = max(step.tokens, step.logits) * stride * 4
    return {name: round_up(nbytes) for name, nbytes in regions.items()}


def _up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def adapter_nbytes(
    program: Program, step: StepShape, ranks: Mapping[str, int], *, backend: str = "cpu"
) -> int:
    """Bytes that a backend takes for a low-rank adapter: A and B padded, and A x of a step."""
    if backend == "cuda":
        return sum(device_adapter_regions(program, step, ranks).values())
    total = 0
    for name, rank in ranks.items():
        spec = program.tensors[name]
        a = -(-rank // RANK_ROWS) * RANK_ROWS * (-(-spec.cols // TILE) * TILE)
        b = rank * (-(-spec.rows // TILE) * TILE)
        total += round_up(2 * a) + round_up(2 * b)
    _, stride = low_rank_layout(program, ranks)
    return total + round_up(max(step.tokens, step.logits) * stride * 4)


def scratch_regions(program: Program, step: StepShape, threads: int) -> dict[str, int]:
    """Bytes of each scratch region of a step, each rounded up to 64.

    codes/scales/sums: activations of one linear, quantized per token and group; attention: tiles and sums of
    each thread; angles: cosines and sines of the step's positions; rows: the inputs of the logits op; logits:
    its outputs.
    """
    padded = padded_cols(program)
    attention = (
        attention_floats(op.heads // op.kv_heads, op.head_dim)
        for op in program.ops
        if isinstance(op, Attention)
    )
    tokens = max(step.tokens, step.logits)
    regions = {
        "codes": tokens * padded,
        "scales": tokens * (padded // SMALLEST_GROUP) * 4,
        "sums": tokens * (padded // SMALLEST_GROUP) * 4,
        "attention": threads * max(attention, default=0) * 4,
        "angles": step.tokens * 2 * sum(angle_tables(program).values()) * 4,
        "rows": step.logits * program.hidden_width * 4,
        "logits": step.logits * program.vocab_size * 4,
    }
    return {name: round_up(n) for name, n in regions.items()}


def scratch_nbytes(program: Program, step: StepShape, threads: int) -> int:
    """Bytes of scratch in all."""
    return sum(scratch_regions(program, step, threads).values())


def buffers_nbytes(
    program: Program, kv: KvPlan, step: StepShape, *, threads: int, backend: str = "cpu"
) -> int:
    """Activation buffers and scratch: everything a step writes except the KV cache."""
    if backend == "cuda":
        return device_scratch_nbytes(program, kv, step)
    return lay_out(program, step).nbytes + scratch_nbytes(program, step, threads)


def part_nbytes(
    program: Program,
    tensors: Mapping[str, TensorPlan],
    kv: KvPlan,
    step: StepShape,
    *,
    threads: int,
    backend: str = "cpu",
) -> int:
    """Bytes of a part that is loaded beside the language part: weights, KV cache and buffers."""
    buffers = buffers_nbytes(program, kv, step, threads=threads, backend=backend)
    return weights_nbytes(program, tensors) + cache_nbytes(program, kv, step) + buffers


def adapter_planes(rank: int, rows: int, cols: int) -> dict[str, int]:
    """Bytes of the f16 planes of an update of a (rows, cols) matrix: a (rank, cols) and b (rows, rank)."""
    return {"a": 2 * rank * cols, "b": 2 * rows * rank}


def stored_adapter_nbytes(program: Program, ranks: Mapping[str, int]) -> int:
    """Bytes of an adapter as stored, each plane rounded up to 64; `ranks`: tensor -> rank of its update."""
    specs = {name: program.tensors[name] for name in ranks}
    sizes = (n for name, s in specs.items() for n in adapter_planes(ranks[name], s.rows, s.cols).values())
    return sum(round_up(n) for n in sizes)


def memory_plan(
    program: Program,
    tensors: Mapping[str, TensorPlan],
    kv: KvPlan,
    step: StepShape,
    *,
    threads: int,
    total: int,
    reserve: int,
    context: int = 0,
    device_code: int = 0,
    draft: int = 0,
    adapters: int = 0,
    backend: str = "cpu",
) -> MemoryPlan:
    """Add everything up. `total`, `reserve` and `context` (bytes) come from the profile or the probe; `draft`
    is the sum of `part_nbytes` of the draft and the Medusa heads, `adapters` that of `adapter_nbytes`."""
    return MemoryPlan(
        weights=weights_nbytes(program, tensors),
        kv=cache_nbytes(program, kv, step),
        buffers=buffers_nbytes(program, kv, step, threads=threads, backend=backend),
        draft=draft,
        adapters=adapters,
        device_code=device_code,
        context=context,
        reserve=reserve,
        total=total,
    )


def check_fits(plan: MemoryPlan, have: int, source: str) -> None:
    """Raise DoesNotFit when the plan needs more than `have` bytes; `source` says whose figure that is."""
    if plan.need > have:
        parts = {
            "weights": plan.weights,
            "KV cache": plan.kv,
            "buffers": plan.buffers,
            "draft": plan.draft,
            "adapters": plan.adapters,
            "device code": plan.device_code,
            "device context": plan.context,
        }
        detail = ", ".join(f"{name} {_mib(n)}" for name, n in parts.items() if n)
        raise DoesNotFit(
            f"the engine needs {_mib(plan.need)} ({detail}) but {source} gives {_mib(have)}; "
            "use a smaller format, a shorter context or a smaller KV format",
            need=plan.need,
            have=have,
            source=source,
        )


def _mib(n: int) -> str:
    return f"{n / 2**20:.1f} MiB"
