"""Programs and steps of the executor's tests, and one device code for all of them.

The kernels of every program here are compiled by families, each once: libraries that one module of the fake
GPU links. A test's part gets that module by `ready`.
"""

from __future__ import annotations

import fcntl
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
from emulated_parts import SM, packed, part_of, random_weights
from emulation import cache_folder, compile_cached, compile_kernels
from fake_cuda import cubin, image_hash

from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import Backend, DeviceCode, Part, StepBatch
from edge_runtime.engine import device_code as code
from edge_runtime.engine import packing
from edge_runtime.engine.device_code import Kernel, MatrixKernels, has_kernels, matrix_kernels
from edge_runtime.engine.formats import FORMATS, Array, get_format
from edge_runtime.engine.manifest import DeviceCodeEntry, KernelEntry
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec

NAMES = sorted(name for name in FORMATS if has_kernels(name))
KINDS = sorted({matrix_kernels(name).kind for name in NAMES})
INTEGER = [name for name in NAMES if matrix_kernels(name).kind.startswith("int")]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
AFTER = dict(zip(code.CACHES, code.CACHES[1:] + code.CACHES[:1], strict=True))  # V beside K where they differ
# KV formats of K and V, width of a head, queries that share a key, and whether scores are capped
ATTENTIONS = (
    *((kv, kv, 32, 2, capped) for kv in code.CACHES for capped in (False, True)),
    *((k, v, 32, 2, False) for k, v in AFTER.items()),
    ("int8", "int8", 20, 3, False),
    ("f16", "f16", 64, 1, False),
    ("int4", "int4", 128, 2, False),
    ("int8", "int8", 8, 17, False),
    ("f16", "f16", 8, 2, False),
)
GROUPS = (8, 20, 32, 33, 200)  # of norms


Loader = Callable[[Part], CudaExecutor]  # of a part on the fake GPU


# --- device code -------------------------------------------------------------------------------------------


def _linears() -> list[Kernel]:
    """As test_linear_kernels.py compiles them."""
    found = []
    for name in NAMES:
        for value in map(matrix_kernels(name).__getattribute__, MatrixKernels.__slots__):
            found += value.values() if isinstance(value, dict) else [value]
    return [kernel for kernel in found if isinstance(kernel, Kernel)]


def _cache(k: str, v: str, head_dim: int, share: int, capped: bool) -> list[Kernel]:
    kv = KvPlan(k=k, v=v, page_tokens=16, pages=1)
    op = Attention(
        q="q", out="a", layer=0, heads=share, kv_heads=1, head_dim=head_dim, scale=1.0,
        softcap=1.0 if capped else None,
    )  # fmt: skip
    attention = code.attention_kernels(op, kv)
    others = (code.append_kernel(kv, head_dim), code.move_kernel(kv, head_dim), code.rotate_kernel(head_dim))
    return [*attention, *others]


def _rows() -> list[Kernel]:
    found = [code.add_kernel(), code.gather_kernel(), code.input_kernel(), code.angles_kernel()]
    found += [*code.sample_kernels(), *code.low_rank_kernels()]
    found += [code.activation_kernel(gated + kind) for gated in ("", "gated_") for kind in ACTIVATIONS]
    for width in (128, 127, 256, 255, 1100, 1101):
        found += [code.norm_kernel(kind, width) for kind in ("rms", "layer")]
        found += [code.round_kernel(form, width) for form in ("fp8_e4m3", "int8")]
    return found


def _inputs(kind: str) -> list[Kernel]:
    few = ("silu", "gelu", "gelu_tanh") if kind in ("int32", "int128") else ACTIVATIONS
    sources = ["plain", "rms", "layer", *few, *(f"gated_{name}" for name in few)]
    return [code.prepare_kernel(source, kind, width) for source, width in product(sources, (64, 63, 1100))]


@functools.cache
def _library() -> tuple[DeviceCode, Path]:
    """Device code with the kernels of all families, and the module that runs it."""
    families = [_linears(), _rows(), *map(_inputs, KINDS)]
    seen = {kernel.symbol for family in families for kernel in family}
    for attention in ATTENTIONS:
        families.append([k for k in _cache(*attention) if k.symbol not in seen])
        seen |= {kernel.symbol for kernel in families[-1]}
    with (cache_folder() / "families.lock").open("w") as lock, ThreadPoolExecutor(2) as two:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the same tests takes what this one compiles
        libraries = list(two.map(lambda family: compile_kernels(code.source(family)), families))
    link = ("-Wl,--no-as-needed", *map(str, libraries))
    module = compile_cached("module", "// links the kernels\n", (), link)
    image = cubin(SM, content=module.name.encode())
    kernels = {k.symbol: k for family in families for k in family}
    entry = DeviceCodeEntry(
        blob=f"device.sm_{SM}.cubin",
        kind="cubin",
        sm=SM,
        ptx="8.5",
        cuda="12.6",
        nbytes=len(image),
        kernels={name: KernelEntry(threads=k.threads, shared_bytes=0) for name, k in kernels.items()},
    )
    return DeviceCode((entry,), {entry.blob: memoryview(image)}.__getitem__), module


