"""Nodes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from rcl_interfaces.msg import ParameterDescriptor, SetParametersResult

from rclpy.callback_groups import CallbackGroup, MutuallyExclusiveCallbackGroup
from rclpy.client import Client
from rclpy.clock import Clock
from rclpy.exceptions import (
    InvalidParameterTypeException,
    InvalidParameterValueException,
    NotInitializedException,
    ParameterAlreadyDeclaredException,
    ParameterNotDeclaredException,
)
from rclpy.logging import get_logger
from rclpy.parameter import Parameter
from rclpy.parameter_services import ParameterServices
from rclpy.publisher import Publisher
from rclpy.qos import QoSProfile, profile_of, qos_profile_services_default
from rclpy.service import Service
from rclpy.subscription import Subscription
from rclpy.timer import Timer
from rclpy.utilities import get_default_context


class Node:
    def __init__(
        self,
        node_name: str,
        *,
        context: Any = None,
        namespace: str | None = None,
        start_parameter_services: bool = True,
        parameter_overrides: list[Parameter] | None = None,
        use_global_arguments: bool = True,
    ) -> None:
        self.context = get_default_context() if context is None else context
        if not self.context.ok():
            raise NotInitializedException()
        arguments = self.context.arguments
        remaps = arguments.remaps if use_global_arguments else {}
        self._name = remaps.get("__node", node_name)
        self._namespace = "/" + (remaps.get("__ns", namespace or "")).strip("/")
        self._remaps = {k: v for k, v in remaps.items() if not k.startswith("__")}
        self.executor: Any = None
        self.default_callback_group = MutuallyExclusiveCallbackGroup()
        self._logger = get_logger(self.get_fully_qualified_name().strip("/").replace("/", "."))
        self._clock = Clock()
        self._publishers: list[Any] = []
        self._subscriptions: list[Subscription] = []
        self._services: list[Service] = []
        self._clients: list[Client] = []
        self._timers: list[Timer] = []
        self._waitables: list[Any] = []
        self._parameters: dict[str, tuple[Parameter, Any]] = {}
        self._on_set: list[Callable[[list[Parameter]], Any]] = []
        given = arguments.values_for(self.get_fully_qualified_name()) if use_global_arguments else {}
        self._parameter_overrides = {name: Parameter(name, value=value) for name, value in given.items()}
        self._parameter_overrides |= {p.name: p for p in parameter_overrides or ()}
        self._parameter_services: ParameterServices | None = None
        self.declare_parameter("use_sim_time", False)
        if start_parameter_services:
            self._parameter_services = ParameterServices(self)

    # --- names ---

    def get_name(self) -> str:
        return self._name

    def get_namespace(self) -> str:
        return self._namespace

    def get_fully_qualified_name(self) -> str:
        return f"{self._namespace.rstrip('/')}/{self._name}"

    def get_logger(self) -> Any:
        return self._logger

    def get_clock(self) -> Clock:
        return self._clock

    def resolve(self, name: str) -> str:
        """The full name of a topic or service, remapped."""

        def full(word: str) -> str:
            if word.startswith("~"):
                return f"{self.get_fully_qualified_name()}/{word[1:].lstrip('/')}".rstrip("/")
            return word if word.startswith("/") else f"{self._namespace.rstrip('/')}/{word}"

        wanted = full(name)
        for source, target in self._remaps.items():
            if full(source) == wanted:
                return full(target)
        return wanted

    # --- what it has ---

    @property
    def publishers(self) -> Iterator[Any]:
        yield from self._publishers

    @property
    def subscriptions(self) -> Iterator[Subscription]:
        yield from self._subscriptions

    @property
    def services(self) -> Iterator[Service]:
        yield from self._services

    @property
    def clients(self) -> Iterator[Client]:
        yield from self._clients

    @property
    def timers(self) -> Iterator[Timer]:
        yield from list(self._timers)

    def entities(self) -> list[Any]:
        """What an executor looks at."""
        return [*self._timers, *self._subscriptions, *self._services, *self._clients, *self._waitables]

    def wake(self) -> None:
        if self.executor is not None:
            self.executor.wake()

    def create_publisher(
        self, msg_type: Any, topic: str, qos_profile: QoSProfile | int, *, publisher_class: Any = Publisher
    ) -> Any:
        made = publisher_class(self, msg_type, self.resolve(topic), profile_of(qos_profile))
        self._publishers.append(made)
        return made

    def create_subscription(
        self,
        msg_type: Any,
        topic: str,
        callback: Callable[[Any], Any],
        qos_profile: QoSProfile | int,
        *,
        callback_group: CallbackGroup | None = None,
    ) -> Subscription:
        group = callback_group or self.default_callback_group
        profile = profile_of(qos_profile)
        made = Subscription(self, msg_type, self.resolve(topic), callback, profile, group)
        return self._add(self._subscriptions, made, group)

    def create_service(
        self,
        srv_type: Any,
        srv_name: str,
        callback: Callable[[Any, Any], Any],
        *,
        qos_profile: QoSProfile = qos_profile_services_default,
        callback_group: CallbackGroup | None = None,
    ) -> Service:
        group = callback_group or self.default_callback_group
        made = Service(self, srv_type, self.resolve(srv_name), callback, group, qos_profile)
        return self._add(self._services, made, group)

    def create_client(
        self,
        srv_type: Any,
        srv_name: str,
        *,
        qos_profile: QoSProfile = qos_profile_services_default,
        callback_group: CallbackGroup | None = None,
    ) -> Client:
        group = callback_group or self.default_callback_group
        made = Client(self, srv_type, self.resolve(srv_name), group, qos_profile)
        return self._add(self._clients, made, group)

    def create_timer(
        self,
        timer_period_sec: float,
        callback: Callable[[], Any],
        callback_group: CallbackGroup | None = None,
    ) -> Timer:
        group = callback_group or self.default_callback_group
        return self._add(self._timers, Timer(self, float(timer_period_sec), callback, group), group)

    def add_waitable(self, waitable: Any) -> None:
        self._waitables.append(waitable)
        self.wake()

    def remove_waitable(self, waitable: Any) -> None:
        self._waitables.remove(waitable)

    def _add(self, place: list[Any], made: Any, group: CallbackGroup) -> Any:
        group.add_entity(made)
        place.append(made)
        self.wake()
        return made

    def _destroy(self, place: list[Any], entity: Any) -> bool:
        if entity not in place:
            return False
        place.remove(entity)
        group = getattr(entity, "callback_group", None)
        if group is not None:
            group.entities.discard(entity)
        entity.destroy()
        return True

    def destroy_publisher(self, publisher: Any) -> bool:
        return self._destroy(self._publishers, publisher)

    def destroy_subscription(self, subscription: Subscription) -> bool:
        return self._destroy(self._subscriptions, subscription)

    def destroy_service(self, service: Service) -> bool:
        return self._destroy(self._services, service)

    def destroy_client(self, client: Client) -> bool:
        return self._destroy(self._clients, client)

    def destroy_timer(self, timer: Timer) -> bool:
        return self._destroy(self._timers, timer)

    def destroy_node(self) -> None:
        if self.executor is not None:
            self.executor.remove_node(self)
        for place in (
            self._timers,
            self._subscriptions,
            self._services,
            self._clients,
            self._publishers,
        ):
            for entity in list(place):
                self._destroy(place, entity)

    # --- parameters ---

    def declare_parameter(self, name: str, value: Any = None, descriptor: Any = None) -> Parameter:
        if name in self._parameters:
            raise ParameterAlreadyDeclaredException([name])
        described = ParameterDescriptor() if descriptor is None else copy.copy(descriptor)
        default = Parameter(name, value=value)
        described.name, described.type = name, int(default.type_)
        given = self._parameter_overrides.get(name, default)
        result = self._set([given], {name: described}, check_read_only=False)
        if not result.successful:
            if given.type_ != default.type_:
                raise InvalidParameterTypeException(given, default.type_.name)
            raise InvalidParameterValueException(name, given.value, result.reason)
        return self._parameters[name][0]

    def has_parameter(self, name: str) -> bool:
        return name in self._parameters

    def parameter_names(self) -> list[str]:
        return list(self._parameters)

    def get_parameter(self, name: str) -> Parameter:
        if name not in self._parameters:
            raise ParameterNotDeclaredException(name)
        return self._parameters[name][0]

    def describe_parameter(self, name: str) -> Any:
        return self._parameters[name][1]

    def add_on_set_parameters_callback(self, callback: Callable[[list[Parameter]], Any]) -> None:
        self._on_set.insert(0, callback)

    def set_parameters(self, parameters: list[Parameter]) -> list[Any]:
        return [self.set_parameters_atomically([parameter]) for parameter in parameters]

    def set_parameters_atomically(self, parameters: list[Parameter]) -> Any:
        for parameter in parameters:
            if parameter.name not in self._parameters:
                raise ParameterNotDeclaredException(parameter.name)
        result = self._set(parameters, {p.name: self._parameters[p.name][1] for p in parameters})
        if result.successful and self._parameter_services is not None:
            self._parameter_services.changed(parameters)
        return result

    def _set(
        self, parameters: list[Parameter], described: dict[str, Any], check_read_only: bool = True
    ) -> Any:
        for parameter in parameters:
            reason = _trouble(parameter, described[parameter.name], check_read_only)
            if reason:
                return SetParametersResult(successful=False, reason=reason)
        for callback in self._on_set:
            result = callback(parameters)
            if not result.successful:
                return result
        for parameter in parameters:
            self._parameters[parameter.name] = (parameter, described[parameter.name])
        return SetParametersResult(successful=True)


def _trouble(parameter: Parameter, descriptor: Any, check_read_only: bool) -> str:
    """Why a descriptor refuses a value; "" where it does not."""
    if check_read_only and descriptor.read_only:
        return f"Trying to set a read-only parameter: {parameter.name}."
    if not descriptor.dynamic_typing and int(parameter.type_) != descriptor.type:
        wanted = Parameter.Type(descriptor.type).name
        return f"Wrong parameter type, expected 'Type.{wanted}' got 'Type.{parameter.type_.name}'"
    for span in (*descriptor.integer_range, *descriptor.floating_point_range):
        if not span.from_value <= parameter.value <= span.to_value:
            return (
                f"Parameter {parameter.name} out of range Min: {span.from_value}, Max: {span.to_value}, "
                f"value: {parameter.value}"
            )
    return ""
