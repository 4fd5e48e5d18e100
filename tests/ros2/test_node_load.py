"""A node under load: a flood of goals, parameters that change while tokens are made, timers that go on."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from action_msgs.msg import GoalStatus, GoalStatusArray
from edge_interfaces.action import GenerateResponse
from edge_interfaces.msg import SamplingConfig
from node_process import resident
from rclpy.qos import DurabilityPolicy, QoSProfile
from robot import ENDED, Robot, action_client, wait_until
from std_msgs.msg import Float64MultiArray

LIMIT = 12  # goals that may be under way: 4 run, 8 wait
RATE, SECONDS = 200, 10  # goals a second


def long_goal(tokens: int = 900) -> Any:
    sampling = SamplingConfig(ignore_eos=True)
    return GenerateResponse.Goal(prompt="go to", max_tokens=tokens, sampling_config=sampling)


def test_two_hundred_goals_a_second_are_answered_and_the_queue_stays_bounded(
    start_node: Callable[..., Any], robot: Robot, planner_path: Path
) -> None:
    node = start_node(
        "edge_nodes.language_node",
        "language",
        engine__path=planner_path,
        queue__depth=LIMIT - 4,
        diagnostics__period=0.1,
        result__timeout=40,  # longer than a goal takes on a busy machine, as all end before it
    )
    robot.activate("/language")
    pid = node.process.pid
    # Room for all: however late this process reads, no answer pushes another out
    room = QoSProfile(depth=RATE * SECONDS)
    client = action_client(robot.node, GenerateResponse, "/generate_response", room)
    assert client.wait_for_server(timeout_sec=10.0)
    ends: Counter[int] = Counter()
    answers: Counter[bool] = Counter()
    sent = 0

    def send() -> None:
        client.send_goal_async(long_goal(100)).add_done_callback(answered)

    def answered(future: Any) -> None:
        handle = future.result()
        answers[handle.accepted] += 1
        if handle.accepted:
            handle.get_result_async().add_done_callback(lambda f: ends.update([f.result().status]))

    def flood(seconds: float) -> None:
        nonlocal sent
        begin = time.monotonic()
        for number in range(int(seconds * RATE)):
            time.sleep(max(0.0, begin + number / RATE - time.monotonic()))
            robot.soon(send)
            sent += 1

    robot.listen()
    flood(6.0)
    memory = resident(pid)
    flood(SECONDS - 6.0)

    def over(told: dict[str, str]) -> bool:
        """The node has answered every one, and what it took has ended."""
        return int(told["goals_refused"]) + int(told["goals_ended"]) == sent and told["pages_used"] == "0"

    values = robot.figures("/language", over, 20.0)[2]
    print(f"{sent} goals sent, {answers[True]} taken, {answers[False]} refused; the node says {values}")
    # This process also hears of each goal's state, and may be behind on a busy machine
    wait_until(lambda: sum(answers.values()) == sent, 20.0, "answers")
    wait_until(lambda: sum(ends.values()) == answers[True], 20.0, "ends")
    most = max(int(v.value) for m in robot.reports for s in m.status for v in s.values if v.key == "goals")
    assert answers[True] and answers[False], answers
    assert set(ends) == {GoalStatus.STATUS_SUCCEEDED}, ends
    assert most <= LIMIT == int(values["goals_limit"])
    assert int(values["goals_refused"]) == answers[False]
    assert int(values["goals_ended"]) == answers[True]
    assert node.alive
    assert resident(pid) - memory <= 4.0, f"{memory:.1f} to {resident(pid):.1f} MiB"


def test_goals_that_all_end_at_once_are_each_told_of_it(
    start_node: Callable[..., Any], robot: Robot, domain: int, planner_path: Path
) -> None:
    """By a deactivation, while their client reads nothing: no end pushes another out of a queue."""
    start_node("edge_nodes.language_node", "language", engine__path=planner_path)
    robot.activate("/language")
    goals = [robot.send_goal(GenerateResponse, "/generate_response", long_goal()) for _ in range(60)]
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        over.wait(60.0)

    def all_over(message: Any) -> bool:
        states = [entry.status for entry in message.status_list]
        return len(states) == len(goals) and set(states) <= set(ENDED)

    with Robot("other", domain_id=domain) as other:
        last = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
        states = other.subscribe("/generate_response/_action/status", GoalStatusArray, last)
        robot.soon(hold)
        try:
            assert held.wait(10.0)
            assert other.change_state("/language", "deactivate")
            states.wait(all_over, 10.0)
            time.sleep(0.5)  # a state is told before the result
        finally:
            over.set()
    statuses = Counter(g.result()[0] for g in goals)
    print(f"ends by status: {dict(statuses)}")
    assert statuses[GoalStatus.STATUS_ABORTED] > 20, statuses  # else they ended too early to tell


def test_five_hundred_parameter_changes_while_tokens_are_made(
    start_node: Callable[..., Any], robot: Robot, planner_path: Path
) -> None:
    node = start_node("edge_nodes.language_node", "language", engine__path=planner_path)
    robot.activate("/language")
    over = threading.Event()
    statuses: Counter[int] = Counter()

    def keep_busy() -> None:
        while not over.is_set():
            goals = [robot.send_goal(GenerateResponse, "/generate_response", long_goal()) for _ in range(3)]
            statuses.update(g.result()[0] for g in goals)

    busy = threading.Thread(target=keep_busy)
    busy.start()
    try:
        good = [
            ("sampling.temp", lambda n: 0.01 * (n % 50)),
            ("feedback.period", lambda n: 0.001 * (n % 20)),
            ("context.n_predict", lambda n: 1 + n),
            ("sampling.top_k", lambda n: n),
            ("speculative.enabled", lambda n: bool(n % 2)),
        ]
        bad = [
            ("sampling.temp", -1.0, "sampling.temp"),
            ("sampling.top_p", 1.5, "sampling.top_p"),
            ("sampling.temp", "hot", ""),  # refused by rclpy for its type
            ("engine.threads", 1, "clean up the node"),
            ("worker.enabled", False, "clean up the node"),
            ("result.timeout", 7, ""),  # read only
            ("sampling.tmp", 0.5, ""),  # not declared
        ]
        last: dict[str, Any] = {}
        for number in range(500):
            if number % 3:
                name, value = good[number % len(good)][0], good[number % len(good)][1](number)
                assert robot.set_parameter("/language", name, value) == (True, ""), (name, value)
                last[name] = value
            else:
                name, value, words = bad[number // 3 % len(bad)]
                accepted, reason = robot.set_parameter("/language", name, value)
                assert not accepted and reason and words in reason, (name, value, reason)
        for name, value in last.items():
            assert robot.parameter("/language", name) == pytest.approx(value)
    finally:
        over.set()
        busy.join(60.0)
    assert not busy.is_alive() and node.alive
    assert set(statuses) == {GoalStatus.STATUS_SUCCEEDED} and sum(statuses.values()) >= 3


def test_a_timer_of_the_node_goes_on_while_tokens_are_made(
    start_node: Callable[..., Any], robot: Robot, planner_path: Path
) -> None:
    """bench/ros_nodes.py measures how late its ticks are; here: none is left out for long."""
    start_node("ticking_node", "language", engine__path=planner_path)
    robot.activate("/language")
    lateness = robot.subscribe("/language/lateness", Float64MultiArray)
    until = time.monotonic() + 4.0
    while time.monotonic() < until:
        goals = [robot.send_goal(GenerateResponse, "/generate_response", long_goal()) for _ in range(4)]
        assert {g.result()[0] for g in goals} == {GoalStatus.STATUS_SUCCEEDED}
    ticks = [tick for message in lateness.messages for tick in message.data]
    assert len(ticks) >= 200 and max(ticks) < 500.0, (len(ticks), max(ticks, default=0.0))
