"""The planner node: a command in words becomes a typed plan, whole or call by call while it is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from std_msgs.msg import String

from edge_nodes.default_engine import planner_engine, planner_schema
from edge_nodes.edge_node import EdgeNode
from edge_nodes.interfaces import HAVE_INTERFACES
from edge_nodes.job import ChatTurn, Ended, GrammarText, Job, Progress
from edge_nodes.parameter_table import PLANNER_ROWS
from edge_nodes.plan import ANY_PLAN, PlanReader
from edge_nodes.qos import qos_profile
from edge_nodes.spinning import spin_node
from edge_nodes.text_topic import Heard, TextTopic
from edge_runtime import BadConfig, BadRequest


class PlannerNode(EdgeNode):
    """Topics: `command` (String) in; `plan` (Plan) and `plan_json` (String) out. Action: `make_plan`."""

    def __init__(self, name: str = "planner", **options: Any) -> None:
        self._topic: TextTopic | None = None
        self._plans: Any = None
        self._json: Any = None
        self._grammar = GrammarText(kind="json", text="{}")
        super().__init__(name, PLANNER_ROWS, **options)

    def serve(self) -> None:
        if not HAVE_INTERFACES:
            self.get_logger().warning(
                "edge_interfaces is not built: only the topics command and plan_json are served"
            )
            return
        from edge_interfaces.action import MakePlan

        from edge_nodes.goal_server import GoalServer
        from edge_nodes.plan_answer import PlanAnswer
        from edge_nodes.rejections import Rejections
        from edge_nodes.translation import seconds_of

        def job_of(goal: Any, settings: Mapping[str, Any]) -> Job:
            return self._job(goal.command, settings, seconds_of(goal.deadline, settings), goal.priority)

        def answer_of(handle: Any) -> PlanAnswer:
            return PlanAnswer(handle.request.command, self.get_clock().now().to_msg())

        GoalServer(self, Rejections(self), MakePlan, "make_plan", job_of, answer_of)

    def default_engine(self) -> str:
        return str(planner_engine(self.get_logger().info))

    def open_topics(self) -> None:
        settings = self.parameters.snapshot
        self._grammar = GrammarText(kind="json", text=_schema(settings))
        profile = qos_profile(settings["output_qos"], settings["output_qos_depth"])
        self._json = self.create_lifecycle_publisher(String, "plan_json", profile)
        if HAVE_INTERFACES:
            from edge_interfaces.msg import Plan

            self._plans = self.create_lifecycle_publisher(Plan, "plan", profile)
        self._topic = TextTopic(self, "command", self._job_of_text, self._reply_of)

    def close_topics(self) -> None:
        topic, self._topic = self._topic, None
        if topic is not None:
            topic.close()
        for publisher in (self._json, self._plans):
            if publisher is not None:
                self.destroy_lifecycle_publisher(publisher)
        self._json = self._plans = None

    def _job_of_text(self, text: str, settings: Mapping[str, Any]) -> Job:
        return self._job(text, settings, settings["deadline.default"] or None, 0)

    def _job(self, command: str, settings: Mapping[str, Any], deadline: float | None, priority: int) -> Job:
        if not command.strip():
            raise BadRequest("the command is empty; say what the robot should do")
        return Job(
            messages=(ChatTurn(role="user", content=command),),
            max_tokens=settings["context.n_predict"],
            temperature=settings["sampling.temp"],
            deadline=deadline,
            priority=priority,
            grammar=self._grammar,
            speculate=settings["speculative.enabled"],
        )

    def _reply_of(self, heard: Heard) -> _PlanReply:
        return _PlanReply(heard, self._json, self._plans)


class _PlanReply:
    """Publishes a whole plan; of one that was cut, nothing."""

    def __init__(self, heard: Heard, texts: Any, plans: Any) -> None:
        self._heard = heard
        self._texts = texts
        self._plans = plans
        self._reader = PlanReader()

    def add(self, event: Progress) -> None:
        self._reader.feed(event.text)

    def end(self, ended: Ended) -> None:
        if not self._reader.complete:
            return
        self._texts.publish(String(data=self._reader.text))
        if self._plans is not None:
            from edge_nodes.plan_answer import plan_message

            self._plans.publish(plan_message(self._heard.text, self._heard.stamp, self._reader))


def _schema(settings: Mapping[str, Any]) -> str:
    """Raises BadConfig, Unsupported."""
    if settings["plan.schema"]:
        try:
            return Path(settings["plan.schema"]).expanduser().read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise BadConfig(f"the file of the parameter plan.schema cannot be read: {error}") from error
    if settings["engine.path"]:
        return json.dumps(ANY_PLAN)
    return planner_schema()


def main(args: list[str] | None = None) -> int:
    return spin_node(PlannerNode, args)


if __name__ == "__main__":
    raise SystemExit(main())
