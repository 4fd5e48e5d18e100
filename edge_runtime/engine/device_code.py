"""Which kernels an engine's device code holds, and the source text that makes them.

A kernel is an instance of a template of kernels/cuda, named after its arguments. The builder compiles the
instances that the programs of an engine need; the backend launches them by the same names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from edge_runtime.engine import mma_order
from edge_runtime.engine.formats import FORMATS, Format, get_format
from edge_runtime.errors import Unsupported

SPLIT_THREADS, TILE_THREADS, ROW_THREADS = 256, 128, 256
SPLIT_BLOCKS = (1, 2, 4)  # blocks of 8 tokens that linear_split takes at once; more tokens go to linear_tile
TOKEN_BLOCK = 8
TILE_TOKENS = 64  # of a block of linear_tile
INPUT_GROUP = 64  # columns with one input scale where integer weights have none of their own

_CODES = {
    "u4": "kInt4",
    "u4o8": "kInt4Offset",
    "i8": "kInt8",
    "f16": "kHalf",
    "bf16": "kBfloat",
    "e4m3": "kE4m3",
    "e5m2": "kE5m2",
    "nf4": "kNf4",
    "e2m1": "kE2m1",
}
_INTEGERS = ("u4", "u4o8", "i8")


@dataclass(frozen=True, slots=True)
class Kernel:
    """One instance: its name in the device code, header, record and function of kernels/cuda, block size."""

    symbol: str
    header: str
    args: str
    call: str
    threads: int


@dataclass(frozen=True, slots=True)
class MatrixKernels:
    """How matrices of a format are multiplied.

    kind: what their inputs are made into, "int32" … "int128" (int8 in groups of so many), "half" or "bfloat".
    unit: columns taken at once. tile_panels: panels of 16 rows of a block of `tile`. split: by blocks of
    tokens.
    """

    kind: str
    unit: int
    tile_panels: int
    split: dict[int, Kernel]
    tile: Kernel
    embed: Kernel


def has_kernels(name: str) -> bool:
    """Whether the cuda backend multiplies with matrices of this format."""
    return name in FORMATS and mma_order.has_order(FORMATS[name])


def matrix_kernels(name: str) -> MatrixKernels:
    """The kernels of a weight format. Raises Unsupported for one that has none."""
    if not has_kernels(name):
        usable = ", ".join(sorted(f for f in FORMATS if has_kernels(f)))
        raise Unsupported(f"the cuda backend has no kernel for format {name!r}; it has: {usable}")
    fmt = get_format(name)
    code = fmt.codes[0].encoding
    integer = code in _INTEGERS
    scale = _scale(fmt)
    group = fmt.group or INPUT_GROUP
    grouped = scale in ("kHalf", "kFloat", "kDouble", "kE8m0")
    unit = max(group, mma_order.UNIT)
    weights = f"edge::Weights<edge::Code::{_CODES[code]}, edge::Scale::{scale}, {group}>"
    kind = f"int{group}" if integer else "bfloat" if code == "bf16" else "half"
    wide = unit == mma_order.UNIT and (group == mma_order.UNIT or not grouped)  # Weights::kTilePanels
    return MatrixKernels(
        kind=kind,
        unit=unit,
        tile_panels=8 if wide else 4,
        split={
            n: Kernel(
                f"linear_split{n}_{name}",
                "linear.cuh",
                "EdgeLinear",
                f"edge::linear_split<{weights}, {n}>",
                SPLIT_THREADS,
            )
            for n in SPLIT_BLOCKS
        },
        tile=Kernel(
            f"linear_tile_{name}", "linear.cuh", "EdgeLinear", f"edge::linear_tile<{weights}>", TILE_THREADS
        ),
        embed=Kernel(f"embed_{name}", "linear.cuh", "EdgeEmbed", f"edge::embed<{weights}>", ROW_THREADS),
    )


def source(kernels: Iterable[Kernel]) -> str:
    """The translation unit that has these kernels, each once, in order of their names."""
    found = {kernel.symbol: kernel for kernel in kernels}
    headers = sorted({kernel.header for kernel in found.values()})
    lines = [f'#include "{header}"' for header in headers]
    lines += [f"EDGE_KERNEL({k.symbol}, {k.threads}, {k.args}, {k.call})" for _, k in sorted(found.items())]
    return "\n".join(lines) + "\n"


def _scale(fmt: Format) -> str:
    """The name of formats.cuh for what a scale of the format covers and how it is stored."""
    plane = fmt.plane("scale")
    if plane is None:
        return "kNone"
    if plane.per in ("row", "tensor"):
        return "kRow" if plane.per == "row" else "kTensor"
    stored = {"f16": "kHalf", "f32": "kFloat", "dynamic8": "kDouble", "e8m0": "kE8m0", "e4m3": "kFolded"}
    return stored[plane.encoding]
