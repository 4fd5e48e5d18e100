"""Which kernels an engine's device code holds, and the source text that makes them.

A kernel is an instance of a template of kernels/cuda, named after its arguments. The builder compiles the
instances that the programs of an engine need; the backend launches them by the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from edge_runtime.engine import mma_order
from edge_runtime.engine.formats import FORMATS, Format, get_format
from edge_runtime.engine.ops import Attention
from edge_runtime.engine.plan import KvPlan
from edge_runtime.errors import Unsupported

SPLIT_THREADS, TILE_THREADS, ROW_THREADS = 256, 128, 256
WARP = 32
ATTENTION_THREADS = 128
FRAGMENT = 16  # queries of a fragment
SLICE = 4096  # EDGE_SLICE: logits that one block looks at
TOP = 72  # EDGE_TOP_MAX: likeliest tokens of a row that the device finds
SPLIT_BLOCKS = (1, 2, 4)  # blocks of 8 tokens that linear_split takes at once; more tokens go to linear_tile
TOKEN_BLOCK = 8
TILE_TOKENS = 64  # of a block of linear_tile
INPUT_COLUMNS = 128  # inputs of linears are padded to a multiple of it
INPUT_GROUP = 64  # columns with one input scale where integer weights have none of their own
RANK_UNIT = 8  # kRankUnit: ranks of adapters are padded to it
RANK_PANEL = 32  # kRankPanel: rows of an adapter's B that lie together
RANK_TOKENS = 4  # kLowRankTokens: rows of a block

CACHES = ("f16", "int8", "int4", "fp8")  # KV formats that have kernels
CHUNK = 256  # EDGE_ATTENTION_CHUNK: positions whose keys are summed up by themselves

# Names of code_planes.cuh by the encodings of a format's planes of codes
_CODES = {
    "u2": "kInt2",
    "u2o2": "kInt2Offset",
    "u2 u1": "kInt3",
    "u2o4 u1": "kInt3Offset",
    "u4": "kInt4",
    "u4o8": "kInt4Offset",
    "u4 u1": "kInt5",
    "u4o16 u1": "kInt5Offset",
    "u4o32 u2": "kInt6Offset",
    "i8": "kInt8",
    "f16": "kHalf",
    "bf16": "kBfloat",
    "e4m3": "kE4m3",
    "e5m2": "kE5m2",
    "nf4": "kNf4",
    "e2m1": "kE2m1",
}


@dataclass(frozen=True, slots=True)
class Kernel:
    """One instance: its name in the device code, header, record and function of kernels/cuda, block size.

    early: it waits by itself for the launch before it, and has something to do until then.
    """

    symbol: str
    header: str
    args: str
    call: str
    threads: int
    early: bool = False


@dataclass(frozen=True, slots=True)
class MatrixKernels:
    """How matrices of a format are multiplied.

    kind: what their inputs are made into, "int32" … "int128" (int8 in groups of so many), "half" or "bfloat".
    unit: columns taken at once. tile_panels: panels of 16 rows of a block of `tile`. split: by blocks of
    tokens; deep: for one block, with more weights on their way. All give the same numbers.
    """

    kind: str
    unit: int
    tile_panels: int
    split: dict[int, Kernel]
    deep: Kernel
    tile: Kernel
    embed: Kernel


def has_kernels(name: str) -> bool:
    """Whether the cuda backend multiplies with matrices of this format."""
    return name in FORMATS and mma_order.has_order(FORMATS[name])


@lru_cache(maxsize=64)
def matrix_kernels(name: str) -> MatrixKernels:
    """The kernels of a weight format. Raises Unsupported for one that has none."""
    if not has_kernels(name):
        usable = ", ".join(sorted(f for f in FORMATS if has_kernels(f)))
        outliers = name in FORMATS and FORMATS[name].plane("outlier") is not None
        why = " (its columns of f16 want inputs that are not int8)" if outliers else ""
        raise Unsupported(f"the cuda backend has no kernel for format {name!r}{why}; it has: {usable}")
    fmt = get_format(name)
    code = _CODES[" ".join(plane.encoding for plane in fmt.codes)]
    scale = _scale(fmt)
    group = fmt.group or INPUT_GROUP
    grouped = scale not in ("kNone", "kRow", "kTensor", "kFolded")
    unit = max(group, mma_order.UNIT)
    weights = f"edge::Weights<edge::Code::{code}, edge::Scale::{scale}, {group}>"
    kind = f"int{group}" if code.startswith("kInt") else "bfloat" if code == "kBfloat" else "half"
    # What registers hold: panels of a warp of `tile`; units that are on their way in `split`
    panels = 4 if unit == mma_order.UNIT and (group == mma_order.UNIT or not grouped) else 2
    ahead = 2 if code in ("kHalf", "kBfloat") or unit > mma_order.UNIT else 4
    crowded = kind == "int16" or "Shift" in scale  # many shares beside the codes

    def split(symbol: str, blocks: int, units: int) -> Kernel:
        call = f"edge::linear_split<{weights}, {blocks}, {units}>"
        return Kernel(symbol, "linear.cuh", "EdgeLinear", call, SPLIT_THREADS, early=True)

    return MatrixKernels(
        kind=kind,
        unit=unit,
        tile_panels=2 * panels,
        split={
            n: split(f"linear_split{n}_{name}", n, ahead // 2 if crowded and n == 4 else ahead)
            for n in SPLIT_BLOCKS
        },
        deep=split(f"linear_deep_{name}", 1, 2 * ahead),
        tile=Kernel(
            f"linear_tile_{name}",
            "linear.cuh",
            "EdgeLinear",
            f"edge::linear_tile<{weights}, {panels}>",
            TILE_THREADS,
        ),
        embed=Kernel(f"embed_{name}", "linear.cuh", "EdgeEmbed", f"edge::embed<{weights}>", ROW_THREADS),
    )


def padded_columns(cols: int) -> int:
    """Columns of a token's inputs."""
    return -(-cols // INPUT_COLUMNS) * INPUT_COLUMNS


def prepare_kernel(source: str, kind: str, width: int) -> Kernel:
    """Rows made into inputs of linears: `source` is plain, rms, layer, an activation or gated_ with one."""
    if source == "plain":
        rows = "edge::PlainRows"
    elif source in ("rms", "layer"):
        rows = f"edge::NormRows<{_bool(source == 'layer')}>"
    else:
        rows = f"edge::ActivatedRows<{_activation(source)}>"
    inputs = f"IntInputs<{kind[3:]}>" if kind.startswith("int") else f"{kind.capitalize()}Inputs"
    kept = 1 if shares_rows(source, kind) else _kept(width, ROW_THREADS)
    call = f"edge::prepare<{rows}, edge::{inputs}, {kept}, {_whole(width)}>"
    name = f"prepare_{source}_{kind}_{kept}_{_whole(width)}"
    return Kernel(name, "prepare.cuh", "EdgePrepare", call, ROW_THREADS, early=True)


def shares_rows(source: str, kind: str) -> bool:
    """Whether blocks may share a row of `prepare_kernel`, where nothing is needed of the whole row."""
    return source not in ("rms", "layer") and kind != "half"


def norm_kernel(kind: str, group: int) -> Kernel:
    """Norm of runs of `group` values, kind rms or layer."""
    threads = run_threads(group)
    kept = _kept(group, threads)
    call = f"edge::norm<{_bool(kind == 'layer')}, {threads}, {kept}, {_whole(group)}>"
    return _rows(f"norm_{kind}_{threads}_{kept}_{_whole(group)}", call, early=True)


def round_kernel(form: str, width: int) -> Kernel:
    """Rows rounded to fp8_e4m3 or int8."""
    threads = run_threads(width)
    kept = _kept(width, threads)
    call = f"edge::round_rows<{_bool(form == 'fp8_e4m3')}, {threads}, {kept}, {_whole(width)}>"
    return _rows(f"round_{form}_{threads}_{kept}_{_whole(width)}", call)


def run_threads(length: int) -> int:
    """Threads that share a run of so many values: a warp, or a block."""
    return WARP if length <= 8 * 4 * WARP else ROW_THREADS


def activation_kernel(name: str) -> Kernel:
    """An activation, or gated_ with one."""
    return _rows(f"activate_{name}", f"edge::activate_rows<{_activation(name)}>")


def add_kernel() -> Kernel:
    return _rows("add", "edge::add")


def gather_kernel() -> Kernel:
    return _rows("gather", "edge::gather")


def input_kernel() -> Kernel:
    return _rows("input", "edge::input")


def low_rank_kernels() -> tuple[Kernel, Kernel]:
    """Updates of adapters: u = A x before a product's launch, B u added after it."""
    names = ("low_rank_in", "low_rank_out")
    into, out = (Kernel(n, "low_rank.cuh", "EdgeLowRank", f"edge::{n}", ROW_THREADS) for n in names)
    return into, out


def low_rank_grids(
    matrices: int, panels: int, rows: int
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Of both kernels, for so many rows; where they are few, more blocks share the rows of an A."""
    tokens = -(-rows // RANK_TOKENS)
    return (16 if rows <= TOKEN_BLOCK else 4, matrices, tokens), (-(-panels * WARP // ROW_THREADS), tokens, 1)


def sample_kernels() -> tuple[Kernel, Kernel, Kernel]:
    """What ends a step: logits finished in slices, tokens picked, a chain's next step."""
    names = ("finish_logits", "pick_tokens", "advance")
    finish, pick, advance = (Kernel(n, "sample.cuh", "EdgeSample", f"edge::{n}", ROW_THREADS) for n in names)
    return finish, pick, advance


def sample_slices(vocab: int) -> int:
    """Blocks that look at a row of logits."""
    return -(-vocab // SLICE)


def angles_kernel() -> Kernel:
    """Cosines and sines of the step's positions."""
    return Kernel("angles", "rope_append.cuh", "EdgeAngles", "edge::angles", ATTENTION_THREADS)


def append_kernel(kv: KvPlan, head_dim: int) -> Kernel:
    """Rotation of q and k, and the store of k and v. Raises Unsupported for a KV format."""
    return Kernel(
        f"rope_append_{kv.k}_{kv.v}_{head_dim}",
        "rope_append.cuh",
        "EdgeRopeAppend",
        f"edge::rope_append<{_cache(kv.k)}, {_cache(kv.v)}, {head_dim}>",
        ATTENTION_THREADS,
    )


def rotate_kernel(head_dim: int) -> Kernel:
    """Rotation of heads in place, and nothing else."""
    call = f"edge::rope<{head_dim}>"
    return Kernel(f"rope_{head_dim}", "rope_append.cuh", "EdgeRopeAppend", call, ATTENTION_THREADS)


def move_kernel(kv: KvPlan, head_dim: int) -> Kernel:
    """Rows of a layer's cache moved. Raises Unsupported for a KV format."""
    call = f"edge::kv_move<{_cache(kv.k)}, {_cache(kv.v)}, {head_dim}>"
    return Kernel(f"kv_move_{kv.k}_{kv.v}_{head_dim}", "kv_move.cuh", "EdgeMove", call, WARP)


def angles_grid(tokens: int, freqs: int) -> tuple[int, int, int]:
    return -(-tokens * freqs // ATTENTION_THREADS), 1, 1


def heads_grid(tokens: int, heads: int) -> tuple[int, int, int]:
    """A warp for each head of each token."""
    return tokens, -(-heads // (ATTENTION_THREADS // WARP)), 1


def attention_kernels(op: Attention, kv: KvPlan) -> tuple[Kernel, Kernel, Kernel]:
    """Attention of a program's op over a cache: split, merge, looped. Raises Unsupported for a KV format."""
    share = op.heads // op.kv_heads
    capped = _bool(op.softcap is not None)

    def one(form: str, tiles: int) -> Kernel:
        args = f"{_cache(kv.k)}, {_cache(kv.v)}, {op.head_dim}, {tiles}, {capped}"
        return Kernel(
            f"attention_{form}_{kv.k}_{kv.v}_{op.head_dim}_{tiles}" + ("_capped" if op.softcap else ""),
            "attention.cuh",
            "EdgeAttention",
            f"edge::attention_{form}<{args}>",
            ATTENTION_THREADS,
        )

    merge = Kernel(
        f"attention_merge_{op.head_dim}",
        "attention.cuh",
        "EdgeAttention",
        f"edge::attention_merge<{op.head_dim}>",
        ATTENTION_THREADS,
    )
    return one("split", 1 if share <= FRAGMENT else 2), merge, one("looped", looped_tiles(op))


def looped_tiles(op: Attention) -> int:
    """Fragments of 16 queries of a warp in the looped form: two, where registers hold their sums."""
    return 2 if op.head_dim <= 128 else 1


def attention_chunks(context: int) -> int:
    """Chunks of a context."""
    return -(-context // CHUNK)


def partial_floats(op: Attention, context: int) -> int:
    """f32 values that a token's partial results of split attention take."""
    chunks = attention_chunks(context)
    return op.heads * (chunks * op.head_dim + (2 * chunks + 3) // 4 * 4)


def attention_grid(op: Attention, tokens: int, context: int | None) -> tuple[int, int, int]:
    """Of the split form for a longest context, or with None of the looped one."""
    share = op.heads // op.kv_heads
    tiles = looped_tiles(op) if context is None else 1 if share <= FRAGMENT else 2
    rows = FRAGMENT * tiles
    parts = -(-share // rows)
    warps = ATTENTION_THREADS // WARP
    if context is not None:
        return tokens * parts, op.kv_heads, -(-attention_chunks(context) // warps)
    most = max(1, rows // share)  # tokens of a warp
    return -(-tokens // (warps * most)) * most * parts, op.kv_heads, 1


def merge_grid(op: Attention, tokens: int) -> tuple[int, int, int]:
    return tokens, op.heads, 1


def _cache(name: str) -> str:
    """The name of kv_fragments.cuh for a KV format. Raises Unsupported."""
    if name not in CACHES:
        raise Unsupported(f"the cuda backend has no KV cache {name!r}; use {', '.join(CACHES)}")
    return f"edge::Kv{name.capitalize()}"


def _rows(symbol: str, call: str, *, early: bool = False) -> Kernel:
    return Kernel(symbol, "rows.cuh", "EdgeRow", call, ROW_THREADS, early=early)


def _kept(length: int, threads: int) -> int:
    """Vectors of four values of a row that a thread keeps in registers."""
    return min(8, -(-length // (4 * threads)))


def _whole(length: int) -> str:
    """Whether rows consist of whole vectors of four values."""
    return _bool(length % 4 == 0)


def _activation(name: str) -> str:
    kind = name.removeprefix("gated_")
    camel = "".join(word.capitalize() for word in kind.split("_"))
    return f"edge::Activation::k{camel}, {_bool(name != kind)}"


def _bool(value: bool) -> str:
    return "true" if value else "false"


def source(kernels: Iterable[Kernel]) -> str:
    """The translation unit that has these kernels, each once, in order of their names."""
    found = {kernel.symbol: kernel for kernel in kernels}
    headers = sorted({kernel.header for kernel in found.values()})
    lines = [f'#include "{header}"' for header in headers]
    lines += [
        f"EDGE_KERNEL{'_EARLY' if k.early else ''}({k.symbol}, {k.threads}, {k.args}, {k.call})"
        for _, k in sorted(found.items())
    ]
    return "\n".join(lines) + "\n"


def _scale(fmt: Format) -> str:
    """The name of formats.cuh for what a scale of the format covers and how it is stored."""
    names = {plane.name for plane in fmt.grid_planes}
    if "super_min" in names:
        return "kSuperShift" if "min" in names else "kSuperNibbles"
    plane = fmt.plane("scale")
    if plane is None:
        return "kNone"
    if plane.per in ("row", "tensor"):
        return "kRow" if plane.per == "row" else "kTensor"
    if "min" in names:
        return "kHalfShift"
    stored = {
        "f16": "kHalf",
        "f32": "kFloat",
        "dynamic8": "kDouble",
        "e8m0": "kE8m0",
        "e4m3": "kFolded",
        "i8": "kSuper",
    }
    return stored[plane.encoding]
