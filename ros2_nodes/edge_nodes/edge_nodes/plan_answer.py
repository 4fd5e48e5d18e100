"""Plans as messages: the answer of make_plan, and the message of the topic `plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edge_interfaces.action import MakePlan
from edge_interfaces.msg import Argument, Plan, SkillCall

from edge_nodes.job import Ended, Progress
from edge_nodes.plan import PlanCall, PlanReader
from edge_nodes.translation import fill_end
from edge_runtime import BadRequest

_KINDS = {
    "text": Argument.TEXT,
    "integer": Argument.INTEGER,
    "real": Argument.REAL,
    "boolean": Argument.BOOLEAN,
}


def calls_of(calls: Sequence[PlanCall]) -> list[Any]:
    """SkillCall messages."""
    return [
        SkillCall(
            skill=call.skill,
            arguments=[Argument(name=a.name, kind=_KINDS[a.kind], value=a.value) for a in call.arguments],
        )
        for call in calls
    ]


def plan_message(command: str, stamp: Any, reader: PlanReader) -> Any:
    """A Plan message of what was read so far."""
    plan = Plan(command=command, calls=calls_of(reader.calls), complete=reader.complete, json=reader.text)
    plan.header.stamp = stamp
    return plan


class PlanAnswer:
    """Of make_plan: feedback has the calls that became whole."""

    def __init__(self, command: str, stamp: Any) -> None:
        self._command = command
        self._stamp = stamp
        self._reader = PlanReader()
        self._told = 0
        self._trouble = ""

    def add(self, event: Progress) -> None:
        if self._trouble:
            return
        try:
            self._reader.feed(event.text)
        except BadRequest as error:
            self._trouble = str(error)

    def feedback(self) -> Any | None:
        new = self._reader.calls[self._told :]
        if not new:
            return None
        message = MakePlan.Feedback(first=self._told, calls=calls_of(new))
        self._told += len(new)
        return message

    def end(self, ended: Ended) -> tuple[Any, bool]:
        result = fill_end(MakePlan.Result(), ended)
        result.plan = plan_message(self._command, self._stamp, self._reader)
        whole = ended.reason == "stop" and self._reader.complete and not self._trouble
        if not whole and ended.reason in ("stop", "length"):
            result.error = self._trouble or "the plan was cut; raise the parameter context.n_predict"
        return result, whole
