"""The planner node over DDS: topic, action with feedback and result, lifecycle, diagnostics."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from action_msgs.msg import GoalStatus
from builtin_interfaces.msg import Duration
from diagnostic_msgs.msg import DiagnosticArray
from edge_interfaces.action import MakePlan
from edge_interfaces.msg import Plan, Rejection
from node_process import children_of
from robot import Robot, wait_until
from std_msgs.msg import String

COMMAND = "bring me the red mug from the kitchen"
PLAN = [
    {"skill": "go_to", "place": "kitchen"},
    {"skill": "pick", "object": "red mug"},
    {"skill": "go_to", "place": "user"},
    {"skill": "give", "object": "red mug", "to": "user"},
]


@pytest.fixture(scope="module")
def asker(serve: Callable[..., Any]) -> Robot:
    """Who asks a node that tests share."""
    return serve("edge_nodes.planner_node", "planner")[1]


@pytest.fixture
def planner(start_node: Callable[..., Any], robot: Robot) -> Any:
    """A node of one test alone."""
    process = start_node("edge_nodes.planner_node", "planner", diagnostics__period=0.2)
    robot.activate("/planner")
    return process


def calls_of(message: Any) -> list[dict[str, str]]:
    return [{"skill": c.skill, **{a.name: a.value for a in c.arguments}} for c in message]


def test_a_command_becomes_a_plan(asker: Robot) -> None:
    goal = asker.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=COMMAND))
    status, result = goal.result()
    assert status == GoalStatus.STATUS_SUCCEEDED and result.finish_reason == "stop" and result.error == ""
    assert calls_of(result.plan.calls) == PLAN == json.loads(result.plan.json)
    assert result.plan.complete and result.plan.command == COMMAND
    # Feedback is a topic: the last piece may come after the result
    wait_until(lambda: sum(len(f.calls) for f in goal.feedback) == len(PLAN), 5.0, "all calls")
    assert [c for f in goal.feedback for c in calls_of(f.calls)] == PLAN
    assert result.usage.total_tokens == result.usage.prompt_tokens + result.usage.completion_tokens > 20
    assert 0 < result.timing.ttft_ms <= result.timing.total_ms


def test_a_text_on_the_topic_becomes_a_plan_message(asker: Robot) -> None:
    plans, texts = asker.subscribe("/plan", Plan), asker.subscribe("/plan_json", String)
    asker.publish("/command", String(data=COMMAND))
    plan = plans.wait()[0]
    assert calls_of(plan.calls) == PLAN and plan.command == COMMAND and plan.header.stamp.sec > 0
    assert json.loads(texts.wait()[0].data) == PLAN


@pytest.mark.parametrize(
    ("goal", "words"),
    [
        (MakePlan.Goal(command=" "), "command is empty"),
        (MakePlan.Goal(command="go", deadline=Duration(sec=-1)), "deadline is -1"),
        (MakePlan.Goal(command="go", priority=2**31 - 1), "priority"),
    ],
)
def test_a_wrong_goal_is_rejected_with_a_reason(asker: Robot, goal: Any, words: str) -> None:
    rejections = asker.subscribe("/planner/rejections", Rejection)
    asker.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=COMMAND)).result()
    assert not asker.send_goal(MakePlan, "/make_plan", goal).accepted
    reason = rejections.wait()[0]
    assert words in reason.reason and reason.code == "bad_request" and reason.action == "make_plan"


def test_a_deadline_aborts_with_the_whole_calls(asker: Robot) -> None:
    goal = MakePlan.Goal(command=COMMAND, deadline=Duration(nanosec=3_000_000))
    status, result = asker.send_goal(MakePlan, "/make_plan", goal).result()
    if result.finish_reason == "deadline":  # else this machine plans within 3 ms
        assert status == GoalStatus.STATUS_ABORTED and not result.plan.complete
        assert calls_of(result.plan.calls) == PLAN[: len(result.plan.calls)]
    else:
        assert status == GoalStatus.STATUS_SUCCEEDED


def test_diagnostics_tell_state_and_figures(planner: Any, robot: Robot) -> None:
    heard = robot.subscribe("/diagnostics", DiagnosticArray)
    robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=COMMAND)).result()

    def told(message: Any) -> bool:
        values = {v.key: v.value for v in message.status[0].values}
        return values.get("goals_ended") == "1" and float(values.get("ttft_p50_ms", 0)) > 0

    status = heard.wait(told).status[0]
    values = {v.key: v.value for v in status.values}
    assert status.name == "/planner: engine" and values["state"] == "active"
    assert values["engine_state"] == "open" and values["goals"] == "0" and values["deadlines_missed"] == "0"
    assert float(values["memory_used_mib"]) <= float(values["memory_planned_mib"])


def test_inactive_nodes_refuse_and_come_back(planner: Any, robot: Robot) -> None:
    rejections = robot.subscribe("/planner/rejections", Rejection)
    robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=COMMAND)).result()
    assert robot.change_state("/planner", "deactivate")
    assert not robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=COMMAND)).accepted
    assert rejections.wait()[0].code == "inactive"
    assert robot.change_state("/planner", "activate")
    assert robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command=COMMAND)).result()[0] == 4


@pytest.mark.parametrize(
    "signals",
    [[signal.SIGTERM], [signal.SIGINT], 2 * [signal.SIGINT]],
    ids=["term", "int", "twice"],
)
def test_the_process_ends_cleanly_and_takes_its_worker_along(
    planner: Any, robot: Robot, signals: list[signal.Signals]
) -> None:
    (worker,) = children_of(planner.process.pid)
    for number in signals:  # Ctrl-C in a terminal reaches a node twice: by itself and from launch
        planner.process.send_signal(number)
        time.sleep(0.03)
    planner.process.wait(20.0)
    assert planner.stop() == 0, planner.said
    wait_until(lambda: not Path(f"/proc/{worker}").exists(), 5.0, "the worker's end")
