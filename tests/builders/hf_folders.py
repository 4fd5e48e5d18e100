"""Hugging Face folders made by the tests: a random Llama of any size, sharded on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file


def llama_config(**changes: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return config | changes


def llama_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint key -> shape, in file order."""
    h, f, v = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv = h // config["num_attention_heads"] * config["num_key_value_heads"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (v, h)}
    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}."
        shapes |= {
            f"{p}input_layernorm.weight": (h,),
            f"{p}self_attn.q_proj.weight": (h, h),
            f"{p}self_attn.k_proj.weight": (kv, h),
            f"{p}self_attn.v_proj.weight": (kv, h),
            f"{p}self_attn.o_proj.weight": (h, h),
            f"{p}post_attention_layernorm.weight": (h,),
            f"{p}mlp.gate_proj.weight": (f, h),
            f"{p}mlp.up_proj.weight": (f, h),
            f"{p}mlp.down_proj.weight": (h, f),
        }
    shapes["model.norm.weight"] = (h,)
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (v, h)
    return shapes


def byte_tokenizer() -> dict[str, Any]:
    """A byte-level BPE without merges: 3 special tokens, then the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    letters = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(rest)}
    special = ["<unk>", "<s>", "</s>"]
    vocab = {t: i for i, t in enumerate(special)} | {letters[b]: 3 + b for b in range(256)}
    return {
        "version": "1.0",
        "added_tokens": [
            {
                "id": i,
                "content": t,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for i, t in enumerate(special)
        ],
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": False,
            "use_regex": False,
        },
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": False, "fuse_unk": False},
    }


def write_model(
    folder: Path,
    config: dict[str, Any] | None = None,
    *,
    shards: int = 1,
    seed: int = 0,
    dtype: str = "float32",
) -> Path:
    """Write a random model folder; with shards > 1 the tensors are spread over files named by an index."""
    config = config or llama_config()
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = llama_shapes(config)
    names = list(shapes)
    weight_map: dict[str, str] = {}
    for s in range(shards):
        mine = names[s * len(names) // shards : (s + 1) * len(names) // shards]
        tensors = {}
        for key in mine:
            shape = shapes[key]
            values = np.ones(shape) if len(shape) == 1 else rng.normal(0, shape[1] ** -0.5, shape)
            tensors[key] = values.astype(dtype)
        name = "model.safetensors" if shards == 1 else f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(mine, name)
    if shards > 1:
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder
