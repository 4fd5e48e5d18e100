"""Medusa heads in training: their tensors, what they are asked, and one step (torch).

Head k on a hidden row h (the input of the model's own head) gives head_k @ (h + silu(proj_k @ h + bias_k)),
the token k places after the next one. Loss: cross-entropy of head k times 0.8^k (Cai et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from builders.archs import read_program
from builders.lessons import Lesson, batches
from builders.sources import open_source, read_vocabulary
from builders.sources.medusa import CONFIG, WEIGHTS, MedusaConfig, tensor_keys
from builders.texts import ModelText
from builders.training import Run
from edge_runtime.errors import Unsupported

if TYPE_CHECKING:
    import torch

DECAY = 0.8  # of the loss from head to head
LOGITS_AT_ONCE = 1 << 23  # of one product with a head: bounds the memory of large vocabularies


@dataclass
class Heads(Run):
    """Heads 1 to `count`; `tensors` are theirs by checkpoint name."""

    count: int = 0


class Base:
    """The frozen model: hidden rows of token rows, and where its own head starts the others."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModelForCausalLM
            from transformers.utils import logging
        except ImportError:
            raise Unsupported(
                "training needs torch and transformers: pip install 'edge-runtime[train]'"
            ) from None
        import torch

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        with open_source(folder) as source:  # our own reading proves the folder before any library sees it
            program = read_program(source.config).program
            digests = source.sha256()
            self.name = source.name
            self.text = ModelText(source, read_vocabulary(source, program.vocab_size))
        self.sha256 = {n: d for n, d in digests.items() if n.endswith(".safetensors")}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.hidden_size = program.hidden_width
        self.vocab_size = program.vocab_size
        self.context = program.max_context
        last = program.heads[0]
        # A head has no scale of its own, so the model's (Granite) goes into the weights; a soft cap
        # (Gemma 2) keeps the order of the logits and is left out.
        self.head = self.model.get_output_embeddings().weight * last.scale

    def hidden(self, ids: torch.Tensor) -> torch.Tensor:
        """Inputs of the logits op (rows, length, hidden) of ids (rows, length).

        Rows are padded on the right, where a causal model's other tokens cannot see it.
        """
        import torch

        with torch.no_grad():
            out: torch.Tensor = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        return out


def new_heads(base: Base, count: int, rate: float) -> Heads:
    import torch

    tensors: dict[str, torch.Tensor] = {}
    for k in range(1, count + 1):
        keys = tensor_keys(k)
        tensors[keys["proj"]] = torch.zeros(base.hidden_size, base.hidden_size)
        tensors[keys["proj_bias"]] = torch.zeros(base.hidden_size)
        tensors[keys["head"]] = base.head.detach().clone()
    for tensor in tensors.values():
        tensor.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(tensors.values()), lr=rate, weight_decay=0.0)
    return Heads(tensors, optimizer, {}, count=count)


def logits(heads: Heads, k: int, rows: torch.Tensor) -> torch.Tensor:
    """Head k (counted from 1) on hidden rows (n, hidden): (n, vocabulary)."""
    import torch

    names = tensor_keys(k)
    proj, bias, head = (heads.tensors[names[n]] for n in ("proj", "proj_bias", "head"))
    return (rows + torch.nn.functional.silu(rows @ proj.T + bias)) @ head.T


@dataclass(frozen=True, slots=True)
class Asked:
    """What a batch asks of each head: hidden rows (n, hidden) and the tokens (n,) that they should give."""

    rows: list[torch.Tensor]
    targets: list[torch.Tensor]


def ask(base: Base, batch: Sequence[Lesson], count: int) -> Asked:
    """From position p on (its next token is learned) head k is asked for the token at p + 1 + k."""
    import torch

    width = max(len(lesson.ids) for lesson in batch)
    ids = torch.zeros(len(batch), width, dtype=torch.int64)
    length = torch.tensor([len(lesson.ids) for lesson in batch])[:, None]
    start = torch.tensor([lesson.start for lesson in batch])[:, None]
    for i, lesson in enumerate(batch):
        ids[i, : len(lesson.ids)] = torch.tensor(lesson.ids)
    hidden = base.hidden(ids)
    at = torch.arange(width)[None]
    rows, targets = [], []
    for k in range(1, count + 1):
        where = ((at >= start - 1) & (at + 1 + k < length)).nonzero()
        rows.append(hidden[where[:, 0], where[:, 1]])
        targets.append(ids[where[:, 0], where[:, 1] + 1 + k])
    return Asked(rows, targets)


def train_step(heads: Heads, asked: Asked, vocab_size: int) -> float:
    """One step of the optimizer; returns the loss. Logits are made piece by piece, gradients add up."""
    import torch

    heads.optimizer.zero_grad(set_to_none=True)
    total = 0.0
    piece = max(LOGITS_AT_ONCE // vocab_size, 1)
    for k, (rows, targets) in enumerate(zip(asked.rows, asked.targets, strict=True), 1):
        for x, wanted in zip(rows.split(piece), targets.split(piece), strict=True):
            if len(wanted):
                loss = torch.nn.functional.cross_entropy(logits(heads, k, x), wanted, reduction="sum")
                loss = loss * (DECAY**k / len(targets))
                loss.backward()
                total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(heads.tensors.values(), 1.0)
    heads.optimizer.step()
    return total


def accuracy(heads: Heads, base: Base, lessons: Sequence[Lesson], tokens: int) -> list[float]:
    """Share of right first choices of each head, with its weights rounded to f16 as they are stored."""
    import torch

    rounded = {name: t.detach().half().float() for name, t in heads.tensors.items()}
    stored = Heads(rounded, heads.optimizer, {}, count=heads.count)
    right, asked_for = [0] * heads.count, [0] * heads.count
    seen = 0
    with torch.no_grad():
        for batch in batches(lessons, tokens, 0):
            asked = ask(base, batch, heads.count)
            for k, (rows, wanted) in enumerate(zip(asked.rows, asked.targets, strict=True)):
                if len(wanted):
                    right[k] += int((logits(stored, k + 1, rows).argmax(-1) == wanted).sum())
                asked_for[k] += len(wanted)
            seen += len(batch)
            if seen >= len(lessons):
                break
    return [r / max(n, 1) for r, n in zip(right, asked_for, strict=True)]


def identity_of(config: MedusaConfig, seed: int) -> dict[str, Any]:
    """What makes a run: the state of another is not taken up."""
    return {"kind": "medusa", "heads": msgspec.to_builtins(config), "seed": seed}


def write_heads(heads: Heads, folder: Path, config: MedusaConfig) -> None:
    """medusa_config.json and model.safetensors in f16."""
    import torch
    from safetensors.torch import save_file

    path = folder / WEIGHTS
    save_file({n: t.detach().to(torch.float16).contiguous() for n, t in heads.tensors.items()}, path)
    path.chmod(0o644)  # safetensors writes it for its owner alone
    (folder / CONFIG).write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
