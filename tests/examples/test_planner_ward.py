"""The planner's hospital: the same commands and plans under other names, in command and plan alike."""

from __future__ import annotations

import json
import re
import sys
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "planner"))

import ward  # noqa: E402
from grammar import CHATS_SEED, commands, heldout  # noqa: E402
from vocabulary import plural  # noqa: E402

OLD = re.compile(r"\b(" + "|".join([*ward.NAMES, *map(plural, ward.NAMES)]) + r")\b")


def test_no_old_name_or_skill_is_left_and_nothing_else_changes() -> None:
    pairs = zip(commands(CHATS_SEED + 1), ward.ward_cases("train", 400), strict=False)
    changed = 0
    for command, (prompt, plan) in islice(pairs, 400):
        steps = json.loads(plan)
        assert not OLD.search(prompt) and not OLD.search(plan)
        assert [s["skill"].replace("grasp", "pick") for s in steps] == [s["skill"] for s in command.plan]
        for step, before in zip(steps, command.plan, strict=True):
            assert [*step] == [*before]
            assert all(step[k] == before[k] for k in step if k in ("person", "to", "seconds", "count"))
        if not OLD.search(command.prompt):
            assert prompt == command.prompt
        changed += plan != command.expected
    assert changed > 200  # an adapter has something to teach


def test_new_names_are_new_and_differ() -> None:
    known = {*ward.NAMES, "pick"}
    assert len({*ward.NAMES.values()}) == len(ward.NAMES)
    assert not known & {*ward.NAMES.values(), *ward.SKILLS.values()}
    assert ward.renamed("two mugs, the kitchen table and knives") == (
        "two syringes, the pharmacy table and catheters"
    )


def test_heldout_commands_are_those_of_the_heldout_file() -> None:
    found = list(ward.ward_cases("heldout", 30))
    assert [prompt for prompt, _ in found] == [ward.renamed(c.prompt) for c in heldout(30)]
