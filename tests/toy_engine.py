"""A small, whole engine for tests: a random two-layer decoder with every part of a manifest filled in."""

from __future__ import annotations

import functools
import os
from pathlib import Path

import numpy as np

from edge_runtime.engine import packing
from edge_runtime.engine.adapter import Adapter, LowRank
from edge_runtime.engine.formats import abi_hash, get_format
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.manifest import (
    SCHEMA,
    AdapterEntry,
    AdapterTarget,
    Fingerprint,
    KnownAnswer,
    Manifest,
    Origin,
    PartEntry,
    Provenance,
    Quality,
    TaskQuality,
    Vocabulary,
)
from edge_runtime.engine.memory import adapter_nbytes
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
from edge_runtime.engine.plan import KvPlan, MemoryPlan, Plan, Prediction, StepShape, TensorPlan
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.engine.writer import EngineWriter, OsCalls

ADAPTER, RANK, SCALE = "tidy", 4, 0.5
ADAPTED = ("layers.0.q", "layers.0.gate", "layers.1.down")
BLOBS = {"tokenizer.json": b'{"version":"1.0"}', "chat_template": b"{{ messages }}"}


def toy_program(*, layers: int = 2, width: int = 32, vocab: int = 64, context: int = 64) -> Program:
    """A Llama-shaped program: 4 heads over 2 KV heads of width/4 each, hidden size 2*width."""
    head, hidden = width // 4, 2 * width
    ops: list[AnyOp] = [Embed(out="h", weight="embed")]
    tensors = {
        "embed": TensorSpec(vocab, width, "embedding"),
        "inv_freq": TensorSpec(1, head // 2, "vector"),
        "norm": TensorSpec(1, width, "vector"),
        "head": TensorSpec(vocab, width, "head"),
    }
    for i in range(layers):
        p = f"layers.{i}."
        tensors |= {
            f"{p}attn_norm": TensorSpec(1, width, "vector"),
            f"{p}q": TensorSpec(width, width, "matrix"),
            f"{p}k": TensorSpec(2 * head, width, "matrix"),
            f"{p}v": TensorSpec(2 * head, width, "matrix"),
            f"{p}o": TensorSpec(width, width, "matrix"),
            f"{p}ffn_norm": TensorSpec(1, width, "vector"),
            f"{p}gate": TensorSpec(hidden, width, "matrix"),
            f"{p}up": TensorSpec(hidden, width, "matrix"),
            f"{p}down": TensorSpec(width, hidden, "matrix"),
        }
        ops += [
            Norm(x="h", out="x", weight=f"{p}attn_norm", eps=1e-5),
            Linear(x="x", out="q", weight=f"{p}q"),
            Linear(x="x", out="k", weight=f"{p}k"),
            Linear(x="x", out="v", weight=f"{p}v"),
            Rope(x="q", inv_freq="inv_freq", head_dim=head),
            Rope(x="k", inv_freq="inv_freq", head_dim=head),
            KvAppend(k="k", v="v", layer=i),
            Attention(q="q", out="a", layer=i, heads=4, kv_heads=2, head_dim=head, scale=head**-0.5),
            Linear(x="a", out="x", weight=f"{p}o"),
            Add(a="h", b="x", out="h"),
            Norm(x="h", out="x", weight=f"{p}ffn_norm", eps=1e-5),
            Linear(x="x", out="g", weight=f"{p}gate"),
            Linear(x="x", out="u", weight=f"{p}up"),
            Activation(x="g", out="g", kind="silu", up="u"),
            Linear(x="g", out="x", weight=f"{p}down"),
            Add(a="h", b="x", out="h"),
        ]
    ops += [Norm(x="h", out="x", weight="norm", eps=1e-5), Logits(x="x", weight="head")]
    kv = 2 * head
    return Program(
        ops=tuple(ops),
        tensors=tensors,
        buffers={"h": width, "x": width, "q": width, "k": kv, "v": kv, "a": width, "g": hidden, "u": hidden},
        cache=tuple(CacheSlot(2, head) for _ in range(layers)),
        vocab_size=vocab,
        max_context=context,
    )


def toy_origins(program: Program) -> dict[str, Origin]:
    """Names as a Llama checkpoint has them, gate and up fused into one tensor as Phi-3 does."""
    origins = {"head": Origin(key="lm_head", row=0)}
    modules = {side: f"self_attn.{side}_proj" for side in "qkvo"} | {"down": "mlp.down_proj"}
    for name, spec in program.tensors.items():
        if spec.role == "matrix":
            layer, side = name.removeprefix("layers.").split(".")
            module = modules.get(side, "mlp.gate_up_proj")
            origins[name] = Origin(key=f"model.layers.{layer}.{module}", row=spec.rows * (side == "up"))
    return origins


def toy_adapter(program: Program, seed: int = 3) -> Adapter:
    """A random update of those tensors of `ADAPTED` that the program has."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return rng.normal(0, 0.1, shape).astype(np.float16)

    specs = {name: program.tensors[name] for name in ADAPTED if name in program.tensors}
    return {n: LowRank(values(RANK, s.cols), values(s.rows, RANK), SCALE) for n, s in specs.items()}


def toy_plan(program: Program, fmt: str = "int4_g32", adapter: bool = False, *, sequences: int = 2) -> Plan:
    """Matrices in `fmt`, embedding and head in int8_row, all packed for the cpu backend."""
    tensors = {}
    for name, spec in program.tensors.items():
        chosen = {"vector": "f32", "matrix": fmt}.get(spec.role, "int8_row")
        tensors[name] = TensorPlan(
            chosen, "rows" if spec.role in ("vector", "embedding") else packing.cpu_packing(chosen)
        )
    kv = KvPlan(k="int8", v="int8", page_tokens=16, pages=4 * sequences if program.cache else 0)
    ranks = {name: update.rank for name, update in toy_adapter(program).items()}
    weights = sum(
        packing.packed_nbytes(t.format, t.packing, program.tensors[n].rows, program.tensors[n].cols)
        for n, t in tensors.items()
    )
    step = StepShape(context=program.max_context, sequences=sequences, tokens=8 * sequences, logits=sequences)
    return Plan(
        profile="cpu",
        power_mode="default",
        tensors=tensors,
        kv=kv,
        step=step,
        memory=MemoryPlan(
            weights=weights,
            kv=cache_nbytes(program, kv, step),
            buffers=1 << 16,
            draft=0,
            adapters=adapter_nbytes(program, step, ranks) if adapter else 0,
            device_code=0,
            context=0,
            reserve=1 << 20,
            total=1 << 30,
        ),
        predicted=Prediction(decode_tokens_per_s=100.0, first_token_ms=2.5, prompt_tokens=16),
    )


def toy_planes(program: Program, plan: Plan, seed: int = 1) -> dict[str, np.ndarray]:
    """Packed planes of random weights by plane name within the part (``tensor#plane``)."""
    rng = np.random.default_rng(seed)
    planes = {}
    for name, spec in program.tensors.items():
        if name == "inv_freq":
            values = (100.0 ** -(np.arange(spec.cols) / spec.cols)).astype(np.float32)[None]
        elif spec.role == "vector":
            values = np.ones((1, spec.cols), np.float32)
        else:
            values = rng.normal(0, 0.3, (spec.rows, spec.cols)).astype(np.float32)
        t = plan.tensors[name]
        coded = get_format(t.format).encode(values)
        for plane, array in packing.pack(t.format, t.packing, coded, spec.rows, spec.cols).items():
            planes[f"{name}#{plane}"] = array
    return planes


def toy_manifest(
    parts: dict[str, PartEntry], name: str = "toy", adapters: dict[str, AdapterEntry] | None = None
) -> Manifest:
    return Manifest(
        schema=SCHEMA,
        name=name,
        parts=parts,
        adapters=adapters or {},
        fingerprint=Fingerprint(
            profile="cpu", backend="cpu", compute_capability=None, abi=f"{abi_hash():016x}"
        ),
        vocabulary=Vocabulary(bos=1, eos=(2,), pad=None, size=64),
        blobs={n: len(b) for n, b in BLOBS.items()},
        quality=Quality(
            text="story",
            tokens=300,
            perplexity=12.5,
            perplexity_f32=12.0,
            kl_mean=0.01,
            kl_p99=0.09,
            top1_agreement=0.97,
            bits_per_weight=5.2,
            bytes=40960,
            sqnr_db={"layers.0.q": 21.5},
            layer_cosine=(0.999, 0.996),
            task=TaskQuality(name="t.jsonl", cases=8, accuracy=0.75, accuracy_f32=0.875, backend="cpu"),
            broken=("accuracy is 0.7500 on t.jsonl, at least 0.8 is wanted",),
        ),
        provenance=Provenance(
            source="toy",
            source_sha256={"model.safetensors": "ab" * 32},
            model_type="llama",
            algorithm="rtn",
            recipe={"weights": "int4_g32", "note": 'quotes " and \\ and Zürich 🤖'},
            tools={"numpy": np.__version__},
        ),
        known_answer=KnownAnswer(prompt=(1, 5, 9), answer=(3, 4), backend="reference"),
        planes={},
    )


@functools.cache
def toy_parts(fmt: str, seed: int, layers: int) -> tuple[Manifest, dict[str, np.ndarray]]:
    """Manifest and planes (by name in the file) of the engine that `write_toy` writes."""
    program = toy_program(layers=layers)
    plan = toy_plan(program, fmt, adapter=True)
    planes = {f"language/{plane}": array for plane, array in toy_planes(program, plan, seed).items()}
    adapter = toy_adapter(program)
    for name, update in adapter.items():
        planes |= {f"adapter.{ADAPTER}/{name}.a#w": update.a, f"adapter.{ADAPTER}/{name}.b#w": update.b}
    planes |= {f"blob/{blob}": np.frombuffer(data, np.uint8) for blob, data in BLOBS.items()}
    targets = {name: AdapterTarget(rank=update.rank, scale=update.scale) for name, update in adapter.items()}
    entry = PartEntry(program=program, plan=plan, origins=toy_origins(program))
    adapters = {ADAPTER: AdapterEntry(part="language", targets=targets)}
    return toy_manifest({"language": entry}, adapters=adapters), planes


def write_toy(
    path: Path | str,
    *,
    fmt: str = "int4_g32",
    seed: int = 1,
    layers: int = 2,
    reserve: int = 64 * 1024,
    calls: OsCalls | None = None,
) -> Manifest:
    """Write a toy engine; returns its manifest."""
    manifest, planes = toy_parts(fmt, seed, layers)
    with EngineWriter(os.fspath(path), reserve, calls) as writer:
        for name, array in planes.items():
            writer.add(name, array)
        return writer.finish(manifest)
