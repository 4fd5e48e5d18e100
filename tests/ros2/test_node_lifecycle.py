"""Every lifecycle state and every transition, errors in every callback, and two hundred whole cycles."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from edge_interfaces.action import MakePlan
from lifecycle_msgs.srv import ChangeState, GetAvailableTransitions
from node_process import resident
from robot import Robot, wait_until

NODE = "/planner"
WORKER_CYCLES = int(os.environ.get("EDGE_CYCLES", "30"))  # each starts a process
# The lifecycle design's table: state -> transition id -> state after it
LEGAL = {
    "unconfigured": {1: "inactive", 5: "finalized"},
    "inactive": {2: "unconfigured", 3: "active", 6: "finalized"},
    "active": {4: "inactive", 7: "finalized"},
    "finalized": {},
}
WAY = {"unconfigured": [], "inactive": [1], "active": [1, 3], "finalized": [5]}
BACK = {"inactive": [2], "active": [4, 2], "unconfigured": []}
# 10 to 62 are outcomes that no client may trigger, 8 is destroy, 99 and 255 do not exist
TRANSITIONS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 11, 12, 20, 30, 40, 50, 60, 61, 62, 99, 255]


def plans(robot: Robot) -> bool:
    goal = robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command="go to the kitchen"))
    return goal.accepted and goal.result()[0] == 4


def test_every_state_times_every_transition(start_node: Callable[..., Any], robot: Robot) -> None:
    node = start_node("edge_nodes.planner_node", "planner")
    for state in ("unconfigured", "inactive", "active"):
        for step in WAY[state]:
            assert robot.change_state(NODE, step, timeout=120.0)
        for transition in TRANSITIONS:
            if transition not in LEGAL[state]:
                assert not robot.change_state(NODE, transition), (state, transition)
                assert robot.state(NODE) == state, (state, transition)
        if state == "active":
            assert plans(robot)  # whatever was refused before
        for step in BACK[state]:
            assert robot.change_state(NODE, step)
        for transition, after in LEGAL[state].items():
            if after == "finalized":
                continue  # there is no way back: see below
            for step in (*WAY[state], transition):
                assert robot.change_state(NODE, step)
            assert robot.state(NODE) == after, (state, transition)
            for step in BACK[after]:
                assert robot.change_state(NODE, step)
    # by label: legal and not
    assert not robot.change_state(NODE, "activate") and not robot.change_state(NODE, "no_such_thing")
    assert robot.change_state(NODE, "configure") and robot.change_state(NODE, "activate")
    assert plans(robot) and node.alive


@pytest.mark.parametrize("state", ["unconfigured", "inactive", "active"])
def test_shutdown_finalizes_and_nothing_leads_out(
    start_node: Callable[..., Any], robot: Robot, state: str
) -> None:
    node = start_node("edge_nodes.planner_node", "planner")
    for step in WAY[state]:
        assert robot.change_state(NODE, step, timeout=120.0)
    assert robot.change_state(NODE, "shutdown")
    assert robot.state(NODE) == "finalized"
    for transition in TRANSITIONS:
        assert not robot.change_state(NODE, transition)
        assert robot.state(NODE) == "finalized"
    request = GetAvailableTransitions.Request()
    assert not robot.call(
        GetAvailableTransitions, f"{NODE}/get_available_transitions", request
    ).available_transitions
    assert node.alive and node.stop() == 0


@pytest.mark.parametrize("where", ["configure", "activate", "deactivate", "cleanup", "shutdown"])
@pytest.mark.parametrize("again", [False, True], ids=["error processing frees", "error processing fails"])
def test_an_exception_in_a_transition_ends_in_error_processing(
    start_node: Callable[..., Any], robot: Robot, where: str, again: bool
) -> None:
    """The node raises in that callback, the first time; `again`: in error processing as well.

    Where it is not, the engine is a worker's.
    """
    node = start_node(
        "nodes_that_break", "planner", test__where=where, test__again=again, worker__enabled=not again
    )
    steps = ["configure", "activate", "deactivate", "cleanup"]
    before = steps[: steps.index(where)] if where in steps else ["configure"]
    for step in before:
        assert robot.change_state(NODE, step, timeout=120.0)
    assert not robot.change_state(NODE, where, timeout=120.0)
    assert robot.state(NODE) == ("finalized" if again else "unconfigured")
    assert node.alive
    if not again:
        assert robot.change_state(NODE, "configure") and robot.change_state(NODE, "activate")
        assert plans(robot)


def test_an_engine_that_cannot_be_opened_leaves_the_node_unconfigured(
    start_node: Callable[..., Any], robot: Robot, tmp_path: Path
) -> None:
    node = start_node("edge_nodes.planner_node", "planner")
    missing = str(tmp_path / "missing.edge")
    assert robot.set_parameter(NODE, "engine.path", missing) == (True, "")
    assert not robot.change_state(NODE, "configure")
    assert robot.state(NODE) == "unconfigured" and node.alive
    assert "missing.edge" in node.said
    assert robot.set_parameter(NODE, "engine.path", "") == (True, "")
    assert robot.change_state(NODE, "configure", timeout=120.0) and robot.change_state(NODE, "activate")
    assert plans(robot)


def measured(pid: int) -> tuple[float, int, int]:
    """Resident MiB, threads, descriptors of a process."""
    threads, files = len(os.listdir(f"/proc/{pid}/task")), len(os.listdir(f"/proc/{pid}/fd"))
    return resident(pid), threads, files


@pytest.mark.parametrize(
    ("worker", "warm", "cycles"),
    [(False, 50, 200), (True, 10, WORKER_CYCLES)],
    ids=["in the process", "worker"],
)
def test_whole_cycles_leave_nothing_behind(
    start_node: Callable[..., Any], robot: Robot, worker: bool, warm: int, cycles: int
) -> None:
    """Two hundred, where a cycle starts no process; EDGE_CYCLES=200 makes them as many with a worker."""
    node = start_node("edge_nodes.planner_node", "planner", worker__enabled=worker, engine__threads=1)
    pid = node.process.pid

    def cycle(count: int) -> None:
        for number in range(count):
            for step in (1, 3, 4, 2):
                assert robot.change_state(NODE, step, timeout=120.0), (number, step)

    cycle(warm)  # allocators and caches reach their size
    memory, threads, files = measured(pid)
    cycle(cycles)
    after = measured(pid)
    assert after[1:] == (threads, files)
    assert "unexpected" not in node.said
    assert after[0] - memory <= 1.0, f"{memory:.2f} to {after[0]:.2f} MiB"


def test_two_transitions_at_once_are_one(start_node: Callable[..., Any], robot: Robot) -> None:
    start_node("edge_nodes.planner_node", "planner")
    assert robot.state(NODE) == "unconfigured"
    futures = []
    for _ in range(8):
        request = ChangeState.Request()
        request.transition.id = 1
        futures.append(robot.call_async(ChangeState, f"{NODE}/change_state", request))
    wait_until(lambda: all(f.done() for f in futures), 60.0, "eight answers")
    assert sum(f.result().success for f in futures) == 1
    assert robot.state(NODE) == "inactive"


def test_a_client_that_saw_the_new_state_may_ask_for_the_next(
    start_node: Callable[..., Any], robot: Robot
) -> None:
    """Though the transition that led there has not answered yet."""
    start_node("nodes_that_break", "planner", test__tail=0.5, worker__enabled=False)
    answer = robot.request_transition(NODE, "configure", 60.0)
    wait_until(lambda: robot.state(NODE) == "inactive", 60.0, "inactive")
    assert not answer.done()
    assert robot.change_state(NODE, "activate")
    assert answer.result().success and robot.state(NODE) == "active"


def test_states_are_told_while_a_transition_takes_long(start_node: Callable[..., Any], robot: Robot) -> None:
    """An engine of ten seconds' load must not silence the node: here it is a slow one of two."""
    start_node("nodes_that_break", "planner", test__slow=2.0)
    assert robot.state(NODE) == "unconfigured"
    request = ChangeState.Request()
    request.transition.id = 1
    future = robot.call_async(ChangeState, f"{NODE}/change_state", request)
    gaps, last = [], time.monotonic()
    while not future.done():
        assert robot.state(NODE, timeout=1.0) in ("unconfigured", "configuring", "inactive")
        assert robot.parameter(NODE, "worker.nice") == 10
        now = time.monotonic()
        gaps.append(now - last)
        last = now
    assert future.result().success and max(gaps) < 1.0 and len(gaps) > 20
