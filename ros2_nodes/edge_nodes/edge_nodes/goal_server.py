"""GoalServer: an action whose goals are jobs of an engine. Written once, for the actions of every node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import msgspec
from action_msgs.msg import GoalStatus
from rclpy.action import CancelResponse, GoalResponse
from rclpy.action.server import ServerGoalHandle
from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from rclpy.qos import QoSProfile

from edge_nodes.deferred_action import DeferredActionServer
from edge_nodes.edge_node import EdgeNode
from edge_nodes.job import Ended, Job, Progress
from edge_nodes.jobs import Refusal, Ticket
from edge_nodes.parameter_table import MOST_PARALLEL, MOST_WAITING
from edge_nodes.rejections import Rejections
from edge_runtime import EdgeError

# rclpy forgets a goal at result.timeout and drops the result of one that ends then: all end this much earlier
_MARGIN = 2.0  # seconds
# The most goals that any queue.depth lets be under way: all may end at once, as at a deactivation, and of
# more answers than its history holds, DDS drops the oldest without a word. Likewise the requests of a flood
_SERVICES = QoSProfile(depth=MOST_WAITING + MOST_PARALLEL)
_FEEDBACK = QoSProfile(depth=100)  # pieces of a text: one that is pushed out of the queue is missing


class Answer(Protocol):
    """What one goal's events become. Called on a thread of the engine, one event after another."""

    def add(self, event: Progress) -> None: ...

    def feedback(self) -> Any | None:
        """A message of what is new since the last one; None where nothing is."""

    def end(self, ended: Ended) -> tuple[Any, bool]:
        """The result, and whether the goal succeeded."""


class _Goal:
    __slots__ = ("answer", "began", "cancelled", "handle", "last", "period", "ticket")

    def __init__(self, handle: ServerGoalHandle, answer: Answer, period: float) -> None:
        self.handle = handle
        self.answer = answer
        self.period = period
        self.last = 0.0  # feedback, on the monotonic clock
        self.began = False
        self.cancelled = False  # by its client, and not by the node that is deactivated
        self.ticket: Ticket | None = None


class GoalServer:
    """job_of(goal, settings): the job of a goal, raising EdgeErrors. answer_of(handle): its Answer."""

    def __init__(
        self,
        node: EdgeNode,
        rejections: Rejections,
        action_type: Any,
        name: str,
        job_of: Callable[[Any, Mapping[str, Any]], Job],
        answer_of: Callable[[ServerGoalHandle], Answer],
    ) -> None:
        self._node = node
        self._rejections = rejections
        self._name = name
        self._job_of = job_of
        self._answer_of = answer_of
        self._longest = node.parameters["result.timeout"] - _MARGIN
        self._goals: dict[bytes, _Goal] = {}
        self._lock = threading.Lock()
        self._server = DeferredActionServer(
            node,
            action_type,
            name,
            callback_group=MutuallyExclusiveCallbackGroup(),
            goal_callback=self._on_goal,
            handle_accepted_callback=self._on_accepted,
            cancel_callback=self._on_cancel,
            result_timeout=node.parameters["result.timeout"],
            goal_service_qos_profile=_SERVICES,
            cancel_service_qos_profile=_SERVICES,
            result_service_qos_profile=_SERVICES,
            feedback_pub_qos_profile=_FEEDBACK,
        )

    def _on_goal(self, goal: Any) -> GoalResponse:
        """Quick, as no goal waits here: the engine is asked nothing."""
        try:
            jobs = self._node.check_accepting()
            jobs.check(self._job_of(goal, self._node.parameters.snapshot))
            return GoalResponse.ACCEPT
        except Refusal as refusal:
            self._rejections.publish(self._name, refusal.code, str(refusal))
        except EdgeError as error:
            self._rejections.publish(self._name, "bad_request", str(error))
        except Exception as error:
            self._node.unexpected(f"a goal of {self._name}", error)
        return GoalResponse.REJECT

    def _on_accepted(self, handle: ServerGoalHandle) -> None:
        settings = self._node.parameters.snapshot
        goal = _Goal(handle, self._answer_of(handle), settings["feedback.period"])
        with self._lock:
            self._goals[bytes(handle.goal_id.uuid)] = goal
        try:
            jobs = self._node.check_accepting()
            job = self._job_of(handle.request, settings)
            if job.deadline is None or job.deadline > self._longest:
                job = msgspec.structs.replace(job, deadline=self._longest)
            goal.ticket = jobs.start(
                job, lambda e: self._on_progress(goal, e), lambda e: self._on_end(goal, e)
            )
        except (Refusal, EdgeError) as error:  # deactivated since the goal was accepted
            self._on_end(goal, Ended(number=0, reason="error", error=str(error), code="bad_request"))
        except Exception as error:
            self._node.unexpected(f"a goal of {self._name}", error)
            self._on_end(goal, Ended(number=0, reason="error", error=str(error), code="internal"))

    def _on_cancel(self, handle: ServerGoalHandle) -> CancelResponse:
        with self._lock:
            goal = self._goals.get(bytes(handle.goal_id.uuid))
        jobs = self._node.jobs
        if goal is not None and goal.ticket is not None and jobs is not None:
            goal.cancelled = True
            jobs.cancel(goal.ticket)
        return CancelResponse.ACCEPT

    def _on_progress(self, goal: _Goal, event: Progress) -> None:
        try:
            self._begin(goal)
            goal.answer.add(event)
            now = time.monotonic()
            if now - goal.last >= goal.period:
                goal.last = now
                self._feed(goal)
        except Exception as error:
            self._node.unexpected(f"feedback of {self._name}", error)

    def _on_end(self, goal: _Goal, ended: Ended) -> None:
        try:
            with self._lock:
                self._goals.pop(bytes(goal.handle.goal_id.uuid), None)
            self._begin(goal)
            self._feed(goal)
            result, succeeded = goal.answer.end(ended)
            cancelled = goal.cancelled and ended.reason == "cancelled"
            self._server.finish(goal.handle, succeeded=succeeded, cancelled=cancelled, result=result)
        except Exception as error:
            self._node.unexpected(f"the end of a goal of {self._name}", error)

    def _begin(self, goal: _Goal) -> None:
        """The goal runs, as its first token tells; one in line is only accepted."""
        if not goal.began:
            goal.began = True
            if goal.handle.status == GoalStatus.STATUS_ACCEPTED:
                try:
                    goal.handle.execute()
                except Exception:
                    if goal.handle.status == GoalStatus.STATUS_ACCEPTED:
                        raise  # else a cancel came between, and the goal is CANCELING

    def _feed(self, goal: _Goal) -> None:
        message = goal.answer.feedback()
        if message is not None and goal.handle.is_active:
            goal.handle.publish_feedback(message)