def ready(part: Part, folder: Path) -> Part:
    """The part with device code for the fake GPU, whose modules lie in `folder`."""
    device_code, module = _library()
    link = folder / f"{image_hash(bytes(device_code.read(device_code.entries[0].blob)))}.so"
    if not link.exists():
        os.symlink(module, link)
    return replace(part, code=device_code)


# --- programs ----------------------------------------------------------------------------------------------


def decoder(
    *,
    head_dim: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    width: int = 72,
    ffn: int = 80,
    vocab: int = 70,
    layers: int = 2,
    window: int | None = None,
    softcap: float | None = None,
    tied: bool = False,
    context: int = 64,
) -> Program:
    """A decoder with all kinds of ops that one has, and tails: no width is a multiple of 64."""
    q_width, kv_width = heads * head_dim, kv_heads * head_dim
    freqs = head_dim // 2 - 1
    tensors = {
        "embed": TensorSpec(vocab, width, "embedding"),
        "inv_freq": TensorSpec(1, freqs, "vector"),
        "norm": TensorSpec(1, width, "vector"),
        "head_bias": TensorSpec(1, vocab, "vector"),
    }
    if not tied:
        tensors["head"] = TensorSpec(vocab, width, "head")
    ops: list[AnyOp] = [Embed(out="h", weight="embed", scale=1.5)]
    for i in range(layers):
        tensors |= {
            f"{i}.norm": TensorSpec(1, width, "vector"),
            f"{i}.q": TensorSpec(q_width, width, "matrix"),
            f"{i}.qb": TensorSpec(1, q_width, "vector"),
            f"{i}.k": TensorSpec(kv_width, width, "matrix"),
            f"{i}.v": TensorSpec(kv_width, width, "matrix"),
            f"{i}.qn": TensorSpec(1, head_dim, "vector"),
            f"{i}.o": TensorSpec(width, q_width, "matrix"),
            f"{i}.ln": TensorSpec(1, width, "vector"),
            f"{i}.lb": TensorSpec(1, width, "vector"),
            f"{i}.gate": TensorSpec(ffn, width, "matrix"),
            f"{i}.up": TensorSpec(ffn, width, "matrix"),
            f"{i}.down": TensorSpec(width, ffn, "matrix"),
            f"{i}.db": TensorSpec(1, width, "vector"),
        }
        ops += [
            Norm(x="h", out="x", weight=f"{i}.norm", eps=1e-5),
            Linear(x="x", out="q", weight=f"{i}.q", bias=f"{i}.qb"),
            Linear(x="x", out="k", weight=f"{i}.k"),
            Linear(x="x", out="v", weight=f"{i}.v"),
            Norm(x="q", out="q", weight=f"{i}.qn", eps=1e-6, group=head_dim),
            Rope(x="q", inv_freq="inv_freq", head_dim=head_dim, scale=1.1),
            Rope(x="k", inv_freq="inv_freq", head_dim=head_dim, scale=1.1),
            KvAppend(k="k", v="v", layer=i),
            Attention(
                q="q", out="a", layer=i, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                scale=head_dim**-0.5, window=window, softcap=softcap,
            ),
            Linear(x="a", out="x", weight=f"{i}.o"),
            Add(a="h", b="x", out="h", scale=0.7),
            Norm(x="h", out="x", weight=f"{i}.ln", bias=f"{i}.lb", eps=1e-5, kind="layer"),
            Linear(x="x", out="g", weight=f"{i}.gate"),
            Linear(x="x", out="u", weight=f"{i}.up"),
            Activation(x="g", out="g", kind=("silu", "gelu_tanh")[i % 2], up="u"),  # type: ignore[arg-type]
            Linear(x="g", out="x", weight=f"{i}.down", bias=f"{i}.db"),
            Add(a="x", b="h", out="h"),
        ]  # fmt: skip
    head = "embed" if tied else "head"
    ops += [
        Norm(x="h", out="x", weight="norm", eps=1e-5),
        Logits(x="x", weight=head, scale=0.9, softcap=softcap, bias="head_bias"),
    ]
    return Program(
        ops=tuple(ops),
        tensors=tensors,
        buffers={
            "h": width, "x": width, "q": q_width, "k": kv_width, "v": kv_width, "a": q_width,
            "g": ffn, "u": ffn,
        },
        cache=tuple(CacheSlot(kv_heads, head_dim, window) for _ in range(layers)),
        vocab_size=vocab,
        max_context=context,
    )  # fmt: skip


