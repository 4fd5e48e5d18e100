"""The robot's skills: what a plan may call, the check of a plan, and its JSON schema."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

# One record a skill: argument -> type; an argument whose type ends in "?" may be left out.
# The order is the order in which plans write the arguments.
SKILLS: Mapping[str, Mapping[str, str]] = {
    "go_to": {"place": "string"},
    "find": {"object": "string"},
    "find_person": {"person": "string"},
    "pick": {"object": "string"},
    "put": {"object": "string", "relation": "relation", "place": "string"},
    "give": {"object": "string", "to": "string"},
    "follow": {"person": "string", "place": "string?"},
    "guide": {"person": "string", "place": "string"},
    "count": {"object": "string"},
    "inspect": {"object": "string"},
    "say": {"topic": "string", "to": "string"},
    "answer": {"to": "string"},
    "open": {"object": "string"},
    "close": {"object": "string"},
    "clean": {"place": "string"},
    "pour": {"object": "string", "into": "string"},
    "load": {"object": "string", "count": "integer", "place": "string"},
    "unload": {"object": "string", "count": "integer", "place": "string"},
    "patrol": {"place": "string", "rounds": "integer"},
    "switch": {"object": "string", "state": "state"},
    "wait": {"seconds": "integer"},
    "charge": {},
    "stop": {},
}
RELATIONS = ("on", "in", "at", "under", "next to")
STATES = ("on", "off")
MAX_STEPS = 16
MAX_INTEGER = 3600

Step = dict[str, str | int]
Plan = list[Step]


class PlanError(ValueError):
    """A plan that the skills do not allow; the message says where and why."""


def render(plan: Plan) -> str:
    """The one spelling of a plan: compact JSON."""
    return json.dumps(plan, separators=(",", ":"), ensure_ascii=False)


def check_plan(plan: object) -> None:
    """Raise PlanError unless `plan` is a list of allowed skill calls."""
    if not isinstance(plan, list) or not 1 <= len(plan) <= MAX_STEPS:
        raise PlanError(f"a plan is a list of 1 to {MAX_STEPS} skill calls")
    for index, step in enumerate(plan):
        _check_step(index, step)


def _check_step(index: int, step: object) -> None:
    if not isinstance(step, dict):
        raise PlanError(f"step {index}: not an object")
    skill = step.get("skill")
    if not isinstance(skill, str) or skill not in SKILLS:
        raise PlanError(f"step {index}: unknown skill {skill!r}")
    arguments = SKILLS[skill]
    for name in step:
        if name != "skill" and name not in arguments:
            raise PlanError(f"step {index}: {skill} takes no argument {name!r}")
    for name, kind in arguments.items():
        if name not in step:
            if kind.endswith("?"):
                continue
            raise PlanError(f"step {index}: {skill} needs {name!r}")
        if not _fits(step[name], kind.rstrip("?")):
            raise PlanError(f"step {index}: {skill}.{name} is not a valid {kind}: {step[name]!r}")


def _fits(value: object, kind: str) -> bool:
    if kind == "integer":
        return type(value) is int and 1 <= value <= MAX_INTEGER
    allowed: Sequence[str] | None = {"relation": RELATIONS, "state": STATES}.get(kind)
    if allowed is not None:
        return value in allowed
    return isinstance(value, str) and value != ""


def json_schema() -> dict[str, object]:
    """The schema of a plan, closed (no extra keys), for structured output."""
    kinds: dict[str, dict[str, object]] = {
        "string": {"type": "string", "minLength": 1},
        "integer": {"type": "integer", "minimum": 1, "maximum": MAX_INTEGER},
        "relation": {"enum": list(RELATIONS)},
        "state": {"enum": list(STATES)},
    }
    steps: list[dict[str, object]] = []
    for skill, arguments in SKILLS.items():
        properties: dict[str, object] = {"skill": {"const": skill}}
        properties.update({name: kinds[kind.rstrip("?")] for name, kind in arguments.items()})
        required = ["skill", *(name for name, kind in arguments.items() if not kind.endswith("?"))]
        steps.append(
            {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
        )
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Robot plan",
        "type": "array",
        "minItems": 1,
        "maxItems": MAX_STEPS,
        "items": {"anyOf": steps},
    }


def write_schema(path: Path) -> None:
    path.write_text(json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8")
