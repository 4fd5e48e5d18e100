"""The six parameter services of a node, and its /parameter_events."""

from __future__ import annotations

from typing import Any

from rcl_interfaces.msg import ParameterDescriptor, ParameterEvent, ParameterValue, SetParametersResult
from rcl_interfaces.srv import (
    DescribeParameters,
    GetParameters,
    GetParameterTypes,
    ListParameters,
    SetParameters,
    SetParametersAtomically,
)

from rclpy.exceptions import ParameterNotDeclaredException
from rclpy.parameter import Parameter
from rclpy.qos import qos_profile_parameter_events, qos_profile_parameters


class ParameterServices:
    def __init__(self, node: Any) -> None:
        self._node = node
        for kind, name, callback in (
            (GetParameters, "get_parameters", self._get),
            (GetParameterTypes, "get_parameter_types", self._types),
            (SetParameters, "set_parameters", self._set),
            (SetParametersAtomically, "set_parameters_atomically", self._set_atomically),
            (DescribeParameters, "describe_parameters", self._describe),
            (ListParameters, "list_parameters", self._list),
        ):
            node.create_service(kind, f"~/{name}", callback, qos_profile=qos_profile_parameters)
        self._events = node.create_publisher(
            ParameterEvent, "/parameter_events", qos_profile_parameter_events
        )

    def changed(self, parameters: list[Parameter]) -> None:
        event = ParameterEvent(
            node=self._node.get_fully_qualified_name(),
            changed_parameters=[p.to_parameter_msg() for p in parameters],
        )
        event.stamp = self._node.get_clock().now().to_msg()
        self._events.publish(event)

    def _get(self, request: Any, response: Any) -> Any:
        known = self._node.has_parameter
        response.values = [
            self._node.get_parameter(n).get_parameter_value() if known(n) else ParameterValue()
            for n in request.names
        ]
        return response

    def _types(self, request: Any, response: Any) -> Any:
        known = self._node.has_parameter
        response.types = [int(self._node.get_parameter(n).type_) if known(n) else 0 for n in request.names]
        return response

    def _set(self, request: Any, response: Any) -> Any:
        response.results = [
            self._tried(lambda p=p: self._node.set_parameters_atomically([Parameter.from_parameter_msg(p)]))
            for p in request.parameters
        ]
        return response

    def _set_atomically(self, request: Any, response: Any) -> Any:
        parameters = [Parameter.from_parameter_msg(p) for p in request.parameters]
        response.result = self._tried(lambda: self._node.set_parameters_atomically(parameters))
        return response

    def _tried(self, work: Any) -> Any:
        try:
            return work()
        except ParameterNotDeclaredException as error:
            return SetParametersResult(successful=False, reason=str(error))

    def _describe(self, request: Any, response: Any) -> Any:
        known = self._node.has_parameter
        response.descriptors = [
            self._node.describe_parameter(n) if known(n) else ParameterDescriptor(name=n)
            for n in request.names
        ]
        return response

    def _list(self, request: Any, response: Any) -> Any:
        names = sorted(self._node.parameter_names())
        if request.prefixes:
            names = [n for n in names if any(n == p or n.startswith(f"{p}.") for p in request.prefixes)]
        response.result.names = names
        response.result.prefixes = sorted({n.rpartition(".")[0] for n in names if "." in n})
        return response
