"""Training batches: rows of rendered conversations, of which only the plans are learned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

import torch
from grammar import Command, commands
from tokenizers import Tokenizer
from tokens import BOS, PAD, turn

TOKENS_A_STEP = 4096
ROW, LONG_ROW = 256, 1024
CYCLE = 8  # of eight steps, six hold single exchanges, one short and one long conversations
# More long commands than in the held-out file: to bind each name to its own clause is the hard part.
CLAUSES = (0.2, 0.4, 0.4)
EASY_KEPT = 0.35
NOT_LEARNED = -100  # what cross_entropy ignores


@dataclass(frozen=True)
class Batch:
    ids: torch.Tensor  # (rows, length)
    positions: torch.Tensor | None  # where several conversations share a row, each counts from 0
    places: torch.Tensor  # flat positions whose next token is learned
    targets: torch.Tensor
    examples: int


def confusable(command: Command) -> bool:
    """True where the command names two people, two numbered places or two vehicles: easily mixed up."""
    people = {step.get(key) for step in command.plan for key in ("person", "to")} - {None, "user"}
    numbered = {place for step in command.plan if (place := str(step.get("place", "")))[-1:].isdigit()}
    vehicles = {step["place"] for step in command.plan if step["skill"] in ("load", "unload")}
    return max(len(people), len(numbered), len(vehicles)) > 1


def lessons(seed: int) -> Iterator[Command]:
    """Training commands, the confusable ones more often than the grammar says them."""
    rng = Random(seed)
    for command in commands(seed, clauses=CLAUSES):
        if confusable(command) or rng.random() < EASY_KEPT:
            yield command


def make_batch(tokenizer: Tokenizer, seed: int, step: int) -> Batch:
    """The batch of one step. The step alone decides it, so a run taken up again sees what it would have seen.

    Most rows hold separate conversations of one exchange, which cannot see one another; in the others one
    conversation goes on to the row's end, so that earlier exchanges and the whole context are known too.
    """
    kind = step % CYCLE
    length = LONG_ROW if kind == CYCLE - 1 else ROW
    separate = kind < CYCLE - 2
    source = lessons(seed * 1_000_000 + step)
    ids = torch.full((TOKENS_A_STEP // length, length), PAD)
    positions = torch.zeros_like(ids)
    learned = torch.zeros_like(ids, dtype=torch.bool)
    examples = 0
    for row in range(ids.shape[0]):
        tokens: list[int] = []
        counted: list[int] = []
        flags: list[bool] = []
        while len(tokens) < length:
            command = next(source)
            exchange, plan_start = turn(tokenizer, command.prompt, command.expected)
            if separate or not tokens:
                exchange, plan_start = [BOS, *exchange], plan_start + 1
            first = 0 if separate else len(tokens)
            tokens += exchange
            counted += range(first, first + len(exchange))
            flags += [n >= plan_start for n in range(len(exchange))]
            examples += 1
        ids[row] = torch.tensor(tokens[:length])
        positions[row] = torch.tensor(counted[:length])
        learned[row] = torch.tensor(flags[:length])
    found = learned[:, 1:].nonzero()
    # One size of matrix product for every step: oneDNN compiles a kernel for each new shape.
    places = torch.zeros(math.ceil(len(found) / 1024) * 1024, dtype=torch.int64)
    targets = torch.full_like(places, NOT_LEARNED)
    places[: len(found)] = found[:, 0] * length + found[:, 1]
    targets[: len(found)] = ids[:, 1:][learned[:, 1:]]
    return Batch(ids, positions if separate else None, places, targets, examples)
