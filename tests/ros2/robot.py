"""The robot's side of a test: asks a node in another process what a mission program would ask it.

Only public rclpy, so it works on real rclpy and on the layer alike. Every question has a bounded wait and
raises TimeoutError that names what did not answer.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

import rclpy
from action_msgs.msg import GoalStatus, GoalStatusArray
from diagnostic_msgs.msg import DiagnosticArray
from lifecycle_msgs.srv import ChangeState, GetState
from rcl_interfaces.srv import GetParameters, SetParameters
from rclpy.action import ActionClient
from rclpy.context import Context
from rclpy.executors import SingleThreadedExecutor
from rclpy.parameter import Parameter, parameter_value_to_python
from rclpy.qos import DurabilityPolicy, QoSProfile
from unique_identifier_msgs.msg import UUID

ENDED = (GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_CANCELED, GoalStatus.STATUS_ABORTED)
_STEP = 0.02  # s between looks at what has no event


def wait_until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The first true value of condition(); TimeoutError after `timeout` s."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: not within {timeout} s")
        time.sleep(_STEP)
    return value


DEEP = QoSProfile(depth=500)  # by ROS's ten, what comes while ten others wait to be read pushes one out
watched: list[Any] = []  # node processes that should live: waiting ends when one has not


def action_client(node: Any, action_type: Any, name: str, qos: QoSProfile) -> ActionClient:
    """All its services with this profile: answers to more goals than its depth may push each other out."""
    return ActionClient(
        node,
        action_type,
        name,
        goal_service_qos_profile=qos,
        result_service_qos_profile=qos,
        cancel_service_qos_profile=qos,
    )


def _finished(future: Any, timeout: float, what: str) -> Any:
    """The result of an rclpy future that the executor's thread completes."""
    done, end = threading.Event(), time.monotonic() + timeout
    future.add_done_callback(lambda _: done.set())
    while not done.wait(min(0.5, max(0.0, end - time.monotonic()))):
        for process in watched:
            if not process.alive:
                raise RuntimeError(f"{what}: a node ended meanwhile; it said: {process.said[-2000:]}")
        if time.monotonic() >= end:
            raise TimeoutError(f"{what}: no answer within {timeout} s")
    return future.result()


class Inbox:
    """Messages of one topic, in order of arrival."""

    def __init__(self, topic: str) -> None:
        self.topic = topic
        self.messages: list[Any] = []
        self._changed = threading.Condition()

    def put(self, message: Any) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def wait(self, wanted: int | Callable[[Any], bool] = 1, timeout: float = 10.0) -> Any:
        """The list once it holds `wanted` messages, or the first message for which `wanted` is true."""

        def found() -> Any:
            if callable(wanted):
                return next(([message] for message in self.messages if wanted(message)), None)
            return list(self.messages) if len(self.messages) >= wanted else None

        with self._changed:
            result = self._changed.wait_for(found, timeout)
        if not result:
            raise TimeoutError(
                f"{self.topic}: {len(self.messages)} messages within {timeout} s, none as wanted"
            )
        return result[0] if callable(wanted) else result


class SentGoal:
    """A goal on its way. `feedback`: the feedback parts so far. `statuses`: the states seen, each once.

    The status topic keeps one message, so a state that lasted very shortly may be missing.
    """

    def __init__(self, name: str, asking: Callable[..., Any]) -> None:
        self.name = name
        self._asking = asking
        self.feedback: list[Any] = []
        self.statuses: list[int] = []
        self._handle: Any = None
        self._result: Any = None

    @property
    def accepted(self) -> bool:
        return bool(self._handle.accepted)

    @property
    def uuid(self) -> bytes:
        return bytes(self._handle.goal_id.uuid)

    @property
    def done(self) -> bool:
        return self._result is not None and self._result.done()

    def answered(self, handle: Any) -> None:
        self._handle = handle
        if handle.accepted:
            self._result = self._asking(handle.get_result_async)

    def result(self, timeout: float = 30.0) -> tuple[int, Any]:
        """(status of action_msgs/GoalStatus, result message) of an accepted goal."""
        if self._result is None:
            raise RuntimeError(f"{self.name}: the goal was rejected, it has no result")
        response = _finished(self._result, timeout, f"result of {self.name}")
        return response.status, response.result

    def cancel(self, timeout: float = 10.0) -> tuple[int, bool]:
        """(return code of action_msgs/CancelGoal, whether the server agreed to cancel this goal)."""
        future = self._asking(self._handle.cancel_goal_async)
        response = _finished(future, timeout, f"cancelling a goal of {self.name}")
        return response.return_code, self.uuid in [
            bytes(goal.goal_id.uuid) for goal in response.goals_canceling
        ]


