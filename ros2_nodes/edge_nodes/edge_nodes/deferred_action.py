"""An action server whose goals run elsewhere: no callback, so no thread of the executor, waits for one."""

from __future__ import annotations

import time
from typing import Any

from rclpy.action import ActionServer
from rclpy.action.server import ServerGoalHandle

_BURST = 32  # requests that are answered at one wake
_CANCEL_WAIT = 1.0  # seconds until a cancel that was accepted must have become the goal's state


def _never_called(handle: ServerGoalHandle) -> None:
    """rclpy asks for a callback, which `notify_execute` does not call."""


class DeferredActionServer(ActionServer):
    """`handle.execute()` says that a goal runs; `finish` gives its result, from any thread."""

    def __init__(self, node: Any, action_type: Any, name: str, **options: Any) -> None:
        super().__init__(node, action_type, name, _never_called, **options)

    def notify_execute(self, goal_handle: ServerGoalHandle, execute_callback: Any) -> None:
        """Called by `execute()` after the state became EXECUTING. Nothing is run here."""

    async def execute(self, taken_data: Any) -> None:
        """Answer all requests that are there, and not one a wake of the executor.

        To wait anew, rclpy looks at every entity of the node, which takes longer than an answer.
        """
        for _ in range(_BURST):
            if not any(taken_data.values()):
                return
            await super().execute(taken_data)
            taken_data = self.take_data()

    def finish(self, handle: ServerGoalHandle, *, succeeded: bool, cancelled: bool, result: Any) -> None:
        """End a goal that runs. cancelled: because its client asked; any other failure is an abort."""

        def end(handle: ServerGoalHandle) -> Any:
            # The state becomes CANCELING after the cancel callback only, on which the engine acted at once
            due = time.monotonic() + _CANCEL_WAIT
            while cancelled and handle.is_active and not handle.is_cancel_requested:
                if time.monotonic() > due:
                    break
                time.sleep(0.001)
            if handle.is_active:
                if succeeded:
                    handle.succeed()
                elif cancelled and handle.is_cancel_requested:
                    handle.canceled()
                else:
                    handle.abort()
            return result

        super().notify_execute(handle, end)
