"""The decoder that most language models share: traits in, Program out.

One record says what an architecture's layers look like; `build` writes the ops. An architecture file reads
its config with `read_decoder`, replaces the traits that differ, and calls `build`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from builders.architecture import Architecture, TensorSource
from builders.model_config import ModelConfig
from builders.rotary import Rotary
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
from edge_runtime.engine.program import MAX_OPS, CacheSlot, Program, Role, TensorSpec
from edge_runtime.errors import BadConfig, Unsupported, nearest

MAX_LAYERS = MAX_OPS // 24  # a layer takes at most 22 ops
Gate = Literal["silu", "gelu", "gelu_tanh", "relu"]
ACTIVATIONS: dict[str, Gate] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True, slots=True)
class Layer:
    """What may differ from layer to layer: rotary table (None = no positions), attention window in tokens."""

    rotary: Rotary | None
    window: int | None = None

    def reach(self, longest: int) -> int:
        """Positions that this layer's rotary table serves, `longest` where it sets no end."""
        return longest if self.rotary is None or self.rotary.reach is None else self.rotary.reach


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoder:
    """Traits of a pre-norm decoder with gated feed-forward. Widths in values, contexts in tokens."""

    vocab_size: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    eps: float
    activation: Gate
    tied: bool
    layers: tuple[Layer, ...] = ()
    norm_offset: float = 0.0  # norms scale by weight + offset
    qk_norm: bool = False  # RMS norm on each head of q and k, before rotation
    post_norms: bool = False  # a second norm behind attention and feed-forward (four a layer)
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    fused: bool = False  # checkpoint holds qkv_proj and gate_up_proj
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_scale: float = 1.0
    attention_scale: float | None = None  # None: 1 / sqrt(head_dim)
    attention_softcap: float | None = None
    logits_softcap: float | None = None


