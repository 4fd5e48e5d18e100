"""PEFT folders made by the tests, for the modules that a program's origins name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from edge_runtime.engine.manifest import Origin
from edge_runtime.engine.program import Program

PREFIX = "base_model.model."


def lora_config(**changes: Any) -> dict[str, Any]:
    """adapter_config.json as PEFT 0.18 writes it."""
    config: dict[str, Any] = {
        "alora_invocation_tokens": None,
        "alpha_pattern": {},
        "arrow_config": None,
        "auto_mapping": None,
        "base_model_name_or_path": "toy",
        "bias": "none",
        "corda_config": None,
        "ensure_weight_tying": False,
        "eva_config": None,
        "exclude_modules": None,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layer_replication": None,
        "layers_pattern": None,
        "layers_to_transform": None,
        "loftq_config": {},
        "lora_alpha": 16,
        "lora_bias": False,
        "lora_dropout": 0.05,
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "modules_to_save": None,
        "peft_type": "LORA",
        "peft_version": "0.18.0",
        "qalora_group_size": 16,
        "r": 4,
        "rank_pattern": {},
        "revision": None,
        "target_modules": ["q_proj", "gate_up_proj"],
        "target_parameters": None,
        "task_type": "CAUSAL_LM",
        "trainable_token_indices": None,
        "use_dora": False,
        "use_qalora": False,
        "use_rslora": False,
    }
    return config | changes


def module_shapes(program: Program, origins: Mapping[str, Origin]) -> dict[str, tuple[int, int]]:
    """Checkpoint module -> (outputs, inputs), of matrices alone."""
    shapes: dict[str, tuple[int, int]] = {}
    for tensor, origin in origins.items():
        spec = program.tensors[tensor]
        if spec.role == "matrix":
            rows = max(shapes.get(origin.key, (0, 0))[0], origin.row + spec.rows)
            shapes[origin.key] = (rows, spec.cols)
    return shapes


def random_weights(
    shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], seed: int = 0
) -> dict[str, np.ndarray]:
    """f32 lora_A and lora_B of every module in `ranks`, by key in the file. Values are ones that f16 has."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, rank in ranks.items():
        rows, cols = shapes[module]
        for side, shape in (("A", (rank, cols)), ("B", (rows, rank))):
            values = rng.normal(0, 0.2, shape).astype(np.float16).astype(np.float32)
            tensors[f"{PREFIX}{module}.lora_{side}.weight"] = values
    return tensors


def write_peft(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
