"""activate brings nodes up, also where a dead forerunner is still in DDS's graph; so do the launch files."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from edge_interfaces.action import MakePlan
from node_process import REAL, NodeProcess
from robot import Robot, watched

PLAN = MakePlan.Goal(command="go to the kitchen")


def activate(name: str, seconds: float = 60.0) -> tuple[int, str]:
    """Exit code, and what it said."""
    process = NodeProcess("edge_nodes.activation", "activate", {}, words=[name])
    code = process.process.wait(seconds)
    return code, process.said


def test_activate_brings_a_node_up_and_says_why_not(
    start_node: Callable[..., Any], robot: Robot, tmp_path: Path
) -> None:
    start_node("edge_nodes.planner_node", "planner")
    assert activate("/planner")[0] == 0
    assert robot.state("/planner") == "active" and activate("/planner")[0] == 0
    for step in ("deactivate", "cleanup"):
        assert robot.change_state("/planner", step)
    assert robot.set_parameter("/planner", "engine.path", str(tmp_path / "none.edge"))[0]
    code, said = activate("/planner")
    assert code == 1 and "configure failed" in said, said
    assert robot.change_state("/planner", "shutdown")
    code, said = activate("/planner")
    assert code == 1 and "finalized" in said


def test_a_node_that_comes_back_after_a_kill_is_activated(
    start_node: Callable[..., Any], robot: Robot, domain: int
) -> None:
    first = start_node("edge_nodes.planner_node", "planner")
    assert activate("/planner")[0] == 0
    watched.remove(first)
    first.process.kill()  # its services stay in the graph for a lease
    first.process.wait()
    start_node("edge_nodes.planner_node", "planner")
    assert activate("/planner")[0] == 0
    with Robot("late", domain_id=domain) as late:
        late.wait_state("/planner", "active")
    watched.append(first)  # for the fixture's end


# --- with launch, where ROS is ---


@pytest.fixture
def launched(domain: int, tmp_path: Path) -> Iterator[Callable[..., Any]]:
    if not REAL or importlib.util.find_spec("launch_ros") is None:
        pytest.skip("launch files need a sourced ROS 2")
    from ament_index_python.packages import PackageNotFoundError, get_package_prefix

    try:
        get_package_prefix("edge_nodes")
    except PackageNotFoundError:
        pytest.skip("edge_nodes is not built in this workspace")
    processes = []

    def launch(*words: str) -> Any:
        command = ["ros2", "launch", "edge_nodes", *words]
        environment = {**os.environ, "ROS_LOG_DIR": str(tmp_path / "log")}
        log = (tmp_path / f"launch-{len(processes)}.txt").open("w+")
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        processes.append((process, log))
        return process

    yield launch
    for process, log in processes:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(20.0)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        log.seek(0)
        print(log.read()[-4000:])


def test_the_planner_launches_out_of_the_box(launched: Any, robot: Robot) -> None:
    launched("planner.launch.py")
    robot.wait_state("/planner", "active", 60.0)
    assert robot.send_goal(MakePlan, "/make_plan", PLAN).result()[0] == 4


def test_launch_arguments_reach_the_node(launched: Any, robot: Robot, planner_path: Path) -> None:
    launched(
        "language.launch.py", f"engine:={planner_path}", "namespace:=head", "name:=chat", "autostart:=false"
    )
    assert robot.state("/head/chat", timeout=60.0) == "unconfigured"
    assert robot.parameter("/head/chat", "engine.path") == str(planner_path)
    robot.activate("/head/chat")


def test_a_robots_set_of_nodes_is_brought_up(
    launched: Any, robot: Robot, planner_path: Path, tmp_path: Path
) -> None:
    file = tmp_path / "robot.yaml"
    file.write_text(
        "nodes:\n"
        "  planner: {kind: planner, parameters: {deadline.default: 2, engine.threads: 1}}\n"
        f"  chat: {{kind: language, namespace: /head, parameters: {{engine.path: {planner_path}}}}}\n"
    )
    launched("bringup.launch.py", f"robot:={file}")
    for node in ("/planner", "/head/chat"):
        robot.wait_state(node, "active", 60.0)
    assert robot.parameter("/planner", "deadline.default") == 2.0
    assert robot.send_goal(MakePlan, "/make_plan", PLAN).result()[0] == 4


def test_a_wrong_set_of_nodes_starts_nothing(launched: Any, tmp_path: Path) -> None:
    file = tmp_path / "robot.yaml"
    file.write_text("nodes: {planner: {kind: planer}}\n")
    process = launched("bringup.launch.py", f"robot:={file}")
    assert process.wait(30.0) != 0
    assert "did you mean 'planner'" in (tmp_path / "launch-0.txt").read_text()
