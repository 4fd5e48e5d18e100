"""A thousand goals cancelled at six stages: a legal end each time, and nothing left behind."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from action_msgs.msg import GoalStatus
from edge_interfaces.action import GenerateResponse
from edge_interfaces.msg import SamplingConfig
from robot import Robot, SentGoal, wait_until

GOALS = 1000
STAGES = ("queued", "prefill", "first token", "decode", "last token", "success")
ANY_STAGE = ("prefill", "first token", "decode", "last token", "success")
NODE, ACTION = "/language", "/generate_response"
# What the goal design allows to be seen of a goal, in this order: 1 accepted, 2 executing, 3 canceling
LEGAL = {(1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3), ()}


@pytest.fixture
def language(start_node: Callable[..., Any], robot: Robot, planner_path: Any, worker: bool) -> Any:
    process = start_node(
        "edge_nodes.language_node",
        "language",
        engine__path=planner_path,
        worker__enabled=worker,
        context__n_parallel=2,
        queue__depth=8,
        feedback__period=0.0,
        diagnostics__period=0.1,
        speculative__type="none",
    )
    robot.activate(NODE)
    return process


def goal_of(prompt: str, tokens: int) -> Any:
    config = SamplingConfig(ignore_eos=True)
    return GenerateResponse.Goal(prompt=prompt, max_tokens=tokens, sampling_config=config)


def tokens_of(sent: SentGoal) -> int:
    return sum(len(f.partial_response.tokens) for f in sent.feedback)


def reach(sent: SentGoal, tokens: int) -> None:
    """Wait for so many; feedback is a topic, so some may be lost on the way."""
    wait_until(lambda: tokens_of(sent) >= tokens or sent.done, 10.0, f"{tokens} tokens")


def quiet(robot: Robot) -> dict[str, str]:
    """The figures once nothing is under way."""
    idle = {"goals": "0", "running": "0", "waiting": "0", "pages_used": "0"}
    return dict(robot.figures(NODE, lambda v: all(v.get(k) == x for k, x in idle.items()))[2])


def check_end(sent: SentGoal, stage: str) -> int:
    status, result = sent.result()
    allowed = {GoalStatus.STATUS_CANCELED: {"cancelled"}, GoalStatus.STATUS_SUCCEEDED: {"stop", "length"}}
    assert result.finish_reason in allowed.get(status, ()), (stage, status, result.finish_reason)
    assert result.error == "" and tokens_of(sent) <= result.usage.completion_tokens
    assert len(result.response.tokens) == result.usage.completion_tokens
    seen = tuple(sent.statuses)
    assert seen[:-1] in LEGAL and (not seen or seen[-1] in (*range(1, 4), status)), (stage, seen)
    return status


@pytest.mark.parametrize("worker", [True, False], ids=["worker", "in the process"])
def test_a_thousand_cancels_at_six_stages(language: Any, robot: Robot, worker: bool) -> None:
    """In each of the two ways to run an engine, half of them."""
    rng = random.Random(5)

    def send(prompt: str, tokens: int) -> SentGoal:
        return robot.send_goal(GenerateResponse, ACTION, goal_of(prompt, tokens))

    before = time.monotonic()
    send("go", 12).result()
    length = time.monotonic() - before
    ends: dict[str, Counter[int]] = {stage: Counter() for stage in STAGES}
    long_prompt = "go to the kitchen and find the red mug " * 60
    many = GOALS // 2 // len(STAGES)

    for _ in range(many):
        for stage in ANY_STAGE:
            # Long enough that a cancel on a busy machine comes before the end
            tokens = {"success": 12, "last token": 40}.get(stage, 900)
            sent = send(long_prompt if stage == "prefill" else "go to", tokens)
            if stage == "success":
                time.sleep(rng.random() * 1.2 * length)
            elif stage != "prefill":
                reach(sent, {"first token": 1, "decode": rng.randint(2, 60), "last token": 38}[stage])
            code, agreed = sent.cancel()
            end = check_end(sent, stage)
            # 3: the goal had ended; 0 without it: it ended between the server's yes and its change of state
            assert code == 0 if agreed else code in (0, 3) and end == GoalStatus.STATUS_SUCCEEDED
            ends[stage][end] += 1

    runners: list[SentGoal] = []
    tries = 0
    while ends["queued"].total() < many:  # behind two that hold both slots
        tries += 1
        runners = [r for r in runners if not r.done]
        while len(runners) < 2:
            runners.append(send("go to", 900))
        sent = send("go to", 200)
        code, agreed = sent.cancel()
        end = check_end(sent, "queued")
        # A runner that ended gave its slot to this goal: its end is told before the goal's
        if any(runner.done for runner in runners):
            assert agreed or (code == 3 and end == GoalStatus.STATUS_SUCCEEDED)
            continue
        assert agreed and not sent.feedback and sent.result()[1].usage.completion_tokens == 0
        ends["queued"][end] += 1
    assert tries <= 2 * many
    for runner in runners:
        runner.cancel()
        check_end(runner, "runner")

    assert sum(sum(c.values()) for c in ends.values()) == many * len(STAGES)
    cancelled = {stage: c[GoalStatus.STATUS_CANCELED] for stage, c in ends.items()}
    assert cancelled["queued"] == many and cancelled["decode"] > 0.7 * many, ends
    assert ends["success"][GoalStatus.STATUS_SUCCEEDED] > 0, ends
    # All slots and pages are free, and nothing is computed any more
    first = quiet(robot)
    time.sleep(0.5)
    assert quiet(robot)["steps"] == first["steps"] and language.alive
    assert send("go to", 8).result()[0] == GoalStatus.STATUS_SUCCEEDED


@pytest.mark.parametrize("worker", [True, False], ids=["worker", "in the process"])
def test_compute_stops_within_one_step_of_the_cancel(
    start_node: Callable[..., Any], robot: Robot, planner_path: Any, worker: bool
) -> None:
    """Steps of 0.2 s, far longer than a message's way: a cancel meets a step under way, and that is the last.

    A token more only where the cancel crossed the token of the step before on the wire.
    """
    start_node(
        "slow_node",
        "language",
        engine__path=planner_path,
        worker__enabled=worker,
        feedback__period=0.0,
        diagnostics__period=0.1,
        speculative__type="none",
        test__step=0.2,
    )
    robot.activate(NODE)
    rng, made = random.Random(3), []
    for _ in range(6):
        sent = robot.send_goal(GenerateResponse, ACTION, goal_of("go to", 900))
        reach(sent, 2)
        time.sleep(0.2 * rng.random())
        had = tokens_of(sent)
        sent.cancel()
        status, result = sent.result()
        steps = int(quiet(robot)["steps"])
        assert status == GoalStatus.STATUS_CANCELED
        made.append(result.usage.completion_tokens - had)
    time.sleep(0.5)
    assert int(quiet(robot)["steps"]) == steps, "the engine computes for nobody"
    assert max(made) <= 2 and sum(m > 1 for m in made) <= 2, made
