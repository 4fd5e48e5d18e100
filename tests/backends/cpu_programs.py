"""Small programs and parts with random weights for the cpu backend's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from edge_runtime.backends import cpu, cpu_records
from edge_runtime.backends.cpu import BACKEND
from edge_runtime.backends.protocol import PackedTensor, Part, StepBatch
from edge_runtime.engine import packing
from edge_runtime.engine.formats import get_format
from edge_runtime.engine.kv import kv_pair
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
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec

Array = np.ndarray[Any, Any]


def run(part: Part, batch: StepBatch, *, threads: int = 1, simd: str = "auto") -> Array:
    executor = BACKEND.load(part, threads=threads, simd=simd)
    try:
        return executor.forward(batch).copy()
    finally:
        executor.close()


def ids(count: int, seed: int = 5) -> Array:
    return np.random.default_rng(seed).integers(0, 70, count).astype(np.int32)


def instruction_sets() -> list[str]:
    """The paths that this machine can run; scalar is always one."""
    bits = cpu.open_library(cpu.library_path()).edge_cpu_features()
    return [name for name, i in cpu_records.SIMD.items() if i and bits >> i & 1]


def packed(values: Array, fmt: str, how: str | None = None) -> PackedTensor:
    rows, cols = values.shape
    how = how or packing.cpu_packing(fmt)
    planes = get_format(fmt).encode(values)
    return PackedTensor(rows, cols, fmt, how, packing.pack(fmt, how, planes, rows, cols))


def vector(values: Array) -> PackedTensor:
    return packed(np.asarray(values, np.float32).reshape(1, -1), "f32", "rows")


def decoded(tensor: PackedTensor) -> Array:
    planes = packing.unpack(tensor.format, tensor.packing, tensor.planes, tensor.rows, tensor.cols)
    return get_format(tensor.format).decode(planes, tensor.rows, tensor.cols)


def part_of(
    program: Program,
    weights: Mapping[str, PackedTensor],
    *,
    kv: str = "f32",
    tokens: int = 32,
    page_tokens: int = 16,
) -> Part:
    program.check()
    k, v = kv_pair(kv)
    plan = KvPlan(k=k, v=v, page_tokens=page_tokens, pages=12)
    step = StepShape(context=program.max_context, sequences=3, tokens=tokens, logits=tokens)
    return Part(program, weights, plan, step)


def linear_part(weight: PackedTensor, x: Array, bias: Array | None) -> Part:
    """Token t's logits are weight @ x[t] + bias: the embedding is x and the head is 1, both in f32."""
    rows, cols = weight.rows, weight.cols
    table = np.zeros((rows, cols), np.float32)
    table[: len(x)] = x
    tensors = {
        "x": TensorSpec(rows, cols, "embedding"),
        "w": TensorSpec(rows, cols, "matrix"),
        "eye": TensorSpec(rows, rows, "head"),
    }
    weights = {"x": packed(table, "f32"), "w": weight, "eye": packed(np.eye(rows, dtype=np.float32), "f32")}
    if bias is not None:
        tensors["b"] = TensorSpec(1, rows, "vector")
        weights["b"] = vector(bias)
    program = Program(
        ops=(
            Embed(out="x", weight="x"),
            Linear(x="x", out="y", weight="w", bias="b" if bias is not None else None),
            Logits(x="y", weight="eye"),
        ),
        tensors=tensors,
        buffers={"x": cols, "y": rows},
        cache=(),
        vocab_size=rows,
        max_context=64,
    )
    return part_of(program, weights)


