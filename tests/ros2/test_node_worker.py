"""The engine's process dies, stops or talks nonsense: the node says so, answers all else and replaces it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from action_msgs.msg import GoalStatus
from edge_interfaces.action import GenerateResponse, MakePlan
from edge_interfaces.msg import Rejection, SamplingConfig
from edge_interfaces.srv import Tokenize
from node_process import children_of
from robot import Robot, wait_until

GARBAGE = Path(__file__).with_name("engine_side") / "garbage_worker.py"
BACK = 20.0  # seconds until a replacement must serve, on a machine that does much else


def worker_of(pid: int) -> int:
    (child,) = children_of(pid)
    return child


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV])
def test_a_lost_worker_aborts_its_goals_and_is_replaced(
    start_node: Callable[..., Any], robot: Robot, planner_path: Path, how: signal.Signals
) -> None:
    node = start_node(
        "edge_nodes.language_node", "language", engine__path=planner_path, diagnostics__period=0.05
    )
    robot.activate("/language")
    rejections = robot.subscribe("/language/rejections", Rejection)
    sampling = SamplingConfig(ignore_eos=True)

    def send(tokens: int) -> Any:
        goal = GenerateResponse.Goal(prompt="go to", max_tokens=tokens, sampling_config=sampling)
        return robot.send_goal(GenerateResponse, "/generate_response", goal)

    assert send(4).result()[0] == GoalStatus.STATUS_SUCCEEDED
    first = worker_of(node.process.pid)
    goals = [send(1000) for _ in range(6)]  # four run, two wait
    wait_until(lambda: goals[0].feedback, 10.0, "a first token")
    mark = robot.listen()
    os.kill(first, how)
    level, message, values = robot.figures("/language", lambda v: v["engine_state"] == "lost", after=mark)
    assert level == 2 and "engine lost" in message and values["state"] == "active"
    for goal in goals:
        status, result = goal.result()
        if status == GoalStatus.STATUS_ABORTED:
            assert result.finish_reason == "error" and result.error
        else:
            assert status == GoalStatus.STATUS_SUCCEEDED  # it ended before the signal
    assert goals[-1].result()[0] == GoalStatus.STATUS_ABORTED
    # Meanwhile all else is answered, and a goal is refused with a reason
    if robot.figures("/language", lambda v: True)[2]["engine_state"] == "lost":
        assert robot.state("/language") == "active"
        assert robot.parameter("/language", "worker.nice") == 10
        if not send(4).accepted:
            assert rejections.wait()[0].code == "restarting"
        answer = robot.call(Tokenize, "/tokenize", Tokenize.Request(text="go"))
        assert answer.success or "lost" in answer.message or "open" in answer.message
    values = robot.figures("/language", lambda v: v["engine_state"] == "open", BACK)[2]
    assert values["restarts"] == "1" and worker_of(node.process.pid) != first
    assert send(4).result()[0] == GoalStatus.STATUS_SUCCEEDED
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert robot.change_state("/language", "deactivate") and robot.change_state("/language", "cleanup")


@pytest.mark.parametrize("what", ["length", "json", "unknown", "exit", "hang"])
def test_a_worker_that_talks_nonsense_or_hangs_is_replaced(
    start_node: Callable[..., Any],
    robot: Robot,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    what: str,
) -> None:
    once = tmp_path / "once"
    monkeypatch.setenv("EDGE_GARBAGE", what)
    monkeypatch.setenv("EDGE_GARBAGE_ONCE", str(once))
    node = start_node(
        "nodes_that_break", "planner", test__worker=f"{sys.executable} {GARBAGE}", diagnostics__period=0.05
    )
    robot.activate("/planner")
    plan = MakePlan.Goal(command="go to the kitchen")
    assert robot.send_goal(MakePlan, "/make_plan", plan).result()[0] == GoalStatus.STATUS_SUCCEEDED
    mark = robot.listen()
    once.touch()
    goal = robot.send_goal(MakePlan, "/make_plan", plan)
    assert robot.figures("/planner", lambda v: v["engine_state"] == "lost", 15.0, after=mark)[0] == 2
    status, result = goal.result()
    assert status == GoalStatus.STATUS_ABORTED and result.finish_reason == "error" and result.error
    robot.figures("/planner", lambda v: v["engine_state"] == "open" and v["restarts"] == "1", BACK)
    assert robot.send_goal(MakePlan, "/make_plan", plan).result()[0] == GoalStatus.STATUS_SUCCEEDED
    assert node.alive


def test_a_node_that_is_killed_takes_its_worker_along(
    start_node: Callable[..., Any], robot: Robot, planner_path: Path
) -> None:
    node = start_node("edge_nodes.language_node", "language", engine__path=planner_path)
    robot.activate("/language")
    worker = worker_of(node.process.pid)
    node.process.kill()
    node.process.wait()

    def gone() -> bool:
        try:
            return Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
        except FileNotFoundError:
            return True

    start = time.monotonic()
    wait_until(gone, 10.0, "the worker's end")
    assert time.monotonic() - start < 10.0
