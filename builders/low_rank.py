"""LoRA on a frozen quantized model (QLoRA, Dettmers et al. 2023, 2305.14314): y = W x + scale * B (A x).

W is decoded from its planes for each product, forward and backward, and never kept; only A and B learn. A is
shared by the tensors that one checkpoint module became, each has its rows of B, as PEFT has it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from builders.packed_base import PackedBase
from builders.torch_program import TorchProgram
from edge_runtime.engine.folder import MAX_CONFIG, parse_object, read_capped
from edge_runtime.engine.ops import Embed, Linear, Logits
from edge_runtime.engine.peft import CONFIG, WEIGHTS, linear_modules, names_module
from edge_runtime.errors import BadCheckpoint, BadConfig, ValueOutOfRange, nearest

ALL = "all"
# Keys of adapter_config.json: alike in every adapter that is trained here, and of each its own
_SAME: dict[str, Any] = {
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "use_dora": False,
    "use_rslora": False,
}
_OWN = ("base_model_name_or_path", "lora_alpha", "r", "target_modules")


@dataclass(frozen=True, slots=True)
class Update:
    """Module whose A and B a tensor uses, and its rows of B."""

    module: str
    start: int
    stop: int


class LowRankProgram(TorchProgram):
    """The base with its adapter. `tensors`: `MODULE.lora_A.weight` f32 (rank, inputs), uniform as PEFT
    begins, and `MODULE.lora_B.weight` (outputs, rank), 0, so that an untrained adapter changes nothing.

    Raises BadConfig naming the nearest module for a target that is none.
    """

    def __init__(self, base: PackedBase, targets: Sequence[str], rank: int, alpha: float, seed: int) -> None:
        super().__init__(base.program, self._vectors)
        self._base = base
        self._kept: dict[str, Tensor] = {}
        self.rank, self.alpha, self.scale = rank, alpha, alpha / rank
        modules = linear_modules(base.origins, base.program)
        self.targets = chosen_targets(targets, list(modules))
        self.updates: dict[str, Update] = {}
        self.tensors: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for module, parts in modules.items():
            if not any(names_module(target, module) for target in self.targets):
                continue
            specs = [(row, tensor, base.program.tensors[tensor]) for row, tensor in parts]
            for row, tensor, spec in specs:
                self.updates[tensor] = Update(module, row, row + spec.rows)
            inputs, outputs = specs[0][2].cols, max(row + spec.rows for row, _, spec in specs)
            a = torch.empty(rank, inputs)
            torch.nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            self.tensors[f"{module}.lora_A.weight"] = a.requires_grad_(True)
            self.tensors[f"{module}.lora_B.weight"] = torch.zeros(outputs, rank).requires_grad_(True)

    @property
    def context(self) -> int:
        return self.program.max_context

    def product(self, op: Linear | Logits, x: Tensor) -> Tensor:
        out: Tensor = _Frozen.apply(x, lambda: torch.from_numpy(self._base.weights(op.weight)))
        if op.bias is not None:
            out = out + self.weight(op.bias)[0]
        update = self.updates.get(op.weight)
        if update is None:
            return out
        a = self.tensors[f"{update.module}.lora_A.weight"]
        b = self.tensors[f"{update.module}.lora_B.weight"][update.start : update.stop]
        return out + self.scale * F.linear(F.linear(x, a), b)

    def embedded(self, op: Embed, tokens: Tensor) -> Tensor:
        rows = self._base.weights.rows(op.weight, tokens.reshape(-1).numpy())
        return torch.from_numpy(rows).reshape(*tokens.shape, -1)

    def _vectors(self, name: str) -> Tensor:
        """Vectors are small and stay decoded."""
        if name not in self._kept:
            self._kept[name] = torch.from_numpy(self._base.weights(name))
        return self._kept[name]


class _Frozen(torch.autograd.Function):
    """x @ W.T with a W that is decoded when it is needed: no copy of it lives between the two passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, decode: Callable[[], Tensor]) -> Tensor:
        ctx.decode = decode
        return F.linear(x, decode())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.decode(), None


def chosen_targets(asked: Sequence[str], modules: Sequence[str]) -> tuple[str, ...]:
    """Names of modules as PEFT's target_modules has them. `q` stands for `q_proj`, "all" for every linear."""
    last = dict.fromkeys(module.rsplit(".", 1)[-1] for module in modules)
    if tuple(asked) == (ALL,):
        return tuple(last)
    if not asked:
        raise BadConfig(f"--targets names no layer; give some of {', '.join(last)}, or {ALL}")
    found: dict[str, None] = {}
    for name in asked:
        ways = (name, f"{name}_proj")
        hit = next((way for way in ways if any(names_module(way, module) for module in modules)), None)
        if hit is None:
            raise BadConfig(f"--targets {name!r} is no linear layer of this model; {nearest(name, last)}")
        found[hit] = None
    return tuple(found)


def write_peft(folder: Path, model: LowRankProgram, base_name: str) -> None:
    """adapter_model.safetensors in f16, as the runtime uses it, and adapter_config.json, as PEFT reads both.
    Raises ValueOutOfRange for what f16 cannot hold."""
    folder.mkdir(parents=True, exist_ok=True)
    halves = {f"base_model.model.{name}": t.detach().half() for name, t in model.tensors.items()}
    for name, tensor in halves.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ValueOutOfRange(f"{name!r} left the range of f16 in training; use a lower --rate")
    path = folder / WEIGHTS
    save_file({n: t.contiguous() for n, t in halves.items()}, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors writes it for its owner alone
    own = (base_name, model.alpha, model.rank, list(model.targets))
    config = _SAME | dict(zip(_OWN, own, strict=True))
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / CONFIG).write_text(text, encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether `write_peft` wrote the config there: PEFT itself writes keys that it does not."""
    try:
        found = parse_object(read_capped(folder / CONFIG, MAX_CONFIG), CONFIG)
    except BadCheckpoint:
        return False
    return found.keys() == {*_SAME, *_OWN} and all(found[key] == value for key, value in _SAME.items())
