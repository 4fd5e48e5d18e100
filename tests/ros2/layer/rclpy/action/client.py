"""Action clients."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Any

from action_msgs.msg import GoalInfo, GoalStatus, GoalStatusArray
from action_msgs.srv import CancelGoal
from unique_identifier_msgs.msg import UUID

from rclpy.qos import QoSProfile, qos_profile_action_status_default, qos_profile_services_default
from rclpy.task import Future


class ClientGoalHandle:
    def __init__(self, client: ActionClient, goal_id: Any, response: Any) -> None:
        self._client = client
        self._goal_id = goal_id
        self._response = response
        self.status = GoalStatus.STATUS_UNKNOWN

    @property
    def goal_id(self) -> Any:
        return self._goal_id

    @property
    def stamp(self) -> Any:
        return self._response.stamp

    @property
    def accepted(self) -> bool:
        return bool(self._response.accepted)

    def get_result_async(self) -> Future:
        return self._client.ask_result(self._goal_id)

    def cancel_goal_async(self) -> Future:
        return self._client.ask_cancel(self._goal_id)


class ActionClient:
    def __init__(
        self,
        node: Any,
        action_type: Any,
        action_name: str,
        *,
        callback_group: Any = None,
        goal_service_qos_profile: Any = qos_profile_services_default,
        result_service_qos_profile: Any = qos_profile_services_default,
        cancel_service_qos_profile: Any = qos_profile_services_default,
        feedback_sub_qos_profile: Any = None,
    ) -> None:
        self._node = node
        self._action_type = action_type
        base, impl = f"{node.resolve(action_name)}/_action", action_type.Impl

        def client(kind: Any, name: str, qos: Any) -> Any:
            return node.create_client(kind, f"{base}/{name}", qos_profile=qos, callback_group=callback_group)

        self._send = client(impl.SendGoalService, "send_goal", goal_service_qos_profile)
        self._cancel = client(CancelGoal, "cancel_goal", cancel_service_qos_profile)
        self._result = client(impl.GetResultService, "get_result", result_service_qos_profile)
        self._listeners: dict[bytes, Callable[[Any], Any]] = {}
        self._handles: dict[bytes, ClientGoalHandle] = {}
        self._subscriptions = [
            node.create_subscription(
                impl.FeedbackMessage,
                f"{base}/feedback",
                self._on_feedback,
                feedback_sub_qos_profile or QoSProfile(depth=10),
                callback_group=callback_group,
            ),
            node.create_subscription(
                GoalStatusArray,
                f"{base}/status",
                self._on_status,
                qos_profile_action_status_default,
                callback_group=callback_group,
            ),
        ]

    def server_is_ready(self) -> bool:
        services = all(c.service_is_ready() for c in (self._send, self._cancel, self._result))
        return services and all(s.get_publisher_count() > 0 for s in self._subscriptions)

    def wait_for_server(self, timeout_sec: float | None = None) -> bool:
        due = None if timeout_sec is None else time.monotonic() + timeout_sec
        while not self.server_is_ready():
            if due is not None and time.monotonic() > due:
                return False
            time.sleep(0.005)
        return True

    def send_goal_async(
        self, goal: Any, feedback_callback: Callable[[Any], Any] | None = None, goal_uuid: Any = None
    ) -> Future:
        if not isinstance(goal, self._action_type.Goal):
            raise TypeError(f"Expected {self._action_type.Goal}, got {type(goal)}")
        goal_id = goal_uuid or UUID(uuid=list(uuid.uuid4().bytes))
        key = bytes(goal_id.uuid)
        if feedback_callback is not None:
            self._listeners[key] = feedback_callback
        request = self._action_type.Impl.SendGoalService.Request(goal_id=goal_id, goal=goal)
        future = Future(executor=self._node.executor)

        def answered(sent: Future) -> None:
            handle = ClientGoalHandle(self, goal_id, sent.result())
            if handle.accepted:
                self._handles[key] = handle
            else:
                self._listeners.pop(key, None)
            future.set_result(handle)

        self._send.call_async(request).add_done_callback(answered)
        return future

    def ask_result(self, goal_id: Any) -> Future:
        key = bytes(goal_id.uuid)
        future = self._result.call_async(self._action_type.Impl.GetResultService.Request(goal_id=goal_id))

        def forget(_: Future) -> None:
            self._listeners.pop(key, None)
            self._handles.pop(key, None)

        future.add_done_callback(forget)
        return future

    def ask_cancel(self, goal_id: Any) -> Future:
        return self._cancel.call_async(CancelGoal.Request(goal_info=GoalInfo(goal_id=goal_id)))

    def _on_feedback(self, message: Any) -> None:
        listener = self._listeners.get(bytes(message.goal_id.uuid))
        if listener is not None:
            listener(message)

    def _on_status(self, message: Any) -> None:
        for entry in message.status_list:
            handle = self._handles.get(bytes(entry.goal_info.goal_id.uuid))
            if handle is not None:
                handle.status = entry.status

    def destroy(self) -> None:
        for client in (self._send, self._cancel, self._result):
            self._node.destroy_client(client)
        for subscription in self._subscriptions:
            self._node.destroy_subscription(subscription)
