"""Programs of known work for `edge-bench --calibrate`: products alone, attention alone, whole
decoders. Speed does not depend on the values, which are random and tame.
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import numpy as np

from edge_runtime.engine.formats import Array, abi_hash, get_format
from edge_runtime.engine.formats.microscaling import tensor_grid
from edge_runtime.engine.formats.trellis import trellis_of, wanted_scales
from edge_runtime.engine.kv import cache_nbytes
from edge_runtime.engine.manifest import (
    LANGUAGE,
    SCHEMA,
    Fingerprint,
    Manifest,
    PartEntry,
    Provenance,
    Vocabulary,
)
from edge_runtime.engine.memory import memory_plan
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
from edge_runtime.engine.packed import PackedTensor
from edge_runtime.engine.packing import cpu_packing, pack
from edge_runtime.engine.plan import KvPlan, Plan, Prediction, StepShape, TensorPlan
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.engine.proof import plane_name
from edge_runtime.engine.writer import EngineWriter

VOCAB = 32  # of programs that are not about logits
_TILE = 64  # rows that are really random; the rest repeats them
_ALIGN = 64  # bytes, as planes lie in an engine
_TAMED = 16  # products in a row, after which a norm keeps hundreds of them from growing beyond f32
_RESERVE = 1 << 20  # bytes for the manifest of a small engine


def products(width: int, count: int) -> Program:
    """`count` square linears of that width, one after the other: weights w0, w1, ..."""
    ops: list[AnyOp] = [Embed(out="a", weight="table")]
    tensors = _ends(width) | {"norm": TensorSpec(1, width, "vector")}
    names = ("a", "b")
    for i in range(count):
        tensors[f"w{i}"] = TensorSpec(width, width, "matrix")
        ops.append(Linear(x=names[i % 2], out=names[(i + 1) % 2], weight=f"w{i}"))
        if i % _TAMED == _TAMED - 1:
            ops.append(Norm(x=names[(i + 1) % 2], out=names[(i + 1) % 2], weight="norm", eps=1e-5))
    ops.append(Logits(x=names[count % 2], weight="head"))
    return _program(ops, tensors, {"a": width, "b": width})


def product(rows: int, cols: int) -> Program:
    """One linear: weight w."""
    ops: list[AnyOp] = [Embed(out="a", weight="table"), Linear(x="a", out="b", weight="w")]
    ops.append(Logits(x="a", weight="head"))  # so that the head does not grow with the rows
    tensors = _ends(cols) | {"w": TensorSpec(rows, cols, "matrix")}
    return _program(ops, tensors, {"a": cols, "b": rows})


def attending(heads: int, kv_heads: int, head_dim: int, layers: int, context: int) -> Program:
    """`layers` attentions over their own caches, with the same q, k and v."""
    wide, narrow = heads * head_dim, kv_heads * head_dim
    ops: list[AnyOp] = [
        Embed(out="q", weight="table"),
        Embed(out="k", weight="keys"),
        Embed(out="v", weight="keys"),
    ]
    for layer in range(layers):
        ops.append(KvAppend(k="k", v="v", layer=layer))
        ops.append(
            Attention(
                q="q",
                out="a",
                layer=layer,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
            )
        )
    ops.append(Logits(x="a", weight="head"))
    tensors = _ends(wide) | {"keys": TensorSpec(VOCAB, narrow, "embedding")}
    buffers = {"q": wide, "k": narrow, "v": narrow, "a": wide}
    cache = tuple(CacheSlot(kv_heads, head_dim) for _ in range(layers))
    return _program(ops, tensors, buffers, cache, context)


def decoder(
    vocab: int,
    *,
    width: int = 64,
    hidden: int = 128,
    layers: int = 1,
    heads: int = 4,
    context: int = 256,
) -> Program:
    """A decoder of `heads` heads over half as many KV heads, with that many logits and a tied head."""
    head_dim, kv_heads = width // heads, heads // 2
    tensors = {
        "embed": TensorSpec(vocab, width, "head"),
        "norm": TensorSpec(1, width, "vector"),
        "freq": TensorSpec(1, head_dim // 2, "vector"),
    }
    ops: list[AnyOp] = [Embed(out="h", weight="embed")]
    for i in range(layers):
        shapes = {
            "q": (width, width),
            "k": (width // 2, width),
            "v": (width // 2, width),
            "o": (width, width),
        }
        shapes |= {"gate": (hidden, width), "up": (hidden, width), "down": (width, hidden)}
        tensors |= {f"{name}{i}": TensorSpec(*shape, "matrix") for name, shape in shapes.items()}
        ops += [
            Norm(x="h", out="x", weight="norm", eps=1e-5),
            *(Linear(x="x", out=name, weight=f"{name}{i}") for name in ("q", "k", "v")),
            Rope(x="q", inv_freq="freq", head_dim=head_dim),
            Rope(x="k", inv_freq="freq", head_dim=head_dim),
            KvAppend(k="k", v="v", layer=i),
            Attention(
                q="q",
                out="a",
                layer=i,
                heads=heads,
                kv_heads=kv_heads,
                head_dim=head_dim,
                scale=head_dim**-0.5,
            ),
            Linear(x="a", out="x", weight=f"o{i}"),
            Add(a="h", b="x", out="h"),
            Norm(x="h", out="x", weight="norm", eps=1e-5),
            Linear(x="x", out="g", weight=f"gate{i}"),
            Linear(x="x", out="u", weight=f"up{i}"),
            Activation(x="g", out="g", kind="silu", up="u"),
            Linear(x="g", out="x", weight=f"down{i}"),
            Add(a="h", b="x", out="h"),
        ]
    ops += [Norm(x="h", out="x", weight="norm", eps=1e-5), Logits(x="x", weight="embed")]
    buffers = dict.fromkeys(("h", "x", "q", "a"), width) | {"k": width // 2, "v": width // 2}
    return Program(
        ops=tuple(ops),
        tensors=tensors,
        buffers=buffers | {"g": hidden, "u": hidden},
        cache=tuple(CacheSlot(kv_heads, head_dim) for _ in range(layers)),
        vocab_size=vocab,
        max_context=context,
    )


def plans_of(program: Program, fmt: str) -> dict[str, TensorPlan]:
    """Matrices in `fmt`, embeddings in f16, heads in int8_row, as the cpu backend reads them."""
    chosen = {"matrix": fmt, "embedding": "f16", "head": "int8_row", "vector": "f32"}
    found = {name: chosen[spec.role] for name, spec in program.tensors.items()}
    vectors = {name for name, spec in program.tensors.items() if spec.role == "vector"}
    return {n: TensorPlan(f, "rows" if n in vectors else cpu_packing(f)) for n, f in found.items()}


def weights_of(program: Program, tensors: dict[str, TensorPlan]) -> dict[str, PackedTensor]:
    """Random weights, every tensor in memory of its own."""
    found = {}
    for name, spec in program.tensors.items():
        made = _packed(tensors[name], spec.rows, spec.cols)
        planes = {plane: _own(array) for plane, array in made.items()}
        found[name] = PackedTensor(spec.rows, spec.cols, tensors[name].format, tensors[name].packing, planes)
    return found


def write_engine(path: Path, program: Program, fmt: str) -> Plan:
    """A whole engine of a decoder program, whose tokens are the words t0, t1, ...; returns its plan."""
    tensors = plans_of(program, fmt)
    kv = KvPlan(k="int8", v="int8", page_tokens=16, pages=program.max_context // 16)
    step = StepShape(context=program.max_context, sequences=1, tokens=128, logits=1)
    memory = memory_plan(program, tensors, kv, step, threads=1, total=1 << 34, reserve=0)
    plan = Plan(
        profile="cpu",
        power_mode="default",
        tensors=tensors,
        kv=kv,
        step=step,
        memory=memory,
        predicted=Prediction(decode_tokens_per_s=1.0, first_token_ms=1.0, prompt_tokens=1),
    )
    blob = _tokenizer(program.vocab_size)
    manifest = Manifest(
        schema=SCHEMA,
        name="calibration",
        parts={LANGUAGE: PartEntry(program=program, plan=plan)},
        fingerprint=Fingerprint(
            profile="cpu", backend="cpu", compute_capability=None, abi=f"{abi_hash():016x}"
        ),
        vocabulary=Vocabulary(bos=None, eos=(0,), pad=None, size=program.vocab_size),
        blobs={"tokenizer.json": len(blob)},
        quality=None,
        provenance=Provenance(
            source="random", source_sha256={}, model_type="none", algorithm="rtn", recipe={}, tools={}
        ),
        known_answer=None,
        planes={},
    )
    with EngineWriter(str(path), _RESERVE) as writer:
        for name, tensor in weights_of(program, tensors).items():
            for plane, array in tensor.planes.items():
                writer.add(plane_name(LANGUAGE, name, plane), array)
        writer.add("blob/tokenizer.json", np.frombuffer(blob, np.uint8))
        writer.finish(manifest)
    return plan


def cache_of(program: Program, k: str, v: str, step: StepShape) -> KvPlan:
    """Pages for one whole context; none where the program has no cache."""
    pages = -(-step.context // 16) if program.cache else 0
    kv = KvPlan(k=k, v=v, page_tokens=16, pages=pages)
    cache_nbytes(program, kv, step)  # raises BadConfig for a pair that cannot be
    return kv


def _ends(width: int) -> dict[str, TensorSpec]:
    return {"table": TensorSpec(VOCAB, width, "embedding"), "head": TensorSpec(VOCAB, width, "head")}


def _program(
    ops: list[AnyOp],
    tensors: dict[str, TensorSpec],
    buffers: dict[str, int],
    cache: tuple[CacheSlot, ...] = (),
    context: int = 256,
) -> Program:
    return Program(
        ops=tuple(ops),
        tensors=tensors,
        buffers=buffers,
        cache=cache,
        vocab_size=VOCAB,
        max_context=context,
    )


@lru_cache(maxsize=8)
def _packed(chosen: TensorPlan, rows: int, cols: int) -> dict[str, Array]:
    """Packed planes of a random matrix whose products neither grow nor shrink."""
    fmt = get_format(chosen.format)
    rng = np.random.default_rng(0)
    tile = rng.standard_normal((min(_TILE, rows), cols), dtype=np.float32) / np.float32(np.sqrt(cols))
    repeats = -(-rows // len(tile))
    code = trellis_of(fmt)
    if code is None:
        planes = fmt.encode(np.tile(tile, (repeats, 1))[:rows])
    else:  # any codes are good ones, and the best take long to find
        planes = {p.name: rng.integers(0, 256, p.shape(rows, cols), np.uint8) for p in fmt.codes}
        scale = np.tile(wanted_scales(tile, code), (repeats, 1))[:rows]
        planes |= tensor_grid(scale)
    return pack(chosen.format, chosen.packing, planes, rows, cols)


def _own(array: Array) -> Array:
    """A copy on a cache line's boundary."""
    room = np.empty(array.nbytes + _ALIGN, np.uint8)
    at = -room.ctypes.data % _ALIGN
    mine: Array = room[at : at + array.nbytes].view(array.dtype)
    mine[:] = array
    return mine


def _tokenizer(vocab: int) -> bytes:
    """A tokenizer.json of whole words."""
    words = {f"t{i}": i for i in range(vocab)}
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [],
            "normalizer": None,
            "pre_tokenizer": {"type": "WhitespaceSplit"},
            "post_processor": None,
            "decoder": None,
            "model": {"type": "WordLevel", "vocab": words, "unk_token": "t0"},
        }
    ).encode()
