"""The generator: robot commands and the plans they mean, split by combination of verb, object and place.

python examples/planner/grammar.py --out examples/planner     # heldout.jsonl and plan.schema.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from random import Random
from typing import Literal

import intents as i
import vocabulary as v
from intents import Intent
from skills import Plan, check_plan, render, write_schema
from verbs import AFTER_OBJECT, AFTER_PERSON, INTENTS, FollowUp

Split = Literal["train", "heldout"]
Triple = tuple[str, str, str]  # (verb, object or person, place)

HELDOUT_SEED = 20_251
HELDOUT_COUNT = 2_400
CHATS_SEED = 77
RESERVED_PER_256 = 26  # about a tenth of all combinations
CLAUSES = (0.5, 0.34, 0.16)  # how often a command has one, two and three clauses

FOLLOW_UP_TRIES = 100  # "bring it to me" has no place of its own to vary, so it may never fit

# "Meet Anna in the office and answer her question" is the plan of "answer Anna who is in the office".
SAME_SPLIT = {"answer": "meet", "tell": "meet"}

LEADS_TO = {"find": AFTER_OBJECT, "inspect": AFTER_OBJECT, "meet": AFTER_PERSON, "answer": AFTER_PERSON}
JOINERS = (" and ", " then ", " and then ", ", then ", ", and then ", ", ", " and after that ", ". then ")
PREFIXES = ("please ", "robot, ", "hey robot, ", "robot, please ", "i need you to ",
            "i want you to ", "kindly ")  # fmt: skip
QUESTIONS = ("could you ", "can you ", "could you please ", "would you ", "robot, can you ",
             "can you please ")  # fmt: skip
SUFFIXES = (" please", ", please", ", thanks", " now", " right away", ", thank you", " quickly")


@dataclass(frozen=True)
class Command:
    """A command, its plan, and the combinations that it names.

    `triples` are named within one clause; `implied` join a clause that names no place ("... find the
    mug") with the last place before it ("go to the kitchen and ...").
    """

    prompt: str
    plan: Plan
    triples: tuple[Triple, ...]
    implied: tuple[Triple, ...]

    @property
    def expected(self) -> str:
        return render(self.plan)


@dataclass
class _Clauses:
    """The clauses of a command so far."""

    said: list[str] = field(default_factory=list)
    plan: Plan = field(default_factory=list)
    triples: list[Triple] = field(default_factory=list)
    implied: list[Triple] = field(default_factory=list)

    def try_add(
        self, said: str, plan: Plan, split: Split, verb: str, subject: str | None, site: str | None
    ) -> bool:
        """Add a clause unless its combination belongs to the other split."""
        verb = SAME_SPLIT.get(verb, verb)
        if subject and site:
            triple = (verb, subject, site)
            if reserved(triple) != (split == "heldout"):
                return False
            self.triples.append(triple)
        elif subject and (place := self._last_place()):
            triple = (verb, subject, place)
            if split == "train" and reserved(triple):
                return False
            self.implied.append(triple)
        self.said.append(said)
        self.plan.extend(plan)
        return True

    def _last_place(self) -> str | None:
        places = [step["place"] for step in self.plan if step["skill"] == "go_to" and step["place"] != "user"]
        return str(places[-1]) if places else None


def reserved(triple: Triple) -> bool:
    """True where the combination belongs to the held-out split: the same answer on every machine."""
    digest = hashlib.sha256("|".join(triple).encode()).digest()
    return digest[0] < RESERVED_PER_256


def _clause(rng: Random, intent: Intent, split: Split, clauses: _Clauses) -> i.Slots:
    """Add one clause of this intent whose combination belongs to the split."""
    while True:
        slots = intent.draw(rng)
        value = dict(slots.value)
        site = slots.site
        phrasings = intent.phrasings
        if intent.bare and rng.random() < 0.35:
            phrasings = intent.bare
            value.pop("place", None)
            site = str(value["target"]) if "target" in value else None
        said = rng.choice(phrasings).format(**slots.said)
        if clauses.try_add(said, intent.steps(value), split, intent.name, slots.subject, site):
            return slots


def _follow_up(rng: Random, rule: FollowUp, lead: i.Slots, split: Split, clauses: _Clauses) -> None:
    """Add a clause about the object or person of the clause before it, if the split has room for one."""
    for _ in range(FOLLOW_UP_TRIES):
        place, relation, where = i.destination(rng)
        topic = rng.choice(list(v.TOPICS))
        words = {"dest": where, "place": place.said, "topic": topic, "who": rng.choice(v.PEOPLE)}
        phrasing = rng.choice(rule.phrasings)
        places = "{dest}" in phrasing or "{place}" in phrasing
        value = {**lead.value, "topic": v.TOPICS[topic], "relation": relation}
        value.pop("place", None)
        if "{who}" in phrasing:
            value["person"] = words["who"]
        if places:
            value["target"] = place.name
        said, site = phrasing.format(**words), place.name if places else None
        if clauses.try_add(said, rule.steps(value), split, rule.verb, lead.subject, site):
            return


def _draw(rng: Random, split: Split, clauses_wanted: tuple[float, float, float]) -> Command:
    wanted = rng.choices((1, 2, 3), clauses_wanted)[0]
    clauses = _Clauses()
    while len(clauses.said) < wanted:
        intent = rng.choices(INTENTS, [intent.weight for intent in INTENTS])[0]
        lead = _clause(rng, intent, split, clauses)
        rules = LEADS_TO.get(intent.name, ())
        if rules and len(clauses.said) < wanted and rng.random() < 0.7:
            _follow_up(rng, rng.choice(rules), lead, split, clauses)
    text = clauses.said[0] + "".join(rng.choice(JOINERS) + said for said in clauses.said[1:])
    return Command(_dress(rng, text), clauses.plan, tuple(clauses.triples), tuple(clauses.implied))


def _dress(rng: Random, text: str) -> str:
    """Politeness, capitals and punctuation, none of which changes the plan."""
    manner = rng.random()
    end = ("", ".", "!")[rng.choices((0, 1, 2), (0.6, 0.35, 0.05))[0]]
    if manner < 0.22:
        text = rng.choice(PREFIXES) + text
    elif manner < 0.38:
        text = rng.choice(QUESTIONS) + text
        end = rng.choice(("", "?"))
    elif manner < 0.5:
        text += rng.choice(SUFFIXES)
    if rng.random() < 0.35:
        text = text[0].upper() + text[1:]
        text = text.replace(". then", ". Then").replace(" i ", " I ")
    return text + end


def commands(
    seed: int, split: Split = "train", clauses: tuple[float, float, float] = CLAUSES
) -> Iterator[Command]:
    """Commands of one split without end; the same seed gives the same commands.

    `clauses` is how often a command has one, two and three of them.

    A training command names and implies no reserved combination. In a held-out command every named
    combination is reserved, and there is at least one.
    """
    rng = Random(f"{split}-{seed}")
    while True:
        command = _draw(rng, split, clauses)
        if split == "train" or command.triples:
            yield command


def heldout(count: int = HELDOUT_COUNT) -> list[Command]:
    """The held-out file's commands, each prompt once."""
    chosen: dict[str, Command] = {}
    for command in commands(HELDOUT_SEED, "heldout"):
        chosen.setdefault(command.prompt, command)
        if len(chosen) == count:
            return list(chosen.values())
    raise AssertionError("commands() never ends")


def write_heldout(path: Path, count: int = HELDOUT_COUNT) -> None:
    with path.open("w", encoding="utf-8") as out:
        for command in heldout(count):
            check_plan(command.plan)
            out.write(json.dumps({"prompt": command.prompt, "expected": command.expected}) + "\n")


def write_chats(path: Path, split: Split, count: int) -> None:
    """One chat a line, as builders.medusa reads them; the held-out ones are those of heldout.jsonl."""
    source = iter(heldout(count)) if split == "heldout" else islice(commands(CHATS_SEED), count)
    with path.open("w", encoding="utf-8") as out:
        for command in source:
            said = (("user", command.prompt), ("assistant", command.expected))
            messages = [{"role": role, "content": content} for role, content in said]
            out.write(json.dumps({"messages": messages}) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N training commands and stop")
    parser.add_argument(
        "--chats", type=Path, metavar="FILE", help="write commands and plans as chats and stop"
    )
    parser.add_argument("--count", type=int, default=40_000, help="chats to write [40000]")
    parser.add_argument("--split", choices=("train", "heldout"), default="train", help="of --chats [train]")
    options = parser.parse_args()
    if options.chats:
        write_chats(options.chats, options.split, options.count)
        return
    if options.show:
        for _, command in zip(range(options.show), commands(0), strict=False):
            print(f"{command.prompt}\n    {command.expected}")
        return
    write_heldout(options.out / "heldout.jsonl")
    write_schema(options.out / "plan.schema.json")


if __name__ == "__main__":
    main()
