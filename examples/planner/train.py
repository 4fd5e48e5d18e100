"""Train the planner, its tokenizer and its draft.

    python examples/planner/train.py                        # the target, then the draft
    python examples/planner/train.py --only draft --minutes 10

An interrupted run continues from its last checkpoint (build/planner/); --fresh starts over.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from batches import NOT_LEARNED, Batch, make_batch
from cases import Example
from evaluate import accuracy
from grammar import HELDOUT_SEED, commands, write_heldout
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from shapes import config, write_model
from skills import write_schema
from tokenizers import Tokenizer
from tokens import train_tokenizer, write_tokenizer
from transformers import LlamaForCausalLM
from transformers.utils import logging as transformers_logging

HERE = Path(__file__).resolve().parent
CHECKPOINTS = HERE.parents[1] / "build" / "planner"

PEAK = {"model": 3e-3, "draft": 4e-3}
DEFAULT_MINUTES = {"model": 77.0, "draft": 3.0}
WARM_UP_STEPS = 100
FLOOR = 0.01  # of the peak learning rate, at the end
EVALUATE_EVERY = 400
EVALUATED = 256
TOKENIZER_COMMANDS = 40_000

console = Console(width=110)


@dataclass
class Run:
    """One model's training: what is saved in a checkpoint, and what is counted."""

    model: LlamaForCausalLM
    optimizers: tuple[torch.optim.Optimizer, ...]
    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    examples: int = 0

    def save(self, path: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "examples": self.examples,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        torch.save(state, part)
        os.replace(part, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds = state["step"], state["seconds"]
        self.tokens, self.examples = state["tokens"], state["examples"]


def loss_of(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden.flatten(0, 1)[batch.places])
    return torch.nn.functional.cross_entropy(logits.float(), batch.targets, ignore_index=NOT_LEARNED)


def learning_rate(role: str, step: int, done: float) -> float:
    """Linear warm-up by step, then a cosine over the run (`done` goes from 0 to 1)."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return PEAK[role] * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def new_run(role: str, tokenizer: Tokenizer, seed: int) -> Run:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config(role, tokenizer.get_vocab_size()))
    # Muon takes the matrices inside the layers, AdamW the embedding and the gains.
    inner = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]
    outer = [p for name, p in model.named_parameters() if p.dim() == 1 or "embed" in name]
    muon = torch.optim.Muon(inner, lr=PEAK[role], weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(outer, lr=PEAK[role], betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return Run(model, (muon, adamw))


def validation() -> list[Example]:
    """Commands of held-out combinations, but not those of heldout.jsonl: nothing is tuned on that file."""
    return [(c.prompt, c.expected) for c in islice(commands(HELDOUT_SEED + 1, "heldout"), EVALUATED)]


def rounded_accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, examples: list[Example]) -> float:
    """Accuracy of the weights as they will be stored: rounded to f16."""
    stored = LlamaForCausalLM(model.config).eval()
    stored.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    return accuracy(stored, tokenizer, examples)


def progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(), TimeRemainingColumn(), console=console,
        disable=not console.is_terminal,
    )  # fmt: skip


def train(role: str, run: Run, tokenizer: Tokenizer, options: argparse.Namespace) -> Iterator[float]:
    """Train to the end of the budget; yields after each step how much of it is done."""
    minutes = options.minutes or DEFAULT_MINUTES[role]
    recent: deque[float] = deque(maxlen=50)
    while True:
        done = run.step / options.steps if options.steps else run.seconds / (60 * minutes)
        if done >= 1:
            return
        began = time.monotonic()
        batch = make_batch(tokenizer, options.seed, run.step)
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(role, run.step, done)
        loss = loss_of(run.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        for optimizer in run.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.step += 1
        recent.append(loss.item())
        run.tokens += batch.ids.numel()
        run.examples += batch.examples
        run.seconds += time.monotonic() - began
        if run.step % 50 == 0:
            speed = run.tokens / run.seconds
            console.print(
                f"{role} step {run.step} loss {sum(recent) / len(recent):.4f} {run.seconds / 60:.1f} min "
                f"{speed:,.0f} tokens/s {run.examples:,} commands"
            )
        yield done


def train_and_write(role: str, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    checkpoint = options.checkpoints / f"{role}.pt"
    run = new_run(role, tokenizer, options.seed)
    if checkpoint.is_file() and not options.fresh:
        run.restore(checkpoint)
        console.print(f"{role}: taken up at step {run.step}")
    parameters = sum(p.numel() for p in run.model.parameters())
    console.print(f"{role}: {parameters:,} parameters")
    examples = validation()
    folder = options.out / role
    write_tokenizer(tokenizer, folder)
    with progress_bar() as bar:
        task = bar.add_task(role, total=1.0, note="")
        for done in train(role, run, tokenizer, options):
            bar.update(task, completed=done, note=f"step {run.step}")
            if run.step % EVALUATE_EVERY == 0:
                run.save(checkpoint)
                right = rounded_accuracy(run.model, tokenizer, examples)
                console.print(f"{role} step {run.step} validation exact match {right:.2%}")
                write_model(run.model, folder)
    run.save(checkpoint)
    write_model(run.model, folder)
    right = rounded_accuracy(run.model, tokenizer, examples)
    console.print(
        f"{role}: {run.step} steps, {run.tokens:,} tokens, {run.examples:,} commands, "
        f"{run.seconds / 60:.1f} min; validation exact match {right:.2%}; {folder}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("model", "draft"), help="train one of the two")
    parser.add_argument("--minutes", type=float, help="training time of each model (default: 77, draft 3)")
    parser.add_argument("--steps", type=int, help="a number of steps instead of a time; repeats exactly")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--fresh", action="store_true", help="ignore and replace the checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    transformers_logging.set_verbosity_error()
    write_heldout(options.out / "heldout.jsonl")
    write_schema(options.out / "plan.schema.json")
    texts = (text for c in islice(commands(0), TOKENIZER_COMMANDS) for text in (c.prompt, c.expected))
    tokenizer = train_tokenizer(texts)
    for role in ("model", "draft"):
        if options.only in (None, role):
            train_and_write(role, tokenizer, options)


if __name__ == "__main__":
    main()
