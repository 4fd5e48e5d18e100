"""PEFT folders become adapters: adapter_config.json and adapter_model.safetensors of a LoRA (Hu et al. 2021).

Weights are named after the checkpoint's modules, `base_model.model.<module>.lora_A.weight` (rank, inputs) and
`….lora_B.weight` (outputs, rank); the engine's origins say which tensors those modules became, so no model
name is needed here. A fused module is split by rows. y += scale * B @ (A @ x), scale = alpha / r, or
alpha / sqrt(r) for rank-stabilised LoRA (Kalajdzievski 2023, arXiv 2312.03732). What is not understood and
would change the meaning is refused by name. Nothing of a folder is ever executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edge_runtime.engine.adapter import MAX_RANK, Adapter, LowRank
from edge_runtime.engine.folder import contained, parse_object, read_capped
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Origin
from edge_runtime.engine.ops import Gather, Linear
from edge_runtime.engine.program import Program
from edge_runtime.engine.shard import Shard
from edge_runtime.errors import BadCheckpoint, BadConfig, Unsupported, ValueOutOfRange, nearest

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG = 1 << 20
MAX_HEADER = 4 << 20
MAX_ALPHA = 1e6
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_PATTERN = re.compile(r"\^?[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)*")

# Keys that say how the adapter was trained or where: the weights of the file show it.
# fmt: off
_IGNORED = frozenset({
    "auto_mapping", "base_model_name_or_path", "eva_config", "exclude_modules", "inference_mode",
    "layers_pattern", "layers_to_transform", "lora_dropout", "megatron_core", "peft_version",
    "qalora_group_size", "revision", "runtime_config", "task_type",
})
# fmt: on
# Keys that mean nothing at one value and another model at any other: (accepted values, what others mean).
_FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "alora_invocation_tokens": ((None,), "adapters that begin at certain tokens are not supported"),
    "arrow_config": ((None,), "routing between adapters is not supported"),
    "bias": (("none",), "the adapter changes the model's biases"),
    "corda_config": ((None,), "CorDA changes the base model"),
    "ensure_weight_tying": ((False,), "tied modules are not supported"),
    "fan_in_fan_out": ((False,), "transposed weights are not supported"),
    "init_lora_weights": (
        (True, False, None, "gaussian", "orthogonal", "eva"),
        "this start changes the base model, so the adapter does not fit the plain one; convert it with "
        "save_pretrained(path_initial_model_for_weight_conversion=...)",
    ),
    "kasa_config": ((None,), "KaSA is not supported"),
    "layer_replication": ((None,), "it repeats layers of the model"),
    "loftq_config": ((None, {}), "LoftQ changes the base model"),
    "lora_bias": ((False,), "biases inside the adapter are not supported"),
    "lora_ga_config": ((None,), "LoRA-GA changes the base model"),
    "megatron_config": ((None,), "Megatron modules are not supported"),
    "modules_to_save": ((None, []), "it replaces whole modules of the model"),
    "monteclora_config": ((None,), "MonteCLoRA is not supported"),
    "peft_type": (("LORA",), "only LoRA adapters are supported"),
    "target_parameters": ((None, []), "adapters on parameters of experts are not supported"),
    "trainable_token_indices": ((None,), "it changes rows of the embedding"),
    "use_bdlora": ((None,), "block-diagonal LoRA is not supported"),
    "use_dora": ((False,), "DoRA rescales the base weights"),
    "use_qalora": ((False,), "QALoRA is not supported"),
    "velora_config": ((None,), "VeLoRA is not supported"),
}
_READ = frozenset(("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern", "use_rslora"))


@dataclass(frozen=True, slots=True)
class _Config:
    """What decides the numbers. Patterns are looked through in the file's order, the first match counts."""

    rank: int
    alpha: float
    ranks: dict[str, int]
    alphas: dict[str, float]
    rank_stabilised: bool
    targets: tuple[str, ...] | None  # None: any module (a regular expression chose them)

    def rank_of(self, module: str) -> int:
        return next((r for p, r in self.ranks.items() if names_module(p, module)), self.rank)

    def scale_of(self, module: str) -> float:
        alpha = next((a for p, a in self.alphas.items() if names_module(p, module)), self.alpha)
        rank = self.rank_of(module)
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


