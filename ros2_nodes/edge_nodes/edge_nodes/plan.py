"""A plan as the model writes it, a JSON list of skill calls, read while it is still being written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from edge_runtime import BadRequest

Kind = Literal["text", "integer", "real", "boolean"]
# What a plan of any robot must be: for engines that come without a schema of their own
ANY_PLAN: dict[str, Any] = {
    "type": "array",
    "minItems": 1,
    "maxItems": 64,
    "items": {
        "type": "object",
        "properties": {"skill": {"type": "string", "minLength": 1}},
        "required": ["skill"],
        "additionalProperties": {"type": ["string", "number", "boolean"]},
    },
}
_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class PlanArgument:
    """value: its text, whatever the kind."""

    name: str
    kind: Kind
    value: str


@dataclass(frozen=True, slots=True)
class PlanCall:
    skill: str
    arguments: tuple[PlanArgument, ...]


class PlanReader:
    """Takes a plan's text piece by piece; `calls` are those that are whole so far."""

    def __init__(self) -> None:
        self.text = ""
        self.calls: list[PlanCall] = []
        self.complete = False  # the list was closed and nothing follows it
        self._at = 0  # first character that is not read
        self._place: Literal["list", "first", "comma", "call", "end"] = "list"

    def feed(self, text: str) -> list[PlanCall]:
        """The calls that became whole. Raises BadRequest where the text is no plan."""
        self.text += text
        new: list[PlanCall] = []
        while self._skip_blanks():
            char = self.text[self._at]
            if self._place == "list":
                self._expect(char, "[")
                self._place = "first"
            elif self._place == "end":
                raise BadRequest(
                    f"text follows the plan at character {self._at}: {self.text[self._at :]!r:.60}"
                )
            elif char == "]" and self._place in ("first", "comma"):
                self._at += 1
                self._place, self.complete = "end", True
            elif self._place == "comma":
                self._expect(char, ",")
                self._place = "call"
            else:
                call = self._call(char)
                if call is None:
                    break
                new.append(call)
                self._place = "comma"
        self.calls += new
        return new

    def _skip_blanks(self) -> bool:
        while self._at < len(self.text) and self.text[self._at] in " \t\r\n":
            self._at += 1
        return self._at < len(self.text)

    def _expect(self, char: str, wanted: str) -> None:
        if char != wanted:
            raise BadRequest(f"the plan has {char!r} at character {self._at}, expected {wanted!r}")
        self._at += 1

    def _call(self, char: str) -> PlanCall | None:
        """The object that begins here; None while it is not whole."""
        if char != "{":
            raise BadRequest(f"the plan has {char!r} at character {self._at}, expected a skill call")
        try:
            value, end = _decoder.raw_decode(self.text, self._at)
        except json.JSONDecodeError:
            return None  # not whole, or wrong: the answer's end tells
        self._at = end
        return call_of(value)


def call_of(value: object) -> PlanCall:
    """A skill call of parsed JSON. Raises BadRequest naming what is wrong."""
    if not isinstance(value, dict):
        raise BadRequest(f"a step of the plan is {type(value).__name__}, expected an object with a skill")
    skill = value.get("skill")
    if not isinstance(skill, str) or not skill:
        raise BadRequest(f"a step of the plan has the skill {skill!r:.60}, expected its name")
    return PlanCall(skill, tuple(_argument(skill, k, v) for k, v in value.items() if k != "skill"))


def _argument(skill: str, name: str, value: object) -> PlanArgument:
    if isinstance(value, bool):
        return PlanArgument(name, "boolean", "true" if value else "false")
    if isinstance(value, int):
        return PlanArgument(name, "integer", str(value))
    if isinstance(value, float):
        return PlanArgument(name, "real", repr(value))
    if isinstance(value, str):
        return PlanArgument(name, "text", value)
    raise BadRequest(f"{skill}: argument {name!r:.60} is {type(value).__name__}, expected text or a number")
