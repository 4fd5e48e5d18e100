"""Action servers, with the life of goals as rcl_action has it and the timing of rclpy's callbacks."""

from __future__ import annotations

import functools
import threading
import time
import traceback
from collections.abc import Callable
from enum import Enum
from typing import Any

from action_msgs.msg import GoalInfo, GoalStatus, GoalStatusArray

from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.qos import QoSProfile, qos_profile_action_status_default, qos_profile_services_default
from rclpy.service import Service
from rclpy.task import Future, await_or_execute

from .goal_book import Goal, GoalBook, GoalEvent

RCLError = rclpy_implementation.RCLError


class GoalResponse(Enum):
    REJECT = 1
    ACCEPT = 2


class CancelResponse(Enum):
    REJECT = 1
    ACCEPT = 2


class ServerGoalHandle:
    def __init__(self, server: ActionServer, goal: Goal, goal_info: Any, request: Any) -> None:
        self._action_server = server
        self._goal: Goal | None = goal
        self._info = goal_info
        self._entry = GoalStatus(goal_info=goal_info, status=goal.status)
        self._goal_request = request
        self._lock = threading.Lock()

    @property
    def request(self) -> Any:
        return self._goal_request

    @property
    def goal_id(self) -> Any:
        return self._info.goal_id

    @property
    def is_active(self) -> bool:
        with self._lock:
            return self._goal is not None and self._goal.active

    @property
    def is_cancel_requested(self) -> bool:
        return self.status == GoalStatus.STATUS_CANCELING

    @property
    def status(self) -> int:
        with self._lock:
            return GoalStatus.STATUS_UNKNOWN if self._goal is None else self._goal.status

    def _update_state(self, event: GoalEvent) -> None:
        with self._lock:
            if self._goal is None:
                return
            trouble = self._action_server.advance(self._goal, event)
            if trouble is not None:
                raise RCLError(f"Failed to update goal state: {trouble}")
            self._entry.status = self._goal.status
        self._action_server.publish_status()
        if not self.is_active:
            self._action_server.notify_goal_done()

    def execute(self, execute_callback: Any = None) -> None:
        if not self.is_cancel_requested:
            self._update_state(GoalEvent.EXECUTE)
        self._action_server.notify_execute(self, execute_callback)

    def publish_feedback(self, feedback: Any) -> None:
        if not isinstance(feedback, self._action_server.action_type.Feedback):
            raise TypeError
        with self._lock:
            if self._goal is None:
                return
        self._action_server.publish_feedback(self.goal_id, feedback)

    def succeed(self) -> None:
        self._update_state(GoalEvent.SUCCEED)

    def abort(self) -> None:
        self._update_state(GoalEvent.ABORT)

    def canceled(self) -> None:
        self._update_state(GoalEvent.CANCELED)

    def destroy(self) -> None:
        with self._lock:
            self._goal = None