def read_peft(folder: Path, origins: Mapping[str, Origin], program: Program) -> Adapter:
    """The updates of `program`'s tensors that a PEFT folder holds, in f16.

    `origins` are the part's: tensor -> checkpoint module and first row. Raises BadCheckpoint (incomplete,
    damaged, made for another model), BadConfig (a key or value that is not valid), Unsupported (an adapter of
    another kind), ValueOutOfRange (NaN, Inf, or more than f16 holds).
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise BadCheckpoint(f"{folder} is not a folder; give a PEFT folder (with {CONFIG})")
    path = contained(folder, CONFIG)
    if not path.exists():
        raise BadCheckpoint(f"{folder} has no {CONFIG}; is it a PEFT folder?")
    config = _read_config(parse_object(read_capped(path, MAX_CONFIG), CONFIG))
    path = contained(folder, WEIGHTS)
    if not path.exists():
        raise BadCheckpoint(
            f"{folder} has no {WEIGHTS}; pickles (adapter_model.bin) may run code when loaded and are never "
            "read: save the adapter with safe_serialization=True"
        )
    parts = linear_modules(origins, program)
    with Shard(path, WEIGHTS, MAX_HEADER) as shard:
        found: dict[str, LowRank] = {}
        for module in _modules(shard, parts, config):
            found |= _updates(shard, module, parts[module], program, config)
    _check_inputs(found, program)
    return {tensor: found[tensor] for tensor in program.tensors if tensor in found}


def _check_inputs(found: Adapter, program: Program) -> None:
    """An update multiplies the inputs in the order that it was trained with."""
    ordered = {op.out for op in program.ops if isinstance(op, Gather)}
    for op in program.ops:
        if isinstance(op, Linear) and op.weight in found and op.x in ordered:
            raise Unsupported(
                f"{op.weight!r} reads its inputs in another order (a checkpoint quantized with act-order), "
                "which adapters do not follow; build the engine from the unquantized checkpoint"
            )


def _read_config(values: dict[str, Any]) -> _Config:
    for key, (accepted, why) in _FIXED.items():
        if key in values and not any(values[key] == a and type(values[key]) is type(a) for a in accepted):
            raise Unsupported(f"{CONFIG}: {key!r} is {str(values[key])[:60]!r}: {why}")
    known = _READ | _IGNORED | _FIXED.keys()
    for key, value in values.items():
        if key not in known and value is not None:  # what is null is not in use
            raise BadConfig(
                f"{CONFIG}: key {key[:60]!r} is not known and may change the adapter's meaning; "
                f"{nearest(key[:60], known)}"
            )
    for key in ("peft_type", "r", "lora_alpha"):
        if key not in values:
            raise BadConfig(f"{CONFIG} has no {key!r}; is it a LoRA of PEFT?")
    rank_stabilised = values.get("use_rslora", False)
    if type(rank_stabilised) is not bool:
        raise BadConfig(f"{CONFIG}: 'use_rslora' is {str(rank_stabilised)[:60]!r}, expected true or false")
    targets = values.get("target_modules")
    if isinstance(targets, list) and all(isinstance(t, str) for t in targets):
        targets = tuple(targets)
    elif targets is not None and not isinstance(targets, str):
        raise BadConfig(f"{CONFIG}: 'target_modules' is {str(targets)[:60]!r}, expected names of modules")
    if values.get("layers_to_transform") is not None or values.get("exclude_modules"):
        targets = None  # which of them were adapted, the file shows
    return _Config(
        rank=_rank(values["r"], "r"),
        alpha=_alpha(values["lora_alpha"], "lora_alpha"),
        ranks={p: _rank(v, f"rank_pattern {p!r}") for p, v in _patterns(values, "rank_pattern").items()},
        alphas={p: _alpha(v, f"alpha_pattern {p!r}") for p, v in _patterns(values, "alpha_pattern").items()},
        rank_stabilised=rank_stabilised,
        targets=targets if isinstance(targets, tuple) else None,
    )


def _rank(value: Any, what: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise BadConfig(f"{CONFIG}: {what} is {str(value)[:60]}, expected a rank of 1 to {MAX_RANK}")
    return value


def _alpha(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= MAX_ALPHA:
        raise BadConfig(f"{CONFIG}: {what} is {str(value)[:60]}, expected a number of at most {MAX_ALPHA:g}")
    return float(value)


def _patterns(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """PEFT takes regular expressions here. Only names are taken: a foreign expression may run for ever."""
    found = values.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise BadConfig(f"{CONFIG}: {key!r} is a {type(found).__name__}, expected an object")
    for pattern in found:
        if not _PATTERN.fullmatch(pattern):
            raise Unsupported(f"{CONFIG}: {key!r} has {pattern[:60]!r}; only names of modules are supported")
    return found


def names_module(pattern: str, module: str) -> bool:
    """A name stands for itself and for every module that ends in it; with ^ for itself alone."""
    name = pattern.removeprefix("^")
    return module == name or (not pattern.startswith("^") and module.endswith(f".{name}"))


def linear_modules(origins: Mapping[str, Origin], program: Program) -> dict[str, list[tuple[int, str]]]:
    """module -> (first row, tensor) of every linear's matrix that it became, ascending."""
    linear = {op.weight for op in program.ops if isinstance(op, Linear)}
    parts: dict[str, list[tuple[int, str]]] = {}
    for tensor, origin in origins.items():
        if tensor in linear:
            parts.setdefault(origin.key, []).append((origin.row, tensor))
    return {module: sorted(rows) for module, rows in parts.items()}


