"""A planner node that breaks where a parameter says: for tests of what follows.

test.where: the transition whose work raises, once. test.again: error processing raises as well. test.slow:
seconds that configuring takes longer. test.tail: seconds from a transition's new state to its answer.
test.worker: the command of the engine's process.
"""

from __future__ import annotations

import time
from typing import Any

from edge_nodes.planner_node import PlannerNode
from edge_nodes.spinning import spin_node


class BreakingNode(PlannerNode):
    def serve(self) -> None:
        super().serve()
        self._where = self.declare_parameter("test.where", "").value
        self._again = self.declare_parameter("test.again", False).value
        self._worker = self.declare_parameter("test.worker", "").value
        self._slow = self.declare_parameter("test.slow", 0.0).value
        self._tail = self.declare_parameter("test.tail", 0.0).value

    def _break(self, where: str) -> None:
        if self._where == where:
            self._where = "error" if self._again else ""
            raise RuntimeError(f"broken in {where}")

    def _guarded_change(self, change: Any) -> Any:
        def with_tail(request: Any, response: Any) -> Any:
            answer = change(request, response)
            time.sleep(self._tail)
            return answer

        return super()._guarded_change(with_tail)

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
