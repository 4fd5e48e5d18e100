"""The planner at the cost of a larger model: same answers, and so the draft's real acceptance.

Feed-forwards are widened, with zeros in the columns of `down` that the new rows would reach, and layers are
added whose output projections are zero: what they compute never arrives. Every weight is still read and
multiplied. The shape stands for a 0.5B model.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

LAYERS = 24
WIDE = 24_576  # 24 layers of 3 x 256 x 24,576 are 0.45 B parameters
_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_padded(source: Path, folder: Path) -> Path:
    """Write the padded model as a Hugging Face folder, unless it is there; returns the folder."""
    if (folder / "model.safetensors").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(source / "model.safetensors")
    hidden, narrow, real = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    rng = np.random.default_rng(7)

    def noise(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape, np.float32) * 0.02).astype(np.float16)

    out = {name: value for name, value in tensors.items() if ".layers." not in name}
    for layer in range(LAYERS):
        where = f"model.layers.{layer}."
        like = f"model.layers.{min(layer, real - 1)}."
        for name, value in tensors.items():
            if not name.startswith(like):
                continue
            rest = name.removeprefix(like)
            new = layer >= real
            if rest in ("mlp.gate_proj.weight", "mlp.up_proj.weight"):
                value = noise(WIDE, hidden) if new else np.concatenate([value, noise(WIDE - narrow, hidden)])
            elif rest == "mlp.down_proj.weight":
                wide = np.zeros((hidden, WIDE), np.float16)
                if not new:
                    wide[:, :narrow] = value
                value = wide
            elif new and rest == "self_attn.o_proj.weight":
                value = np.zeros_like(value)
            out[where + rest] = value
    config |= {"num_hidden_layers": LAYERS, "intermediate_size": WIDE}
    save_file(out, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name in _FILES:
        shutil.copy(source / name, folder / name)
    return folder
