"""A random model with the structure that makes rounding hard in trained ones, of middle size and any seed.

Embeddings lie near a subspace with a decaying spectrum; a few channels of the residual stream and of the
norms are many times larger than the others (Dettmers et al. 2022; Sun et al. 2024); matrices are a low-rank
part with a decaying spectrum beside heavy-tailed noise; rows differ in size. So inputs are correlated and
channels differ in importance: what calibrated algorithms live on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from hf_folders import byte_tokenizer, llama_config, llama_shapes
from safetensors.numpy import save_file

from edge_runtime.engine.formats import Array

MIDDLE = {
    "hidden_size": 192,
    "intermediate_size": 448,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
OUTLIERS = 4  # channels
TIMES = 12.0  # as large as the others


def write_structured(folder: Path, seed: int, **changes: Any) -> Path:
    """Write a Hugging Face folder of a Llama of MIDDLE size; `changes` of its config win."""
    config = llama_config(**(MIDDLE | changes))
    rng = np.random.default_rng(seed)
    loud = rng.choice(config["hidden_size"], OUTLIERS, replace=False)
    tensors = {}
    for key, shape in llama_shapes(config).items():
        if len(shape) == 1:
            values = np.exp(rng.normal(0.0, 0.3, shape))
            if "layernorm" in key:
                values[loud] *= TIMES
            else:  # before the tied head: logits of a standard deviation of about 2, as trained models have
                values *= 2.0 / np.sqrt(config["hidden_size"] + OUTLIERS * TIMES**2)
        elif "embed" in key:
            values = _spectrum(rng, shape, 0.5)
            values[:, loud] *= TIMES
        else:
            values = 0.8 * _spectrum(rng, shape, 0.4) + 0.5 * _heavy(rng, shape)
            values *= np.exp(rng.normal(0.0, 0.4, (shape[0], 1)))  # rows differ in size
            values *= 1.5 / np.sqrt(shape[1])
            if "q_proj" in key or "k_proj" in key or "v_proj" in key or "gate" in key or "up" in key:
                values[:, loud] /= TIMES
        tensors[key] = values.astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(byte_tokenizer()))
    return folder


def _spectrum(rng: np.random.Generator, shape: tuple[int, ...], power: float) -> Array:
    """Entries of unit variance whose singular values fall as k ** -power."""
    rank = min(shape)
    left, right = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
    weights = np.arange(1, rank + 1) ** -power
    made: Array = (left * weights) @ right
    return made / made.std()


def _heavy(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Student's t with 4 degrees of freedom, unit variance."""
    made: Array = rng.standard_t(4, shape) / np.sqrt(2.0)
    return made