class Robot:
    """One node in a context of its own, spun by a thread. Use it as a context manager, or close() it.

    domain_id: that of the node under test; None for the environment's ROS_DOMAIN_ID.
    """

    def __init__(self, name: str = "robot", *, domain_id: int | None = None) -> None:
        self._context = Context()
        rclpy.init(context=self._context, domain_id=domain_id)
        self.node = rclpy.create_node(name, context=self._context, start_parameter_services=False)
        self._executor = SingleThreadedExecutor(context=self._context)
        self._executor.add_node(self.node)
        self._clients: dict[str, Any] = {}
        self._publishers: dict[str, Any] = {}
        self._actions: dict[str, Any] = {}
        self._met: set[str] = set()  # nodes that have answered
        self._reports: Inbox | None = None
        self._statuses: dict[bytes, list[int]] = {}
        self._feedback: dict[bytes, Callable[[Any], None]] = {}
        self._closing = False
        self._thread = threading.Thread(target=self._spin, name=f"{name} executor", daemon=True)
        self._thread.start()

    def _spin(self) -> None:
        while not self._closing and self._context.ok():
            self._executor.spin_once(timeout_sec=0.1)

    def close(self) -> None:
        self._closing = True
        self._thread.join(5.0)
        for client in self._actions.values():
            client.destroy()
        self._executor.shutdown(timeout_sec=5.0)
        self.node.destroy_node()
        rclpy.shutdown(context=self._context)

    def __enter__(self) -> Robot:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # services

    def call_async(self, service_type: Any, name: str, request: Any = None, timeout: float = 10.0) -> Any:
        """The future of an answer; waits only for the server to be there."""
        if name not in self._clients:
            self._clients[name] = self.node.create_client(service_type, name)
        client = self._clients[name]
        if not client.wait_for_service(timeout_sec=timeout):
            raise TimeoutError(f"service {name}: not there within {timeout} s")
        return client.call_async(service_type.Request() if request is None else request)

    def call(self, service_type: Any, name: str, request: Any = None, timeout: float = 10.0) -> Any:
        """The answer. request None: an empty one."""
        future = self.call_async(service_type, name, request, timeout)
        return _finished(future, timeout, f"service {name}")

    # lifecycle

    def request_transition(self, node: str, transition: int | str, timeout: float = 10.0) -> Any:
        """The future of a change_state answer. transition: id or label."""
        if node not in self._met:
            self.state(node, timeout)
        request = ChangeState.Request()
        if isinstance(transition, str):
            request.transition.label = transition
        else:
            request.transition.id = transition
        return self.call_async(ChangeState, f"{node}/change_state", request, timeout)

    def change_state(self, node: str, transition: int | str, timeout: float = 30.0) -> bool:
        """Whether the node says that the transition succeeded."""
        future = self.request_transition(node, transition, timeout)
        return bool(_finished(future, timeout, f"{node}: transition {transition}").success)

    def state(self, node: str, timeout: float = 10.0) -> str:
        """The label of the node's state."""
        end = time.monotonic() + timeout
        while (
            True
        ):  # a request may be lost until both ends know of each other, and this one can be asked again
            left = end - time.monotonic()
            try:
                answer = self.call(GetState, f"{node}/get_state", timeout=min(1.0, left))
                self._met.add(node)
                return str(answer.current_state.label)
            except TimeoutError:
                if left <= 1.0:
                    raise

    def wait_state(self, node: str, label: str, timeout: float = 30.0) -> None:
        wait_until(lambda: self.state(node, timeout) == label, timeout, f"{node} in state {label}")

    def activate(self, node: str) -> None:
        """Configure and activate. A first start builds the shipped planner's engine."""
        for step in ("configure", "activate"):
            if not self.change_state(node, step, timeout=120.0):
                raise RuntimeError(f"{node}: {step} failed; it is {self.state(node)}")

    # actions

    def soon(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The task of a call on the executor's thread.

        rclpy 3.3 (Humble) loses an answer that an action client's executor takes before the thread that asked
        has noted its number, so goals are sent, cancelled and their results asked for there.
        """
        return self._executor.create_task(call, *arguments)

    def _asking(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return _finished(self.soon(call, *arguments), 10.0, "the robot's executor")

    def send_goal(
        self,
        action_type: Any,
        name: str,
        goal: Any,
        feedback: Callable[[Any], None] | None = None,
        timeout: float = 10.0,
    ) -> SentGoal:
        """Sends, and waits for the server's yes or no. feedback: called with each feedback part."""
        if name not in self._actions:
            # Feedback is heard here and not through the client, which forgets a goal when its result has come
            # (rclpy from Iron on), whatever parts still wait. And before the client: a server that can answer
            # it knows of this subscription then, and no first part is lost.
            heard = action_type.Impl.FeedbackMessage
            self.node.create_subscription(heard, f"{name}/_action/feedback", self._note_feedback, DEEP)
            self._actions[name] = action_client(self.node, action_type, name, DEEP)
            # As the status topic's own publisher: what was said last is kept for who comes later.
            qos = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
            self.node.create_subscription(GoalStatusArray, f"{name}/_action/status", self._note_status, qos)
        client = self._actions[name]
        if not client.wait_for_server(timeout_sec=timeout):
            raise TimeoutError(f"action {name}: no server within {timeout} s")
        sent = SentGoal(name, self._asking)

        def collect(message: Any) -> None:
            sent.feedback.append(message.feedback)
            if feedback is not None:
                feedback(message.feedback)

        goal_id = UUID(uuid=list(uuid.uuid4().bytes))
        self._feedback[bytes(goal_id.uuid)] = collect
        future = self._asking(client.send_goal_async, goal, None, goal_id)
        handle = _finished(future, timeout, f"goal to {name}")
        sent.statuses = self._statuses.setdefault(bytes(handle.goal_id.uuid), [])
        sent.answered(handle)
        return sent

    def _note_feedback(self, message: Any) -> None:
        collect = self._feedback.get(bytes(message.goal_id.uuid))
        if collect is not None:  # another's goal
            collect(message)

    def _note_status(self, message: Any) -> None:
        for entry in message.status_list:
            seen = self._statuses.setdefault(bytes(entry.goal_info.goal_id.uuid), [])
            if not seen or seen[-1] != entry.status:
                seen.append(entry.status)

    # topics

    def subscribe(self, topic: str, message_type: Any, qos: Any = 10) -> Inbox:
        """Collects from now on; qos as in create_subscription."""
        inbox = Inbox(topic)
        self.node.create_subscription(message_type, topic, inbox.put, qos)
        return inbox

    def publish(self, topic: str, message: Any, qos: Any = 10, timeout: float = 10.0) -> None:
        """Publishes once somebody listens."""
        if topic not in self._publishers:
            self._publishers[topic] = self.node.create_publisher(type(message), topic, qos)
        publisher = self._publishers[topic]
        wait_until(lambda: publisher.get_subscription_count() > 0, timeout, f"a listener of {topic}")
        publisher.publish(message)

    # diagnostics

    def figures(
        self,
        node: str,
        wanted: Callable[[dict[str, str]], Any],
        timeout: float = 10.0,
        *,
        after: int | None = None,
    ) -> Any:
        """(level 0 to 2, message, values) of the first report of a node on /diagnostics with such values.

        Of those that come from now on, or of the ones after the first `after` (see `reports`).
        """
        self.listen()
        skipped = len(self.reports) if after is None else after
        name = f"{node}: engine"

        def told() -> Any:
            for message in self.reports[skipped:]:
                status = message.status[0]
                if status.name == name and wanted({v.key: v.value for v in status.values}):
                    return status
            return None

        status = wait_until(told, timeout, f"a report of {node} as wanted")
        level = status.level[0] if isinstance(status.level, bytes) else int(status.level)
        return level, status.message, {v.key: v.value for v in status.values}

    def listen(self) -> int:
        """Hear /diagnostics from here on; the number of reports so far."""
        if self._reports is None:
            self._reports = self.subscribe("/diagnostics", DiagnosticArray)
        return len(self._reports.messages)

    @property
    def reports(self) -> list[Any]:
        """Every message on /diagnostics since `listen` or `figures` was first called."""
        return [] if self._reports is None else list(self._reports.messages)

    # parameters

    def set_parameter(self, node: str, name: str, value: Any, timeout: float = 10.0) -> tuple[bool, str]:
        """(accepted, reason)."""
        request = SetParameters.Request(parameters=[Parameter(name, value=value).to_parameter_msg()])
        answer = self.call(SetParameters, f"{node}/set_parameters", request, timeout).results[0]
        return bool(answer.successful), str(answer.reason)

    def parameter(self, node: str, name: str, timeout: float = 10.0) -> Any:
        """The value; None for one that is not set."""
        request = GetParameters.Request(names=[name])
        values = self.call(GetParameters, f"{node}/get_parameters", request, timeout).values
        return parameter_value_to_python(values[0]) if values else None
