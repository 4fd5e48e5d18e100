"""A node with a managed life: the services of lifecycle_msgs and the callbacks of its transitions.

Behaves as rclpy 3.3 and 7.1 do where that is unkind: a transition that the present state does not have, asked
for by id, raises RCLError out of the service callback (rclpy#1209), through the executor, and is never
answered; a callback that returns something else than a TransitionCallbackReturn leaves the node stuck in the
transition state.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from lifecycle_msgs.msg import State, Transition, TransitionDescription, TransitionEvent
from lifecycle_msgs.srv import ChangeState, GetAvailableStates, GetAvailableTransitions, GetState

from rclpy.impl.implementation_singleton import rclpy_implementation
from rclpy.node import Node
from rclpy.qos import QoSProfile

from . import state_machine
from .managed_entity import ManagedEntity, TransitionCallbackReturn
from .publisher import LifecyclePublisher

RCLError = rclpy_implementation.RCLError


class LifecycleState(NamedTuple):
    label: str
    state_id: int


_SHUTDOWNS = {
    "unconfigured": Transition.TRANSITION_UNCONFIGURED_SHUTDOWN,
    "inactive": Transition.TRANSITION_INACTIVE_SHUTDOWN,
    "active": Transition.TRANSITION_ACTIVE_SHUTDOWN,
}


def _state(state: state_machine.State) -> State:
    return State(id=state.id, label=state.label)


def _description(transition: state_machine.Transition) -> TransitionDescription:
    return TransitionDescription(
        transition=Transition(id=transition.id, label=transition.label),
        start_state=_state(transition.start),
        goal_state=_state(transition.goal),
    )


class LifecycleNodeMixin(ManagedEntity):
    """The managed part, for a class that inherits from a Node as well and has initialized that first."""

    def __init__(self, *, enable_communication_interface: bool = True, callback_group: Any = None) -> None:
        # Bound now, as rclpy does: a method replaced on the instance later is not called.
        self._callbacks: dict[str, Callable[[LifecycleState], Any]] = {
            "configuring": self.on_configure,
            "cleaningup": self.on_cleanup,
            "shuttingdown": self.on_shutdown,
            "activating": self.on_activate,
            "deactivating": self.on_deactivate,
            "errorprocessing": self.on_error,
        }
        self._managed_entities: set[ManagedEntity] = set()
        self._machine = state_machine.StateMachine()
        self._transition_events = Node.create_publisher(
            self, TransitionEvent, "~/transition_event", QoSProfile(depth=10)
        )
        if not enable_communication_interface:
            return
        for service_type, name, callback in (
            (ChangeState, "change_state", self.__on_change_state),
            (GetState, "get_state", self.__on_get_state),
            (GetAvailableStates, "get_available_states", self.__on_get_available_states),
            (GetAvailableTransitions, "get_available_transitions", self.__on_get_available_transitions),
            (GetAvailableTransitions, "get_transition_graph", self.__on_get_transition_graph),
        ):
            Node.create_service(self, service_type, f"~/{name}", callback, callback_group=callback_group)

    def trigger_configure(self) -> TransitionCallbackReturn:
        return self.__change_state(Transition.TRANSITION_CONFIGURE)

    def trigger_cleanup(self) -> TransitionCallbackReturn:
        return self.__change_state(Transition.TRANSITION_CLEANUP)

    def trigger_activate(self) -> TransitionCallbackReturn:
        return self.__change_state(Transition.TRANSITION_ACTIVATE)

    def trigger_deactivate(self) -> TransitionCallbackReturn:
        return self.__change_state(Transition.TRANSITION_DEACTIVATE)

    def trigger_shutdown(self) -> TransitionCallbackReturn:
        transition_id = _SHUTDOWNS.get(self._machine.state.label)
        if transition_id is None:
            raise RCLError("Shutdown transtion not possible")  # spelt so in rclpy
        return self.__change_state(transition_id)

    def add_managed_entity(self, entity: ManagedEntity) -> None:
        if not isinstance(entity, ManagedEntity):
            raise TypeError("Expected a rclpy.lifecycle.ManagedEntity instance.")
        self._managed_entities.add(entity)

    def create_lifecycle_publisher(self, *arguments: Any, **options: Any) -> LifecyclePublisher:
        """Arguments of Node.create_publisher."""
        if "publisher_class" in options:
            raise TypeError("create_publisher() got an unexpected keyword argument 'publisher_class'")
        publisher = Node.create_publisher(self, *arguments, **options, publisher_class=LifecyclePublisher)
        self._managed_entities.add(publisher)
        return publisher

    def destroy_lifecycle_publisher(self, publisher: LifecyclePublisher) -> bool:
        self._managed_entities.discard(publisher)
        return Node.destroy_publisher(self, publisher)

    def on_configure(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.__tell_entities("on_configure", state)

    def on_cleanup(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.__tell_entities("on_cleanup", state)

    def on_shutdown(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.__tell_entities("on_shutdown", state)

    def on_activate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.__tell_entities("on_activate", state)

    def on_deactivate(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.__tell_entities("on_deactivate", state)

    def on_error(self, state: LifecycleState) -> TransitionCallbackReturn:
        return self.__tell_entities("on_error", state)

    def __tell_entities(self, name: str, state: LifecycleState) -> TransitionCallbackReturn:
        """Calls that callback of every managed entity, up to the first that does not succeed."""
        for entity in self._managed_entities:
            answer = getattr(entity, name)(state)
            if not isinstance(answer, TransitionCallbackReturn):
                raise TypeError(
                    f"{name}() return value of class {type(entity)} should be `TransitionCallbackReturn`.\n"
                    f"Instance of the class that caused the failure: {entity}"
                )
            if answer is not TransitionCallbackReturn.SUCCESS:
                return answer
        return TransitionCallbackReturn.SUCCESS

    def __take(self, key: int | str) -> None:
        """One step of the machine, told to whoever listens."""
        taken = self._machine.take(key)
        if taken is None:
            state = self._machine.state.label
            self.get_logger().warning(f"No transition matching {key} found for current state {state}")
            raise RCLError(
                "Failed to trigger lifecycle state machine transition: Transition is not registered."
            )
        # rcl leaves the time and the transition itself empty.
        self._transition_events.publish(
            TransitionEvent(start_state=_state(taken.start), goal_state=_state(taken.goal))
        )

    def __call_back(self, came_from: LifecycleState) -> Any:
        callback = self._callbacks.get(self._machine.state.label)
        if callback is None:
            return TransitionCallbackReturn.SUCCESS
        try:
            return callback(came_from)
        except Exception:  # silently, as rclpy does
            return TransitionCallbackReturn.ERROR

    def __change_state(self, transition_id: int) -> Any:
        came_from = LifecycleState(label=self._machine.state.label, state_id=self._machine.state.id)
        self.__take(transition_id)
        answer = self.__call_back(came_from)
        self.__take(answer.to_label())
        if answer == TransitionCallbackReturn.ERROR:
            self.__take(self.__call_back(came_from).to_label())
        return answer

    def __on_change_state(self, request: Any, response: Any) -> Any:
        transition_id = request.transition.id
        if request.transition.label:
            # Asked for by label, an impossible transition is refused kindly.
            found = self._machine.find(request.transition.label)
            if found is None:
                response.success = False
                return response
            transition_id = found.id
        response.success = self.__change_state(transition_id) == TransitionCallbackReturn.SUCCESS
        return response

    def __on_get_state(self, request: Any, response: Any) -> Any:
        response.current_state = _state(self._machine.state)
        return response

    def __on_get_available_states(self, request: Any, response: Any) -> Any:
        response.available_states = [_state(state) for state in state_machine.STATES]
        return response

    def __on_get_available_transitions(self, request: Any, response: Any) -> Any:
        response.available_transitions = [_description(transition) for transition in self._machine.open()]
        return response

    def __on_get_transition_graph(self, request: Any, response: Any) -> Any:
        response.available_transitions = [_description(one) for one in state_machine.TRANSITIONS]
        return response


class LifecycleNode(LifecycleNodeMixin, Node):
    def __init__(
        self, node_name: str, *, enable_communication_interface: bool = True, **options: Any
    ) -> None:
        """Further arguments are those of rclpy.node.Node."""
        Node.__init__(self, node_name, **options)
        LifecycleNodeMixin.__init__(self, enable_communication_interface=enable_communication_interface)
