"""activate NODE: bring a lifecycle node to `active`. Launch files run it each time a node's process starts.

A program of its own, not launch_ros's event: a node that was killed leaves its services in DDS's graph for
the length of a lease, a request to those is lost, and the event would wait for its answer for ever.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import rclpy
from lifecycle_msgs.srv import ChangeState, GetState
from rclpy.executors import ExternalShutdownException, SingleThreadedExecutor
from rclpy.node import Node

ASK_SECONDS = 1.0  # until a question about the state is asked again
LOST_SECONDS = 3.0  # in the same state after a request: it was lost
_NEXT = {"unconfigured": "configure", "inactive": "activate"}
_OVER = ("active", "finalized")


class Activation:
    """Drives one node. name: fully qualified."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._node = Node("activate", start_parameter_services=False)
        self._executor = SingleThreadedExecutor()
        self._executor.add_node(self._node)
        self._states = self._node.create_client(GetState, f"{name}/get_state")
        self._changes = self._node.create_client(ChangeState, f"{name}/change_state")

    def run(self) -> str:
        """Why the node is not active in the end; "" where it is. Waits as long as its transitions take."""
        answer: Any = None  # of the newest request
        asked, since, state = "", 0.0, ""
        while rclpy.ok():
            refused = answer is not None and answer.done() and not answer.result().success
            state = self._state()  # after the answer: a request that only seemed lost shows in it
            if state in _OVER:
                return "" if state == "active" else f"{self._name} is {state}"
            wanted = _NEXT.get(state, "")
            if refused and wanted == asked:
                return f"{self._name}: {asked} failed; its log and /diagnostics say why"
            if wanted and (wanted != asked or time.monotonic() - since > LOST_SECONDS):
                asked, since = wanted, time.monotonic()
                request = ChangeState.Request()
                request.transition.label = asked
                answer = self._changes.call_async(request)
            self._executor.spin_once(timeout_sec=0.05)
        return f"stopped while {self._name} was {state or 'not there'}"

    def close(self) -> None:
        self._node.destroy_node()

    def _state(self) -> str:
        """The label now; "" where nobody answers."""
        if not self._states.wait_for_service(timeout_sec=ASK_SECONDS):
            return ""
        answer = self._states.call_async(GetState.Request())
        self._executor.spin_until_future_complete(answer, timeout_sec=ASK_SECONDS)
        if not answer.done():
            self._states.remove_pending_request(answer)
            return ""
        return str(answer.result().current_state.label)


def main(args: list[str] | None = None) -> int:
    rclpy.init(args=args)
    words = [w for w in sys.argv[1:] if not w.startswith("-")][:1] if args is None else args[:1]
    if not words:
        print("activate: give the name of a lifecycle node, such as /planner", file=sys.stderr)
        return 2
    activation = Activation(words[0])
    try:
        why = activation.run()
    except (KeyboardInterrupt, ExternalShutdownException):
        return 0
    finally:
        activation.close()
        rclpy.try_shutdown()
    if why:
        print(f"activate: {why}", file=sys.stderr, flush=True)
    return 1 if why else 0


if __name__ == "__main__":
    raise SystemExit(main())
