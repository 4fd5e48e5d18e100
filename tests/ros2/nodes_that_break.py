"""A planner node that breaks where a parameter says: for tests of what follows.

test.where: the transition whose work raises, once. test.again: error processing raises as well. test.slow:
seconds that configuring takes longer. test.worker: the command of the engine's process. test.timer_hz: a
timer whose lateness is published on ~/lateness.
"""

from __future__ import annotations

import time
from typing import Any

from edge_nodes.planner_node import PlannerNode
from edge_nodes.spinning import spin_node
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from std_msgs.msg import Float64MultiArray


class BreakingNode(PlannerNode):
    def serve(self) -> None:
        super().serve()
        self._where = self.declare_parameter("test.where", "").value
        self._again = self.declare_parameter("test.again", False).value
        self._worker = self.declare_parameter("test.worker", "").value
        self._slow = self.declare_parameter("test.slow", 0.0).value
        hertz = self.declare_parameter("test.timer_hz", 0.0).value
        if hertz:
            self._late: list[float] = []
            self._due = 0.0
            self._period = 1 / hertz
            self._lateness = self.create_publisher(Float64MultiArray, "~/lateness", 10)
            self.create_timer(self._period, self._tick, callback_group=MutuallyExclusiveCallbackGroup())

    def _tick(self) -> None:
        """Lateness in ms against the first tick's grid, a hundred a message."""
        now = time.monotonic()
        if not self._due or now - self._due > 1.0:
            self._due = now
        self._late.append(1e3 * (now - self._due))
        self._due += self._period
        if len(self._late) == 100:
            self._lateness.publish(Float64MultiArray(data=self._late))
            self._late = []

    def _break(self, where: str) -> None:
        if self._where == where:
            self._where = "error" if self._again else ""
            raise RuntimeError(f"broken in {where}")

    def _make_engine(self, settings: Any) -> Any:
        engine = super()._make_engine(settings)
        if self._worker:
            engine._command = tuple(self._worker.split())
        return engine

    def _configure(self) -> None:
        time.sleep(self._slow)
        self._break("configure")
        super()._configure()

    def _activate(self, state: Any) -> None:
        self._break("activate")
        super()._activate(state)

    def _deactivate(self, state: Any) -> None:
        self._break("deactivate")
        super()._deactivate(state)

    def on_cleanup(self, state: Any) -> Any:
        return self._transition("cleaning up", "unconfigured", "inactive", self._broken, "cleanup")

    def on_shutdown(self, state: Any) -> Any:
        return self._transition("shutting down", "finalized", "finalized", self._broken, "shutdown")

    def on_error(self, state: Any) -> Any:
        return self._transition("error processing", "unconfigured", "finalized", self._broken, "error")

    def _broken(self, where: str) -> None:
        self._break(where)
        self._free()


if __name__ == "__main__":
    raise SystemExit(spin_node(BreakingNode))