def read_decoder(
    config: ModelConfig,
    *,
    kv_heads_default: bool = False,
    head_dim: int | None = None,
    activation_key: str = "hidden_act",
    activation: str = "silu",
    tied: bool = False,
) -> Decoder:
    """The traits that every config names alike, without layers.

    kv_heads_default: an absent num_key_value_heads means one for each head. head_dim: what an absent head_dim
    means (None: hidden_size / heads). activation and tied: what absent keys mean.
    """
    hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
    head_dim = config.size("head_dim", head_dim or max(hidden // heads, 1))
    kv_heads = config.size("num_key_value_heads", *((heads,) if kv_heads_default else ()))
    if heads % kv_heads:
        raise BadConfig(
            f"{config.path}: {heads} attention heads cannot share {kv_heads} key/value heads evenly"
        )
    name = config.read(str, activation_key, activation)
    if name not in ACTIVATIONS:
        raise Unsupported(
            f"{config.path}: {activation_key} {name!r} is not supported; {nearest(name, ACTIVATIONS)}"
        )
    return Decoder(
        vocab_size=config.size("vocab_size"),
        hidden=hidden,
        intermediate=config.size("intermediate_size"),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        max_context=config.size("max_position_embeddings"),
        eps=config.positive("rms_norm_eps"),
        activation=ACTIVATIONS[name],
        tied=config.read(bool, "tie_word_embeddings", tied),
    )


def layer_count(config: ModelConfig) -> int:
    """Bounded before anything is built for each layer."""
    count = config.size("num_hidden_layers")
    if count > MAX_LAYERS:
        raise BadConfig(f"{config.path}: num_hidden_layers is {count}, expected 1 to {MAX_LAYERS}")
    return count


def layer_types(config: ModelConfig, default: list[str]) -> list[str]:
    """`layer_types` of the config, or `default`: "full_attention" or "sliding_attention" for each layer."""
    types = config.read_or_null(list, "layer_types", None) or default
    if len(types) != len(default):
        raise BadConfig(
            f"{config.path}: layer_types has {len(types)} entries, num_hidden_layers is {len(default)}"
        )
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise Unsupported(
                f"{config.path}: layer type {kind!r} is not supported, only full and sliding attention"
            )
    return types


def window_of(config: ModelConfig, kind: str, window: int | None) -> int | None:
    """The window of a layer of that type. Raises BadConfig where a sliding layer has none."""
    if kind == "full_attention":
        return None
    if window is None:
        raise BadConfig(f"{config.path}: layer_types has sliding_attention but no sliding_window is in use")
    return window


def read_window(config: ModelConfig, default: int | None = None) -> int | None:
    """`sliding_window` in tokens; null means none, absent means `default`."""
    window = config.read_or_null(int, "sliding_window", default)
    if window is not None and window < 1:
        raise BadConfig(f"{config.path}: sliding_window is {window}, expected at least 1")
    return window


def uniform_windows(config: ModelConfig, count: int, default: int | None) -> list[int | None]:
    """For families whose window holds in all layers; mixed layer_types belong to another model."""
    window = read_window(config, default)
    kind = "full_attention" if window is None else "sliding_attention"
    types = layer_types(config, [kind] * count)
    if types != [kind] * count:
        raise Unsupported(
            f"{config.path}: layer_types {sorted(set(types))} disagree with sliding_window {window}, which "
            "this architecture applies to every layer; use the architecture that mixes them"
        )
    return [window] * count


def qwen_windows(config: ModelConfig, count: int) -> list[int | None]:
    """Layers from max_window_layers on slide, if use_sliding_window; `layer_types` wins where present."""
    window = read_window(config, 4096)
    if not config.read(bool, "use_sliding_window", False):
        window = None
    full = config.read(int, "max_window_layers", 28)
    slides = [
        "sliding_attention" if window is not None and i >= full else "full_attention" for i in range(count)
    ]
    return [window_of(config, kind, window) for kind in layer_types(config, slides)]


@dataclass(slots=True)
class _Writer:
    """Collects ops, tensors and sources; every weight is declared where its op is written."""

    ops: list[AnyOp] = field(default_factory=list)
    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    sources: dict[str, TensorSource] = field(default_factory=dict)

    def tensor(self, name: str, rows: int, cols: int, role: Role, source: TensorSource) -> str:
        self.tensors[name] = TensorSpec(rows, cols, role)
        self.sources[name] = source
        return name

    def norm(self, x: str, out: str, name: str, key: str, decoder: Decoder, group: int = 0) -> None:
        source = TensorSource(key, offset=decoder.norm_offset)
        weight = self.tensor(name, 1, group or decoder.hidden, "vector", source)
        self.ops.append(Norm(x=x, out=out, weight=weight, eps=decoder.eps, group=group))

    def linear(
        self,
        x: str,
        out: str,
        name: str,
        key: str,
        shape: tuple[int, int],
        bias: bool,
        first_row: int | None = None,
    ) -> None:
        """`first_row`: where this matrix starts inside a fused one."""
        rows = None if first_row is None else (first_row, first_row + shape[0])
        weight = self.tensor(name, *shape, "matrix", TensorSource(f"{key}.weight", rows))
        shift = None
        if bias:
            shift = self.tensor(f"{name}.bias", 1, shape[0], "vector", TensorSource(f"{key}.bias", rows))
        self.ops.append(Linear(x=x, out=out, weight=weight, bias=shift))

    def rope(self, x: str, rotary: Rotary, head_dim: int) -> None:
        table = rotary.inv_freq.reshape(1, -1)
        tables = {n: s.constant for n, s in self.sources.items() if s.constant is not None}
        name = next((n for n, known in tables.items() if np.array_equal(known, table)), None)
        if name is None:
            name = f"rope.{len(tables)}" if tables else "rope"
            self.tensor(name, 1, table.shape[1], "vector", TensorSource("", constant=table))
        self.ops.append(Rope(x=x, inv_freq=name, head_dim=head_dim, scale=rotary.scale))


def build(decoder: Decoder) -> Architecture:
    """Write the Program and check it. Raises BadConfig where the traits contradict each other."""
    d = decoder
    w = _Writer()
    q_width, kv_width = d.heads * d.head_dim, d.kv_heads * d.head_dim
    table = TensorSource("model.embed_tokens.weight")
    # A tied table is read whole by every step as the head, so the head's care decides its format
    embed = w.tensor("embed", d.vocab_size, d.hidden, "head" if d.tied else "embedding", table)
    w.ops.append(Embed(out="hidden", weight=embed, scale=d.embed_scale))
    windows = [_bites(layer.window, d.max_context) for layer in d.layers]
    for i, layer in enumerate(d.layers):
        _attention(w, d, i, layer.rotary, windows[i])
        _feed_forward(w, d, i)
    w.norm("hidden", "normed", "norm", "model.norm.weight", d)
    head = embed
    if not d.tied:
        head = w.tensor("head", d.vocab_size, d.hidden, "head", TensorSource("lm_head.weight"))
    w.ops.append(Logits(x="normed", weight=head, scale=d.logits_scale, softcap=d.logits_softcap))
    program = Program(
        ops=tuple(w.ops),
        tensors=w.tensors,
        buffers={
            "hidden": d.hidden,
            "normed": d.hidden,
            "q": q_width,
            "k": kv_width,
            "v": kv_width,
            "mixed": q_width,
            "projected": d.hidden,
            "gate": d.intermediate,
            "up": d.intermediate,
        },
        cache=tuple(CacheSlot(d.kv_heads, d.head_dim, window) for window in windows),
        vocab_size=d.vocab_size,
        max_context=min(d.max_context, *(layer.reach(d.max_context) for layer in d.layers)),
    )
    program.check()
    return Architecture(program, w.sources)


def _bites(window: int | None, context: int) -> int | None:
    """The window, unless it is so wide that it never hides a key."""
    return window if window is not None and window < context else None


def _attention(w: _Writer, d: Decoder, i: int, rotary: Rotary | None, window: int | None) -> None:
    name, key = f"layers.{i}", f"model.layers.{i}"
    w.norm("hidden", "normed", f"{name}.attention_norm", f"{key}.input_layernorm.weight", d)
    first_row = 0
    for side, heads in (("q", d.heads), ("k", d.kv_heads), ("v", d.kv_heads)):
        shape = (heads * d.head_dim, d.hidden)
        if d.fused:
            w.linear(
                "normed", side, f"{name}.{side}", f"{key}.self_attn.qkv_proj", shape, d.qkv_bias, first_row
            )
            first_row += shape[0]
        else:
            w.linear("normed", side, f"{name}.{side}", f"{key}.self_attn.{side}_proj", shape, d.qkv_bias)
    for side in ("q", "k"):
        if d.qk_norm:
            w.norm(side, side, f"{name}.{side}_norm", f"{key}.self_attn.{side}_norm.weight", d, d.head_dim)
        if rotary is not None:
            w.rope(side, rotary, d.head_dim)
    w.ops.append(KvAppend(k="k", v="v", layer=i))
    scale = d.head_dim**-0.5 if d.attention_scale is None else d.attention_scale
    w.ops.append(
        Attention(
            q="q",
            out="mixed",
            layer=i,
            heads=d.heads,
            kv_heads=d.kv_heads,
            head_dim=d.head_dim,
            scale=scale,
            window=window,
            softcap=d.attention_softcap,
        )
    )
    shape = (d.hidden, d.heads * d.head_dim)
    w.linear("mixed", "projected", f"{name}.o", f"{key}.self_attn.o_proj", shape, d.o_bias)
    if d.post_norms:
        post = f"{key}.post_attention_layernorm.weight"
        w.norm("projected", "projected", f"{name}.attention_post_norm", post, d)
    w.ops.append(Add(a="hidden", b="projected", out="hidden", scale=d.residual_scale))


def _feed_forward(w: _Writer, d: Decoder, i: int) -> None:
    name, key = f"layers.{i}", f"model.layers.{i}"
    # With four norms a layer, "post_attention" is the one behind attention; with two, the one before this
    before = "pre_feedforward_layernorm" if d.post_norms else "post_attention_layernorm"
    w.norm("hidden", "normed", f"{name}.mlp_norm", f"{key}.{before}.weight", d)
    shape = (d.intermediate, d.hidden)
    for side, first_row in (("gate", 0), ("up", d.intermediate)):
        if d.fused:
            w.linear(
                "normed", side, f"{name}.{side}", f"{key}.mlp.gate_up_proj", shape, d.mlp_bias, first_row
            )
        else:
            w.linear("normed", side, f"{name}.{side}", f"{key}.mlp.{side}_proj", shape, d.mlp_bias)
    w.ops.append(Activation(x="gate", up="up", out="gate", kind=d.activation))
    shape = (d.hidden, d.intermediate)
    w.linear("gate", "projected", f"{name}.down", f"{key}.mlp.down_proj", shape, d.mlp_bias)
    if d.post_norms:
        post = f"{key}.post_feedforward_layernorm.weight"
        w.norm("projected", "projected", f"{name}.mlp_post_norm", post, d)
    w.ops.append(Add(a="hidden", b="projected", out="hidden", scale=d.residual_scale))
