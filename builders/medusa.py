"""Train Medusa heads on a frozen model: python -m builders.medusa MODEL --jsonl chats.jsonl -o HEADS

Medusa-1 (Cai et al. 2024, arXiv 2401.10774): head k sees the hidden row h of a position (the input of the
model's own head, after the final norm) and predicts the token k places after the next one, by
head_k @ (h + silu(proj_k @ h + bias_k)). proj starts at zero and head_k as the model's own head, so an
untrained head says what the model says. Loss: cross-entropy of head k times 0.8^k. The model never changes.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import msgspec

from builders.archs import read_program
from builders.lessons import Lesson, batches, read_lessons
from builders.sources import open_source
from builders.sources.medusa import CONFIG, WEIGHTS, MedusaConfig, tensor_keys
from edge_runtime.cli.output import Answer, Parser, run_command, table
from edge_runtime.engine.manifest import MAX_HEADS
from edge_runtime.engine.ops import Logits
from edge_runtime.errors import BadConfig, Unsupported

if TYPE_CHECKING:
    import torch

EXAMPLES = (
    "python -m builders.medusa path/to/model --jsonl chats.jsonl --minutes 10 -o heads",
    "python -m builders.medusa path/to/model --text notes.txt --heads 3 --steps 500 -o heads",
)
DECAY = 0.8  # of the loss from head to head
WARM_UP_STEPS = 40
FLOOR = 0.02  # of the peak learning rate, at the end
LOGITS_AT_ONCE = 1 << 23  # of one product with a head: bounds the memory of large vocabularies
SAVE_SECONDS = 60.0
STATE = "training.safetensors"  # an interrupted run goes on from it; gone when the run is done


@dataclass
class Heads:
    """Trainable f32 tensors by checkpoint name, and the optimizer over them."""

    count: int
    tensors: dict[str, torch.Tensor]
    optimizer: torch.optim.AdamW
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)


class Base:
    """The frozen model: hidden rows of token rows, and where its own head starts the others."""

    def __init__(self, folder: Path) -> None:
        try:
            from transformers import AutoModelForCausalLM, AutoTokenizer
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
        self.sha256 = {n: d for n, d in digests.items() if n.endswith(".safetensors")}
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model.requires_grad_(False)
        self.hidden_size = program.hidden_width
        self.vocab_size = program.vocab_size
        self.context = program.max_context
        last = program.ops[-1]
        assert isinstance(last, Logits)  # Program.check proved it
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
    return Heads(count, tensors, torch.optim.AdamW(list(tensors.values()), lr=rate, weight_decay=0.0))


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
    stored = Heads(heads.count, rounded, heads.optimizer)
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


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up by step, then a cosine over the run (`done` goes from 0 to 1)."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def train(heads: Heads, base: Base, lessons: Sequence[Lesson], args: argparse.Namespace) -> Iterator[float]:
    """Train to the end of the budget; yields after each step how much of it is done."""
    source = batches(lessons, args.batch_tokens, args.seed)
    for _ in range(heads.step):  # a run taken up again sees what it would have seen
        next(source)
    while True:
        done = heads.step / args.steps if args.steps else heads.seconds / (60 * args.minutes)
        if done >= 1:
            return
        began = monotonic()
        for group in heads.optimizer.param_groups:
            group["lr"] = learning_rate(args.rate, heads.step, done)
        heads.losses.append(train_step(heads, ask(base, next(source), heads.count), base.vocab_size))
        heads.step += 1
        heads.seconds += monotonic() - began
        yield done


def save_state(heads: Heads, path: Path, config: MedusaConfig, seed: int) -> None:
    """Weights and moments in f32, so that the run goes on as if it had not stopped."""
    from safetensors.torch import save_file

    names = list(heads.tensors)
    moments = heads.optimizer.state_dict()["state"]
    tensors = {name: t.detach() for name, t in heads.tensors.items()}
    for i, kinds in moments.items():
        tensors |= {f"{kind}:{names[i]}": kinds[kind] for kind in ("exp_avg", "exp_avg_sq")}
    said = {"step": str(heads.step), "seconds": repr(heads.seconds), "run": _run_of(config, seed)}
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata=said)
    os.replace(part, path)


def restore_state(heads: Heads, path: Path, config: MedusaConfig, seed: int) -> None:
    """Raises BadConfig where the state is of another run."""
    import torch
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        said = file.metadata() or {}
        if said.get("run") != _run_of(config, seed):
            raise BadConfig(f"{path} is of a run with other options; repeat them, or give --fresh")
        heads.step, heads.seconds = int(said["step"]), float(said["seconds"])
        with torch.no_grad():
            for name, tensor in heads.tensors.items():
                tensor.copy_(file.get_tensor(name))
                moments = {kind: file.get_tensor(f"{kind}:{name}") for kind in ("exp_avg", "exp_avg_sq")}
                heads.optimizer.state[tensor] = {"step": torch.tensor(float(heads.step)), **moments}


def _run_of(config: MedusaConfig, seed: int) -> str:
    return json.dumps([msgspec.to_builtins(config), seed], sort_keys=True)


def write_heads(heads: Heads, folder: Path, config: MedusaConfig) -> None:
    """medusa_config.json and model.safetensors in f16; each appears whole or not at all."""
    import torch
    from safetensors.torch import save_file

    part = folder / f"{WEIGHTS}.part"
    save_file({n: t.detach().to(torch.float16).contiguous() for n, t in heads.tensors.items()}, part)
    part.chmod(0o644)  # safetensors writes it for its owner alone
    os.replace(part, folder / WEIGHTS)
    part = folder / f"{CONFIG}.part"
    part.write_bytes(msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    os.replace(part, folder / CONFIG)


def make_parser() -> Parser:
    parser = Parser("python -m builders.medusa", "Train Medusa heads on a frozen model.", EXAMPLES)
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="model folder; it is only read")
    add("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where the heads go")
    add("--heads", type=int, default=4, metavar="N", help="heads to train [4]")
    add("--text", type=Path, metavar="FILE", help="plain text to learn from")
    add("--jsonl", type=Path, metavar="FILE", help="chats, prompts with completions, or texts, one a line")
    add("--heldout", type=Path, metavar="FILE", help="text or .jsonl to measure on")
    add("--minutes", type=float, default=10.0, metavar="M", help="training time [10]")
    add("--steps", type=int, metavar="N", help="a number of steps instead; repeats exactly")
    add("--length", type=int, default=512, metavar="N", help="longest sequence, tokens [512]")
    add("--batch-tokens", type=int, default=4096, metavar="N", help="tokens of one step [4096]")
    add("--rate", type=float, default=1e-3, metavar="X", help="peak learning rate [0.001]")
    add("--seed", type=int, default=1, metavar="N", help="order of the texts [1]")
    add("--threads", type=int, default=0, metavar="N", help="cores [all]")
    add("--fresh", action="store_true", help="do not go on from an interrupted run")
    return parser


def check(args: argparse.Namespace) -> Path:
    """The text to learn from. Raises BadConfig for what cannot be meant."""
    given = [path for path in (args.text, args.jsonl) if path is not None]
    if len(given) != 1:
        raise BadConfig("give either --text FILE or --jsonl FILE")
    if args.jsonl is not None and args.jsonl.suffix != ".jsonl":
        raise BadConfig(f"--jsonl {args.jsonl.name}: expected a file that ends in .jsonl")
    limits: tuple[tuple[str, float, float, float], ...] = (
        ("--heads", args.heads, 1, MAX_HEADS),
        ("--minutes", args.minutes, 0.01, 1e5),
        ("--steps", 1 if args.steps is None else args.steps, 1, 1e9),
        ("--length", args.length, 8, 1 << 20),
        ("--batch-tokens", args.batch_tokens, 8, 1 << 24),
        ("--rate", args.rate, 1e-8, 1.0),
        ("--threads", args.threads, 0, 1024),
    )
    for option, value, least, most in limits:
        if not least <= value <= most:
            raise BadConfig(f"{option} is {value:g}, expected {least:g} to {most:g}")
    return Path(given[0])


def run(args: argparse.Namespace) -> Answer:
    text = check(args)
    base = Base(args.model)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    length = min(args.length, base.context)
    lessons = read_lessons(text, base.tokenizer, length)
    heldout = [] if args.heldout is None else read_lessons(args.heldout, base.tokenizer, length)
    config = MedusaConfig(
        heads=args.heads,
        hidden_size=base.hidden_size,
        vocab_size=base.vocab_size,
        base=base.name,
        base_sha256=base.sha256,
    )
    heads = new_heads(base, args.heads, args.rate)
    args.output.mkdir(parents=True, exist_ok=True)
    state = args.output / STATE
    if state.exists() and not args.fresh:
        restore_state(heads, state, config, args.seed)
    _watch(heads, base, lessons, args, config)
    write_heads(heads, args.output, config)
    state.unlink(missing_ok=True)
    found = accuracy(heads, base, heldout, args.batch_tokens) if heldout else []
    data: dict[str, Any] = {
        "path": str(args.output),
        "steps": heads.step,
        "seconds": round(heads.seconds, 3),
        "loss": heads.losses[-1] if heads.losses else None,
        "accuracy": found,
    }
    rows = [("heads", f"{heads.count} in {args.output}"), ("steps", f"{heads.step}, {heads.seconds:.0f} s")]
    rows += [(f"head {k}", f"{100 * share:.2f}% of held-out tokens") for k, share in enumerate(found, 1)]
    return Answer(data, table(rows))


def _watch(
    heads: Heads, base: Base, lessons: Sequence[Lesson], args: argparse.Namespace, config: MedusaConfig
) -> None:
    """The training loop with a bar on stderr; a log gets a line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("train"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    saved = logged = monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=1.0, note="")
        for done in train(heads, base, lessons, args):
            recent = heads.losses[-20:]
            note = f"step {heads.step} loss {sum(recent) / len(recent):.3f}"
            bar.update(task, completed=done, note=note)
            now = monotonic()
            if not console.is_terminal and now - logged > SAVE_SECONDS / 4:
                print(f"{note} {heads.seconds:.0f} s", file=sys.stderr, flush=True)
                logged = now
            if now - saved > SAVE_SECONDS:
                save_state(heads, args.output / STATE, config, args.seed)
                saved = now


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_command(make_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