def llama(
    fmt: str,
    *,
    kv: str = "f32",
    head_dim: int = 32,
    heads: int = 4,
    kv_heads: int = 2,
    ffn: int = 72,
    vocab: int = 70,
    layers: int = 2,
    window: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
    page_tokens: int = 16,
    tokens: int = 32,
) -> Part:
    """A random decoder with tails everywhere: no width is a multiple of 64, the vocabulary not of 16."""
    rng = np.random.default_rng(seed)
    width, kv_width = heads * head_dim - 8, kv_heads * head_dim
    q_width = heads * head_dim
    tensors: dict[str, TensorSpec] = {}
    weights: dict[str, PackedTensor] = {}

    def matrix(name: str, rows: int, cols: int, role: str = "matrix") -> str:
        tensors[name] = TensorSpec(rows, cols, role)  # type: ignore[arg-type]
        values = rng.standard_normal((rows, cols), dtype=np.float32) * np.float32(cols**-0.5)
        weights[name] = packed(values, fmt)
        return name

    def scale(name: str, n: int) -> str:
        tensors[name] = TensorSpec(1, n, "vector")
        weights[name] = vector(1 + 0.1 * rng.standard_normal(n))
        return name

    tensors["inv_freq"] = TensorSpec(1, head_dim // 2 - 1, "vector")
    weights["inv_freq"] = vector(10000.0 ** (-np.arange(head_dim // 2 - 1) / (head_dim // 2)))
    ops: list[AnyOp] = [Embed(out="h", weight=matrix("embed", vocab, width, "embedding"), scale=1.5)]
    for i in range(layers):
        ops += [
            Norm(x="h", out="x", weight=scale(f"{i}.norm", width), eps=1e-5),
            Linear(x="x", out="q", weight=matrix(f"{i}.q", q_width, width), bias=scale(f"{i}.qb", q_width)),
            Linear(x="x", out="k", weight=matrix(f"{i}.k", kv_width, width)),
            Linear(x="x", out="v", weight=matrix(f"{i}.v", kv_width, width)),
            Norm(x="q", out="q", weight=scale(f"{i}.qn", head_dim), eps=1e-6, group=head_dim),
            Rope(x="q", inv_freq="inv_freq", head_dim=head_dim, scale=1.1),
            Rope(x="k", inv_freq="inv_freq", head_dim=head_dim, scale=1.1),
            KvAppend(k="k", v="v", layer=i),
            Attention(
                q="q", out="a", layer=i, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                scale=head_dim**-0.5, window=window, softcap=softcap,
            ),
            Linear(x="a", out="x", weight=matrix(f"{i}.o", width, heads * head_dim)),
            Add(a="h", b="x", out="h", scale=0.7),
            Norm(
                x="h", out="x", weight=scale(f"{i}.ln", width), bias=scale(f"{i}.lb", width),
                eps=1e-5, kind="layer",
            ),
            Linear(x="x", out="g", weight=matrix(f"{i}.gate", ffn, width)),
            Linear(x="x", out="u", weight=matrix(f"{i}.up", ffn, width)),
            Activation(x="g", out="g", kind=("silu", "gelu_tanh")[i % 2], up="u"),  # type: ignore[arg-type]
            Linear(x="g", out="x", weight=matrix(f"{i}.down", width, ffn)),
            Add(a="h", b="x", out="h"),
        ]  # fmt: skip
    ops += [
        Norm(x="h", out="x", weight=scale("norm", width), eps=1e-5),
        Logits(x="x", weight=matrix("head", vocab, width, "head"), scale=0.9, softcap=softcap),
    ]
    program = Program(
        ops=tuple(ops),
        tensors=tensors,
        buffers={
            "h": width, "x": width, "q": q_width, "k": kv_width, "v": kv_width, "a": q_width,
            "g": ffn, "u": ffn,
        },
        cache=tuple(CacheSlot(kv_heads, head_dim, window) for _ in range(layers)),
        vocab_size=vocab,
        max_context=64,
    )  # fmt: skip
    return part_of(program, weights, kv=kv, page_tokens=page_tokens, tokens=tokens)


PAGES = {0: (3, 1, 0, 2), 1: (4, 7, 5, 6)}  # page tables of two sequences, out of order


def step(*runs: tuple[int, int, Array]) -> StepBatch:
    """runs: (sequence, first position, token ids). Logits of every token."""
    tokens = np.concatenate([ids for _, _, ids in runs]).astype(np.int32)
    positions = np.concatenate([np.arange(p, p + len(ids)) for _, p, ids in runs]).astype(np.int32)
    sequence = np.concatenate([np.full(len(ids), s) for s, _, ids in runs]).astype(np.int32)
    table = np.array([PAGES[0], PAGES[1]], np.int32)
    return StepBatch(tokens, positions, sequence, table, np.arange(len(tokens), dtype=np.int32))