def formats_of(program: Program, matrix: str, head: str | None = None) -> dict[str, str]:
    """Matrices in one format, embedding and head in it too or in another."""
    chosen = {"vector": "f32", "matrix": matrix}
    return {name: chosen.get(spec.role, head or matrix) for name, spec in program.tensors.items()}


def model(
    fmt: str = "int4_g64",
    *,
    kv: str = "int8",
    head: str | None = None,
    seed: int = 0,
    tokens: int = 40,
    page_tokens: int = 16,
    pages: int = 12,
    program: Program | None = None,
    **shape: object,
) -> Part:
    """A random decoder (see `decoder` for its shape), without device code."""
    program = program or decoder(**shape)  # type: ignore[arg-type]
    weights = random_weights(program, formats_of(program, fmt, head), seed)
    return part_of(program, weights, kv=kv, tokens=tokens, page_tokens=page_tokens, pages=pages)


def rows_part(
    ops: Iterable[AnyOp],
    buffers: Mapping[str, int],
    matrices: Mapping[str, tuple[str, Array]],
    vectors: Mapping[str, Array],
    *,
    tokens: int = 40,
) -> Part:
    """Inputs `x`, the ops, and buffer `y` as what the logits op reads: `hidden` of an executor gives it."""
    out = buffers["y"]
    tensors = {"eye": TensorSpec(out, out, "head")}
    weights = {"eye": packed(np.eye(out, dtype=np.float32), "f16", "m16")}
    for name, (fmt, values) in matrices.items():
        tensors[name] = TensorSpec(*values.shape, "matrix")
        weights[name] = packed(values, fmt, "rows")
    for name, values in vectors.items():
        row = np.asarray(values, np.float32).reshape(1, -1)
        tensors[name] = TensorSpec(*row.shape, "vector")
        weights[name] = packed(row, "f32", "rows")
    program = Program(
        ops=(Input(out="x"), *ops, Logits(x="y", weight="eye")),
        tensors=tensors,
        buffers=dict(buffers),
        cache=(),
        vocab_size=out,
        max_context=64,
    )
    return part_of(program, weights, tokens=tokens)


# --- steps -------------------------------------------------------------------------------------------------

PAGES = ((3, 1, 0, 2), (4, 7, 5, 6), (8, 9, 10, 11))  # page tables of three sequences, out of order
TABLES = np.array(PAGES, np.int32)


def i32(values: object) -> Array:
    return np.asarray(values, np.int32)


def ids(count: int, seed: int = 5, vocab: int = 70) -> Array:
    return np.random.default_rng(seed).integers(0, vocab, count).astype(np.int32)


def step(*runs: tuple[int, int, Array], tables: Array = TABLES) -> StepBatch:
    """runs: (sequence, first position, token ids). Logits of every token."""
    tokens = np.concatenate([ids for _, _, ids in runs]).astype(np.int32)
    positions = np.concatenate([np.arange(p, p + len(ids)) for _, p, ids in runs]).astype(np.int32)
    sequence = np.concatenate([np.full(len(ids), s) for s, _, ids in runs]).astype(np.int32)
    return StepBatch(tokens, positions, sequence, tables, np.arange(len(tokens), dtype=np.int32))


def fed(inputs: Array) -> StepBatch:
    """A step of rows for a program without a cache."""
    zeros = np.zeros(len(inputs), np.int32)
    rows = np.arange(len(inputs), dtype=np.int32)
    return StepBatch(zeros, zeros, zeros, np.empty((1, 0), np.int32), rows, inputs=inputs)


def equal(a: Array, b: Array) -> bool:
    """To the bit."""
    return a.shape == b.shape and a.tobytes() == b.tobytes()


# --- runs --------------------------------------------------------------------------------------------------


@contextmanager
def opened(executor: CudaExecutor) -> Iterator[CudaExecutor]:
    try:
        yield executor
    finally:
        executor.close()


def other(backend: Backend, part: Part, *batches: StepBatch) -> list[Array]:
    """Logits of steps by another backend."""
    executor = backend.load(part)
    try:
        return [executor.forward(batch).copy() for batch in batches]
    finally:
        executor.close()


def hidden(on_gpu: Loader, part: Part, x: Array) -> Array:
    """Rows of the buffer that the logits op reads."""
    with opened(on_gpu(part)) as executor:
        executor.forward(fed(x))
        return executor.hidden.copy()


def oracle_hidden(backend: Backend, part: Part, x: Array) -> Array:
    executor = backend.load(part)
    executor.forward(fed(x))
    found = executor.hidden.copy()
    executor.close()
    return found


def decoded(part: Part, name: str) -> Array:
    t = part.weights[name]
    planes = packing.unpack(t.format, t.packing, t.planes, t.rows, t.cols)
    return get_format(t.format).decode(planes, t.rows, t.cols)


def rows(count: int, width: int, seed: int = 3) -> Array:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, width)) * np.exp(rng.uniform(-3, 3, (count, 1)))
    return x.astype(np.float32)
