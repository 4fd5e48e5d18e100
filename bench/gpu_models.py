"""Programs and random weights for checks on a GPU: values are noise, shapes and bytes are real."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from unittest import mock

import numpy as np
from gpu_code import compiler

from edge_runtime.backends.cuda import backend
from edge_runtime.backends.cuda.backend import CudaBackend
from edge_runtime.backends.cuda.executor import CudaExecutor
from edge_runtime.backends.protocol import PackedTensor, Part
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.kv import kv_pair
from edge_runtime.engine.launches import Launch, LinearLaunch, Lowered, kernels_of
from edge_runtime.engine.lowering import lower
from edge_runtime.engine.ops import AnyOp, Attention, Embed, KvAppend, Linear, Logits
from edge_runtime.engine.packing import cuda_packing, pack, plane_items
from edge_runtime.engine.plan import KvPlan, StepShape
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec

HEAD = "int8_row"
VOCAB = 64  # of programs that are about something else


@dataclass(frozen=True, slots=True)
class Shape:
    """Of a Llama."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int

    @property
    def head_dim(self) -> int:
        return self.hidden // self.heads

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of a layer's linear launches: q, k and v in one, as well as gate and up."""
        qkv = self.hidden + 2 * self.kv_heads * self.head_dim
        return (
            (qkv, self.hidden),
            (self.hidden, self.hidden),
            (2 * self.ffn, self.hidden),
            (self.hidden, self.ffn),
        )


LLAMA_8B = Shape("llama-8b", 4096, 32, 32, 8, 14336, 128256, 8192)


