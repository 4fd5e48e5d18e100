"""Ask the planner node for a plan and print its calls as they come.

ros2 launch edge_nodes planner.launch.py                       # in one terminal
python3 plan_client.py bring me the red mug from the kitchen   # in another
"""

from __future__ import annotations

import sys

import rclpy
from builtin_interfaces.msg import Duration
from edge_interfaces.action import MakePlan
from rclpy.action import ActionClient
from rclpy.node import Node


def words(call: object) -> str:
    return f"{call.skill}({', '.join(f'{a.name}={a.value!r}' for a in call.arguments)})"


class PlanClient(Node):
    def __init__(self) -> None:
        super().__init__("plan_client")
        self._client = ActionClient(self, MakePlan, "make_plan")

    def plan(self, command: str, deadline: float = 2.0) -> MakePlan.Result:
        """The result; its plan is whole where finish_reason is "stop"."""
        if not self._client.wait_for_server(timeout_sec=10.0):
            raise RuntimeError("no planner: start it with 'ros2 launch edge_nodes planner.launch.py'")
        whole = Duration(sec=int(deadline), nanosec=int(deadline % 1 * 1e9))
        goal = MakePlan.Goal(command=command, deadline=whole)
        sent = self._client.send_goal_async(goal, feedback_callback=self._hear)
        rclpy.spin_until_future_complete(self, sent)
        if not sent.result().accepted:
            raise RuntimeError("the goal was rejected; the reason is on ~/rejections and in the node's log")
        ended = sent.result().get_result_async()
        rclpy.spin_until_future_complete(self, ended)
        return ended.result().result

    def _hear(self, message: object) -> None:
        for number, call in enumerate(message.feedback.calls, start=message.feedback.first + 1):
            print(f"  {number}. {words(call)}", flush=True)


def main() -> int:
    command = " ".join(sys.argv[1:]) or "bring me the red mug from the kitchen"
    rclpy.init()
    client = PlanClient()
    try:
        result = client.plan(command)
        print(
            f"{result.finish_reason}: {len(result.plan.calls)} calls, first token after "
            f"{result.timing.ttft_ms:.1f} ms, {result.timing.total_ms:.1f} ms in all"
        )
        return 0 if result.plan.complete else 1
    finally:
        client.destroy_node()
        rclpy.try_shutdown()


if __name__ == "__main__":
    raise SystemExit(main())
