"""A behaviour tree's view of the planner: a leaf that ticks, never blocks, and fails in time.

The tree is `Fallback(Plan(deadline), CannedPlan)`, ticked at 20 Hz. `Plan` has the three answers of every
behaviour tree (SUCCESS, FAILURE, RUNNING) and `halt`, so it goes into py_trees or the like as it stands. When
the model is late, its goal is given up, and the robot does what it can without it.

    ros2 launch edge_nodes planner.launch.py
    python3 plan_with_deadline.py [--deadline 0.5] bring me the red mug
"""

from __future__ import annotations

import argparse
import time
from enum import Enum
from typing import Any

import rclpy
from builtin_interfaces.msg import Duration
from edge_interfaces.action import MakePlan
from edge_interfaces.msg import SkillCall
from rclpy.action import ActionClient
from rclpy.node import Node

TICK = 0.05  # s


class Status(Enum):
    SUCCESS = 1
    FAILURE = 2
    RUNNING = 3


class Plan:
    """A leaf: asks for a plan, and waits for it no longer than `deadline` seconds.

    The node keeps the deadline too, and aborts a goal that is late. This side's clock is for a node that is
    gone. `calls`: the plan, after SUCCESS. `why`: after FAILURE.
    """

    def __init__(self, node: Node, command: str, deadline: float) -> None:
        self._client = ActionClient(node, MakePlan, "make_plan")
        self._command = command
        self._deadline = deadline
        self._since: float | None = None
        self._sent: Any = None
        self._ended: Any = None
        self.calls: list[SkillCall] = []
        self.why = ""

    def tick(self) -> Status:
        now = time.monotonic()
        if self._since is None:
            self._since = now
        if self._sent is None and self._client.server_is_ready():
            left = max(0.001, self._deadline - (now - self._since))
            span = Duration(sec=int(left), nanosec=int(left % 1 * 1e9))
            self._sent = self._client.send_goal_async(MakePlan.Goal(command=self._command, deadline=span))
        if self._sent is not None and self._ended is None and self._sent.done():
            if not self._sent.result().accepted:
                return self._fail("the planner refused: see its topic ~/rejections")
            self._ended = self._sent.result().get_result_async()
        if self._ended is not None and self._ended.done():
            result = self._ended.result().result
            if not result.plan.complete:
                return self._fail(f"the plan ended by {result.finish_reason} {result.error}".rstrip())
            self.calls = list(result.plan.calls)
            return Status.SUCCESS
        if now - self._since > self._deadline + 2 * TICK:
            self.halt()
            return self._fail(f"no plan within {self._deadline:g} s")
        return Status.RUNNING

    def halt(self) -> None:
        """Give the goal up, as a tree does with a leaf that it leaves."""
        if self._sent is not None and self._sent.done() and self._sent.result().accepted:
            self._sent.result().cancel_goal_async()

    def _fail(self, why: str) -> Status:
        self.why = why
        return Status.FAILURE


class CannedPlan:
    """What the robot does when nobody planned in time: it says so and waits."""

    def __init__(self) -> None:
        self.calls = [SkillCall(skill="say"), SkillCall(skill="wait")]

    def tick(self) -> Status:
        return Status.SUCCESS


class Fallback:
    """Ticks the first child until it fails, then the next."""

    def __init__(self, *children: Any) -> None:
        self._children = list(children)
        self._at = 0

    @property
    def calls(self) -> list[SkillCall]:
        return list(self._children[self._at].calls)

    def tick(self) -> Status:
        while True:
            status = self._children[self._at].tick()
            if status != Status.FAILURE or self._at + 1 == len(self._children):
                return status
            print(f"fallback: {self._children[self._at].why}", flush=True)
            self._at += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--deadline", type=float, default=0.5, help="seconds that the robot can wait")
    parser.add_argument("command", nargs="*", default=["bring", "me", "the", "red", "mug"])
    options = parser.parse_args()
    rclpy.init()
    node = Node("mission")
    try:
        plan = Plan(node, " ".join(options.command), options.deadline)
        tree = Fallback(plan, CannedPlan())
        begin = time.monotonic()
        while (status := tree.tick()) == Status.RUNNING:
            rclpy.spin_once(node, timeout_sec=TICK)  # a mission's own timers and topics run here
        print(f"{status.name} after {time.monotonic() - begin:.3f} s")
        for call in tree.calls:
            print(f"  {call.skill}({', '.join(f'{a.name}={a.value!r}' for a in call.arguments)})")
        return 0 if status == Status.SUCCESS else 1
    finally:
        node.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