def llama(shape: Shape) -> Program:
    """As the builder reads it from a Hugging Face config."""
    from builders.archs import read_program

    return read_program(
        {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": shape.vocab,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.ffn,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": shape.context,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        context=shape.context,
    ).program


def matrices(rows: int, cols: int, count: int) -> Program:
    """`count` matrices of one shape on the same input, one after the other."""
    ops: list[AnyOp] = [Embed(out="x", weight="embed")]
    ops += [Linear(x="x", out="y", weight=f"w{i}") for i in range(count)]
    return Program(
        ops=(*ops, Logits(x="y", weight="head")),
        tensors={
            "embed": TensorSpec(VOCAB, cols, "embedding"),
            **{f"w{i}": TensorSpec(rows, cols, "matrix") for i in range(count)},
            "head": TensorSpec(VOCAB, rows, "head"),
        },
        buffers={"x": cols, "y": rows},
        cache=(),
        vocab_size=VOCAB,
        max_context=1 << 16,
    )


def attentions(shape: Shape, layers: int, context: int) -> Program:
    """Keys and values stored and attended to, and nothing else, in each of so many layers."""
    kv, width, dim = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim, shape.head_dim
    ops: list[AnyOp] = [Embed(out=name, weight=f"embed_{name}") for name in "qkv"]
    for layer in range(layers):
        ops.append(KvAppend(k="k", v="v", layer=layer))
        ops.append(
            Attention(
                q="q",
                out="mixed",
                layer=layer,
                heads=shape.heads,
                kv_heads=shape.kv_heads,
                head_dim=dim,
                scale=dim**-0.5,
            )
        )
    return Program(
        ops=(*ops, Logits(x="mixed", weight="head")),
        tensors={
            "embed_q": TensorSpec(VOCAB, width, "embedding"),
            "embed_k": TensorSpec(VOCAB, kv, "embedding"),
            "embed_v": TensorSpec(VOCAB, kv, "embedding"),
            "head": TensorSpec(VOCAB, width, "head"),
        },
        buffers={"q": width, "k": kv, "v": kv, "mixed": width},
        cache=(CacheSlot(shape.kv_heads, dim),) * layers,
        vocab_size=VOCAB,
        max_context=context,
    )


def formats_of(program: Program, matrix: str, head: str = HEAD) -> dict[str, str]:
    """A format for each tensor: `matrix` for matrices, `head` for embeddings and heads."""
    chosen = {"vector": "f32", "matrix": matrix}
    return {name: chosen.get(spec.role, head) for name, spec in program.tensors.items()}


def encoded(program: Program, formats: Mapping[str, str], seed: int = 0) -> dict[str, PackedTensor]:
    """Random weights through the formats' codecs: slow, and right for comparisons with other backends."""
    rng = np.random.default_rng(seed)
    freqs = {op.inv_freq for op in program.ops if type(op).__name__ == "Rope"}
    found = {}
    for name, spec in program.tensors.items():
        values = rng.normal(0, spec.cols**-0.5, (spec.rows, spec.cols)).astype(np.float32)
        if name in freqs:
            values = (10000.0 ** -(np.arange(spec.cols) / spec.cols)).astype(np.float32)[None]
        elif spec.role == "vector":
            values = (1 + 0.1 * values).astype(np.float32)
        found[name] = packed(values, formats[name], spec.role)
    return found


def packed(values: Array, fmt: str, role: str) -> PackedTensor:
    rows, cols = values.shape
    packing = "rows" if role == "vector" else cuda_packing(fmt)
    planes = pack(fmt, packing, get_format(fmt).encode(values), rows, cols)
    return PackedTensor(rows, cols, fmt, packing, planes)


def noise(program: Program, formats: Mapping[str, str], seed: int = 0) -> dict[str, PackedTensor]:
    """Random planes, nothing quantized; tensors of one shape and format share theirs in host memory."""
    rng = np.random.default_rng(seed)
    made: dict[tuple[object, ...], PackedTensor] = {}
    found = {}
    for name, spec in program.tensors.items():
        fmt = formats[name]
        key = spec.rows, spec.cols, fmt, spec.role
        if spec.role == "vector":
            frequencies = name in {op.inv_freq for op in program.ops if type(op).__name__ == "Rope"}
            key = (*key, frequencies)
            if key not in made:
                values = 1 / (1 + np.arange(spec.cols)) if frequencies else np.ones(spec.cols)
                made[key] = packed(values.astype(np.float32)[None], fmt, "vector")
        elif key not in made:
            packing = cuda_packing(fmt)
            planes = {
                plane: _random_plane(rng, plane, count, dtype, spec.cols)
                for plane, (count, dtype) in plane_items(fmt, packing, spec.rows, spec.cols).items()
            }
            made[key] = PackedTensor(spec.rows, spec.cols, fmt, packing, planes)
        found[name] = made[key]
    return found


def _random_plane(rng: np.random.Generator, plane: str, count: int, dtype: str, cols: int) -> Array:
    """Codes of any value; scales such that products stay near the size of their inputs."""
    kind = np.dtype(dtype)
    few = min(count, 1 << 24)
    if plane == "scale":
        values = (rng.uniform(0.5, 1.5, few) / (40.0 * cols**0.5)).astype(kind)
    elif kind.kind == "f":
        values = (rng.standard_normal(few, np.float32) * cols**-0.5).astype(kind)
    elif plane == "zero":
        values = rng.integers(0, 16, few, dtype=np.uint8).astype(kind)
    else:
        values = np.frombuffer(rng.bytes(few * kind.itemsize), kind)
    return np.resize(values, count)


def part_of(
    program: Program,
    weights: Mapping[str, PackedTensor],
    *,
    kv: str = "int8",
    context: int = 64,
    tokens: int = 32,
    logits: int = 8,
    sequences: int = 1,
    page_tokens: int = 16,
) -> Part:
    """With pages for `sequences` sequences of the whole context."""
    program.check()
    k, v = kv_pair(kv)
    pages = sequences * -(-context // page_tokens) if program.cache else 0
    plan = KvPlan(k=k, v=v, page_tokens=page_tokens, pages=pages)
    step = StepShape(context=context, sequences=sequences, tokens=tokens, logits=min(logits, tokens))
    return Part(program, weights, plan, step)


def lowered_of(part: Part) -> Lowered:
    return lower(part.program, {name: t.format for name, t in part.weights.items()}, part.kv)


def load(part: Part) -> CudaExecutor:
    """As an engine with device code for this GPU is loaded."""
    code = compiler().code(kernels_of(lowered_of(part)))
    return CudaBackend().load(replace(part, code=code))


def load_apart(part: Part) -> CudaExecutor:
    """Loaded, with a launch for each matrix of its own."""
    with mock.patch.object(backend, "lower", lambda *args: apart(lower(*args))):
        return load(part)


def apart(lowered: Lowered) -> Lowered:
    """No matrices that share a launch."""
    launches: list[Launch] = []
    for launch in lowered.launches:
        if isinstance(launch, LinearLaunch):
            launches += [replace(launch, products=(product,)) for product in launch.products]
        else:
            launches.append(launch)
    return replace(lowered, launches=tuple(launches))


def linear_nbytes(part: Part, name: str) -> int:
    """Bytes of all planes of a weight as they lie on the device."""
    return sum(int(a.nbytes) for a in part.weights[name].planes.values())


def read_each_token(part: Part) -> int:
    """Bytes of weights that a decoded token needs at least: all matrices, and a row of the embedding."""
    total = 0
    for name, spec in part.program.tensors.items():
        nbytes = linear_nbytes(part, name)
        total += nbytes // spec.rows if spec.role == "embedding" else nbytes
    return total
