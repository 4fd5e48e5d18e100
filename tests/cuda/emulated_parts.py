"""Parts for the cuda backend on the fake GPU: random weights in its packing, and device code that it runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from fake_cuda import add_module, cubin

from edge_runtime.backends.cuda.backend import CudaBackend
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import DeviceCode, PackedTensor, Part
from edge_runtime.engine.device_code import source
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.launches import kernels_of
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry
from edge_runtime.engine.packing import cuda_packing, pack
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import Program

SM = 87


def packed(values: np.ndarray, fmt: str, packing: str) -> PackedTensor:
    rows, cols = values.shape
    return PackedTensor(
        rows, cols, fmt, packing, pack(fmt, packing, get_format(fmt).encode(values), rows, cols)
    )


def random_weights(program: Program, formats: Mapping[str, str], seed: int = 0) -> dict[str, PackedTensor]:
    """Matrices around zero; norm weights around one, inv_freq as Llama has it, orders a permutation."""
    rng = np.random.default_rng(seed)
    orders = {op.order for op in program.ops if type(op).__name__ == "Gather"}
    freqs = {op.inv_freq for op in program.ops if type(op).__name__ == "Rope"}
    found = {}
    for name, spec in program.tensors.items():
        values = rng.normal(0, spec.cols**-0.5, (spec.rows, spec.cols)).astype(np.float32)
        if name in orders:
            values = rng.permutation(spec.cols).astype(np.float32)[None]
        elif name in freqs:
            values = (10000.0 ** -(np.arange(spec.cols) / spec.cols)).astype(np.float32)[None]
        elif spec.role == "vector":
            values = (1 + 0.1 * values).astype(np.float32)
        fmt = formats.get(name, "f32")
        found[name] = packed(values, fmt, "rows" if spec.role == "vector" else cuda_packing(fmt))
    return found


def formats_for(program: Program, matrix: str, head: str = "int8_row") -> dict[str, str]:
    """Matrices in one format, embedding and head in another."""
    chosen = {"vector": "f32", "matrix": matrix}
    return {name: chosen.get(spec.role, head) for name, spec in program.tensors.items()}


def part_of(
    program: Program,
    weights: Mapping[str, PackedTensor],
    folder: Path | None = None,
    *,
    kv: str = "int8",
    tokens: int = 32,
    page_tokens: int = 16,
    pages: int = 24,
    sequences: int = 3,
) -> Part:
    """With device code for the fake GPU, whose modules lie in `folder`; without one for other backends."""
    program.check()
    k, v = kv_pair(kv)
    plan = KvPlan(k=k, v=v, page_tokens=page_tokens, pages=pages)
    step = StepShape(context=program.max_context, sequences=sequences, tokens=tokens, logits=tokens)
    code = None if folder is None else device_code(program, weights, plan, folder)
    return Part(program, weights, plan, step, code)


def device_code(
    program: Program, weights: Mapping[str, PackedTensor], kv: KvPlan, folder: Path
) -> DeviceCode:
    """The kernels that a program needs, as a cubin that the fake GPU runs by the emulator."""
    kernels = kernels_of(lower(program, {name: t.format for name, t in weights.items()}, kv))
    text = source(kernels)
    image = cubin(SM, content=text.encode())
    add_module(folder, image, text)
    entry = DeviceCodeEntry(
        blob=f"device.sm_{SM}.cubin",
        kind="cubin",
        sm=SM,
        ptx="8.5",
        cuda="12.6",
        nbytes=len(image),
        kernels={k.symbol: KernelEntry(threads=k.threads, shared_bytes=0) for k in kernels},
    )
    return DeviceCode((entry,), {entry.blob: memoryview(image)}.__getitem__)


def load(part: Part) -> CudaExecutor:
    return CudaBackend().load(part)