def _modules(shard: Shard, parts: Mapping[str, Any], config: _Config) -> list[str]:
    """Every adapted module, all of them known and whole, and none missing that the config names."""
    sides: dict[str, set[str]] = {}
    for key in shard.entries:
        match = _KEY.fullmatch(key)
        if match is None:
            raise Unsupported(f"{WEIGHTS} holds {key[:120]!r}, {_kind(key)}")
        sides.setdefault(match[1], set()).add(match[2])
    if not sides:
        raise BadCheckpoint(f"{WEIGHTS} holds no tensors; it changes nothing")
    for module, found in sides.items():
        if module not in parts:
            hint = nearest(module, parts) if len(module) < 200 and len(parts) <= 1000 else ""
            raise BadCheckpoint(
                f"{WEIGHTS} adapts {module[:120]!r}, which is no linear layer of this model; {hint}"
            )
        if len(found) == 1:
            raise BadCheckpoint(f"{WEIGHTS} has only lora_{found.pop()} of {module!r}; it is incomplete")
    if config.targets is not None:
        stray = [m for m in sides if not any(names_module(t, m) for t in config.targets)]
        if stray:
            raise BadCheckpoint(f"{WEIGHTS} adapts {stray[0]!r}, of which 'target_modules' does not speak")
        absent = [m for m in parts if m not in sides and any(names_module(t, m) for t in config.targets)]
        if absent:
            raise BadCheckpoint(f"{WEIGHTS} lacks {absent[0]!r}, which 'target_modules' names; is it whole?")
    return list(sides)


def _kind(key: str) -> str:
    if "lora_magnitude_vector" in key:
        return "which belongs to DoRA; only plain LoRA is supported"
    if "lora_embedding_" in key:
        return "an adapter on the embedding, which is not supported"
    if key.endswith(".bias"):
        return "a bias, which is not supported"
    return "which is no update of low rank; only plain LoRA is supported"


def _updates(
    shard: Shard, module: str, tensors: list[tuple[int, str]], program: Program, config: _Config
) -> dict[str, LowRank]:
    """tensor -> update, of the tensors that the module became: all share A, each has its rows of B."""
    rank, scale = config.rank_of(module), config.scale_of(module)
    specs = [(row, name, program.tensors[name]) for row, name in tensors]
    outputs, inputs = max(row + spec.rows for row, _, spec in specs), specs[0][2].cols
    key_a, key_b = (f"base_model.model.{module}.lora_{side}.weight" for side in "AB")
    for key, wanted in ((key_a, (rank, inputs)), (key_b, (outputs, rank))):
        shape = shard.entries[key].shape
        if shape != wanted:
            raise BadCheckpoint(
                f"{key!r} has shape {shape}, the config and the model ask for {wanted}; is it for this model?"
            )
    a = _halved(shard.read(key_a), key_a)
    return {
        name: LowRank(a, _halved(shard.read(key_b, (row, row + spec.rows)), key_b), scale)
        for row, name, spec in specs
    }


def _halved(values: Array, key: str) -> Array:
    """f32 values as f16. Raises ValueOutOfRange on what f16 cannot hold."""
    if not np.isfinite(values).all():
        raise ValueOutOfRange(f"{WEIGHTS}: {key!r} holds NaN or Inf")
    if values.size and float(np.abs(values).max()) > float(np.finfo(np.float16).max):
        raise ValueOutOfRange(f"{WEIGHTS}: {key!r} holds {float(np.abs(values).max()):g}, beyond f16")
    return np.ascontiguousarray(values, np.float16)
