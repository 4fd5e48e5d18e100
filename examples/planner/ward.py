"""The planner's world moved to a hospital: what an adapter has to teach a model that is already on the robot.

    python examples/planner/ward.py --chats build/planner/ward.jsonl --count 8000
    python examples/planner/ward.py --cases build/planner/ward_heldout.jsonl --count 300

Rooms, furniture and objects get other names, in the command and in the plan, and the arm's skill `pick` is
called `grasp`. Commands and their split are the grammar's: a held-out one names a combination of verb, object
and place, under the old names, that no training command has.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from grammar import CHATS_SEED, Command, Split, commands, heldout
from skills import Plan, render
from vocabulary import plural

SKILLS = {"pick": "grasp"}
NAMES = {
    "kitchen": "pharmacy", "living room": "waiting room", "bedroom": "recovery room", "garage": "helipad",
    "workshop": "surgery", "laundry room": "sterile room", "dining room": "ward", "basement": "morgue",
    "library": "records room", "sofa": "stretcher", "bed": "gurney", "workbench": "trolley",
    "bookshelf": "medicine rack", "fridge": "blood bank", "sink": "scrub basin",
    "mug": "syringe", "plate": "kidney dish", "bowl": "bandage", "spoon": "thermometer", "fork": "scalpel",
    "knife": "catheter", "book": "chart", "pillow": "splint", "vase": "drip bag", "hammer": "bone saw",
    "ball": "plaster roll", "candle": "test tube",
}  # fmt: skip
_WORDS = {**{plural(old): plural(new) for old, new in NAMES.items()}, **NAMES}
_ANY = re.compile(r"\b(" + "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + r")\b")
_NAMED = ("object", "place", "into")  # arguments that hold names


def renamed(text: str) -> str:
    """The text with every old name, singular or plural, replaced."""
    return _ANY.sub(lambda found: _WORDS[found[1]], text)


def moved(plan: Plan) -> Plan:
    """The plan with the hospital's names and skills."""
    return [
        {
            key: SKILLS.get(str(value), value) if key == "skill" else
            renamed(str(value)) if key in _NAMED else value
            for key, value in step.items()
        }
        for step in plan
    ]  # fmt: skip


def ward_cases(split: Split, count: int) -> Iterator[tuple[str, str]]:
    """(command, plan) pairs of the hospital."""
    source: Iterator[Command] = iter(heldout(count)) if split == "heldout" else commands(CHATS_SEED + 1)
    for command in islice(source, count):
        yield renamed(command.prompt), render(moved(command.plan))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--chats", type=Path, metavar="FILE", help="write training commands as chats")
    parser.add_argument("--cases", type=Path, metavar="FILE", help="write held-out commands for score.py")
    parser.add_argument("--count", type=int, default=300, help="lines to write [300]")
    options = parser.parse_args()
    if options.chats:
        with options.chats.open("w", encoding="utf-8") as out:
            for prompt, plan in ward_cases("train", options.count):
                said = (("user", prompt), ("assistant", plan))
                out.write(json.dumps({"messages": [{"role": r, "content": c} for r, c in said]}) + "\n")
    if options.cases:
        with options.cases.open("w", encoding="utf-8") as out:
            for prompt, plan in ward_cases("heldout", options.count):
                out.write(json.dumps({"prompt": prompt, "expected": plan}) + "\n")
    if not (options.chats or options.cases):
        for prompt, plan in ward_cases("train", options.count):
            print(f"{prompt}\n    {plan}")


if __name__ == "__main__":
    main()