class ActionServer:
    def __init__(
        self,
        node: Any,
        action_type: Any,
        action_name: str,
        execute_callback: Any,
        *,
        callback_group: Any = None,
        goal_callback: Any = None,
        handle_accepted_callback: Any = None,
        cancel_callback: Any = None,
        goal_service_qos_profile: Any = qos_profile_services_default,
        result_service_qos_profile: Any = qos_profile_services_default,
        cancel_service_qos_profile: Any = qos_profile_services_default,
        feedback_pub_qos_profile: Any = None,
        status_pub_qos_profile: Any = qos_profile_action_status_default,
        result_timeout: float = 900,
    ) -> None:
        for callback in (execute_callback, goal_callback, handle_accepted_callback, cancel_callback):
            if not callable(callback) and (callback is not None or callback is execute_callback):
                raise TypeError(f"Failed to register a callback of {action_name}: not callable")
        self.callback_group = callback_group or node.default_callback_group
        self._node = node
        self._action_type = action_type
        self._execute_callback = execute_callback
        self._goal_callback = goal_callback or (lambda goal: GoalResponse.ACCEPT)
        self._accepted_callback = handle_accepted_callback or (lambda handle: handle.execute())
        self._cancel_callback = cancel_callback or (lambda handle: CancelResponse.REJECT)
        self._lock = threading.Lock()
        self._telling = threading.Lock()
        self._book = GoalBook(int(result_timeout * 10**9))
        self._handles: dict[bytes, ServerGoalHandle] = {}
        self._results: dict[bytes, Future] = {}
        base, impl = f"{node.resolve(action_name)}/_action", action_type.Impl
        group = self.callback_group

        def service(kind: Any, name: str, qos: Any) -> Service:
            return Service(node, kind, f"{base}/{name}", lambda *_: None, group, qos)

        self._goals = service(impl.SendGoalService, "send_goal", goal_service_qos_profile)
        self._cancels = service(impl.CancelGoalService, "cancel_goal", cancel_service_qos_profile)
        self._asked = service(impl.GetResultService, "get_result", result_service_qos_profile)
        feedback_qos = feedback_pub_qos_profile or QoSProfile(depth=10)
        self._feedback = node.create_publisher(impl.FeedbackMessage, f"{base}/feedback", feedback_qos)
        self._status = node.create_publisher(GoalStatusArray, f"{base}/status", status_pub_qos_profile)
        self.callback_group.add_entity(self)
        node.add_waitable(self)

    @property
    def action_type(self) -> Any:
        return self._action_type

    # --- for the executor ---

    @property
    def ready(self) -> bool:
        return self._goals.ready or self._cancels.ready or self._asked.ready or self._expires()

    def take(self) -> Callable[[], Any] | None:
        work = []
        for service, answer in (
            (self._goals, self._on_goal),
            (self._cancels, self._on_cancel),
            (self._asked, self._on_result_request),
        ):
            found = service.take_request() if service.ready else None
            if found is not None:
                work.append(answer(*found))
        self._forget_old()
        if not work:
            return None

        async def all_of_it() -> None:
            for part in work:
                await part

        return lambda: _finish_at_once(all_of_it())

    def _expires(self) -> bool:
        due = self._book.next_expiry(time.time_ns())
        return due is not None and due <= 0

    def _forget_old(self) -> None:
        with self._lock:
            old = self._book.expire(time.time_ns())
        for uuid in old:
            handle = self._handles.pop(uuid, None)
            if handle is not None:
                handle.destroy()
            self._results.pop(uuid, None)

    # --- requests ---

    async def _on_goal(self, asker: Any, request: Any) -> None:
        uuid = bytes(request.goal_id.uuid)
        info = GoalInfo(goal_id=request.goal_id)
        accepted = False
        if uuid not in self._handles:
            response = await await_or_execute(self._goal_callback, request.goal)
            accepted = response == GoalResponse.ACCEPT
        handle = None
        if accepted:
            now = self._node.get_clock().now()
            info.stamp = now.to_msg()
            with self._lock:
                goal = self._book.accept(uuid, now.nanoseconds)
            handle = ServerGoalHandle(self, goal, info, request.goal)
            self._handles[uuid] = handle
            self._results[uuid] = Future()
            self.publish_status()
        answer = self._action_type.Impl.SendGoalService.Response(accepted=accepted, stamp=info.stamp)
        self._goals.send_response(answer, asker)
        if handle is not None:
            await await_or_execute(self._accepted_callback, handle)

    async def _on_cancel(self, asker: Any, request: Any) -> None:
        uuid = bytes(request.goal_info.goal_id.uuid)
        stamp = request.goal_info.stamp.sec * 10**9 + request.goal_info.stamp.nanosec
        with self._lock:
            code, goals = self._book.to_cancel(uuid, stamp)
        response = self._action_type.Impl.CancelGoalService.Response(return_code=code)
        cancelling = []
        for goal in goals:
            handle = self._handles[goal.uuid]
            if await await_or_execute(self._cancel_callback, handle) != CancelResponse.ACCEPT:
                continue
            try:
                handle._update_state(GoalEvent.CANCEL_GOAL)
            except RCLError:  # it ended since
                continue
            cancelling.append(handle._info)
        response.goals_canceling = cancelling
        self._cancels.send_response(response, asker)

    async def _on_result_request(self, asker: Any, request: Any) -> None:
        future = self._results.get(bytes(request.goal_id.uuid))
        if future is None:
            unknown = self._action_type.Impl.GetResultService.Response(status=GoalStatus.STATUS_UNKNOWN)
            self._asked.send_response(unknown, asker)
            return
        future.add_done_callback(functools.partial(self._send_result, asker))

    def _send_result(self, asker: Any, future: Future) -> None:
        self._asked.send_response(future.result(), asker)

    # --- running ---

    async def _execute_goal(self, execute_callback: Any, handle: ServerGoalHandle) -> None:
        try:
            result = await await_or_execute(execute_callback, handle)
        except Exception as error:
            result = self._action_type.Result()
            self._node.get_logger().error(f"Error raised in execute callback: {error}")
            traceback.print_exc()
        if handle.is_active:
            self._node.get_logger().warning("Goal state not set, assuming aborted.")
            handle.abort()
        response = self._action_type.Impl.GetResultService.Response(status=handle.status, result=result)
        self._results[bytes(handle.goal_id.uuid)].set_result(response)

    def notify_execute(self, goal_handle: ServerGoalHandle, execute_callback: Any) -> None:
        callback = execute_callback or self._execute_callback
        if callback is not None:
            self._node.executor.create_task(self._execute_goal, callback, goal_handle)

    def advance(self, goal: Goal, event: GoalEvent) -> str | None:
        with self._lock:
            return self._book.advance(goal, event)

    def notify_goal_done(self) -> None:
        self._node.wake()

    def publish_status(self) -> None:
        with self._telling:  # else an older look could be published after a newer one
            entries = [handle._entry for handle in list(self._handles.values())]
            self._status.publish(GoalStatusArray(status_list=entries))

    def publish_feedback(self, goal_id: Any, feedback: Any) -> None:
        self._feedback.publish(self._action_type.Impl.FeedbackMessage(goal_id=goal_id, feedback=feedback))

    def destroy(self) -> None:
        self._node.remove_waitable(self)
        for service in (self._goals, self._cancels, self._asked):
            service.destroy()
        self._node.destroy_publisher(self._feedback)
        self._node.destroy_publisher(self._status)
        for handle in self._handles.values():
            handle.destroy()


def _finish_at_once(coroutine: Any) -> Any:
    """Run it; what waits for something is given back, to go on as a task."""
    try:
        coroutine.send(None)
    except StopIteration:
        return None
    return coroutine
