"""A language node with a control loop's timer: how late each tick is goes out on ~/lateness.

test.timer_hz: ticks a second.
"""

from __future__ import annotations

import time

from edge_nodes.language_node import LanguageNode
from edge_nodes.spinning import spin_node
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from std_msgs.msg import Float64MultiArray

MESSAGE = 50  # ticks told at once


class TickingNode(LanguageNode):
    def serve(self) -> None:
        super().serve()
        self._late: list[float] = []
        self._due = 0.0
        self._period = 1 / self.declare_parameter("test.timer_hz", 100.0).value
        self._lateness = self.create_publisher(Float64MultiArray, "~/lateness", 10)
        self.create_timer(self._period, self._tick, callback_group=MutuallyExclusiveCallbackGroup())

    def _tick(self) -> None:
        """Lateness in ms against the first tick's grid; a timer leaves out the ticks that it missed."""
        now = time.monotonic()
        self._due = self._due or now
        late = max(0.0, now - self._due)
        self._late.append(1e3 * late)
        self._due += self._period * (1 + late // self._period)
        if len(self._late) == MESSAGE:
            self._lateness.publish(Float64MultiArray(data=self._late))
            self._late = []


if __name__ == "__main__":
    raise SystemExit(spin_node(TickingNode))
