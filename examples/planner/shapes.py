"""The two models' shapes, and writing one as a standard Hugging Face folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokens import BOS, EOS, PAD
from transformers import LlamaConfig, LlamaForCausalLM

CONTEXT = 1024


def config(role: str, vocabulary: int) -> LlamaConfig:
    """The shape of `model` (the target) or `draft`: widths are multiples of 256, so every format fits."""
    layers, wide = {"model": (6, 768), "draft": (1, 256)}[role]
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """config.json, generation_config.json and model.safetensors in f16; each appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: value.detach().to(torch.float16).contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied to the embedding
    }
    part = folder / "model.safetensors.part"
    save_file(tensors, part, metadata={"format": "pt"})
    part.chmod(0o644)  # safetensors writes it for its owner alone
    os.replace(part, folder / "model.safetensors")
    shape = model.config.to_dict()
    shape |= {"architectures": ["LlamaForCausalLM"], "dtype": "float16", "torch_dtype": "float16"}
    # Readers older than transformers 5 look for the base at the top.
    shape["rope_theta"] = 10000.0
    ids = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    generation = {**ids, "do_sample": False, "max_new_tokens": 160}
    for name, content in (("config.json", shape), ("generation_config.json", generation)):
        part = folder / f"{name}.part"
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(part, folder / name)
