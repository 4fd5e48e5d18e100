"""Classes of messages, services and actions that behave as those which rosidl generates for Python.

Fields are properties over slots with a leading underscore; values are checked on assignment with
AssertionError, as generated code of Humble does (Jazzy does so with ROS_PYTHON_CHECK_FIELDS=1).
"""

from __future__ import annotations

from array import array
from collections import UserList
from collections.abc import Sequence, Set
from copy import copy
from functools import cache
from typing import Any

import numpy as np

from layer_interfaces import definitions
from layer_interfaces.cdr import PRIMITIVES, Codec
from layer_interfaces.definitions import Definition, Field

INTEGERS = {
    **{f"int{n}": (-(2 ** (n - 1)), 2 ** (n - 1) - 1) for n in (8, 16, 32, 64)},
    **{f"uint{n}": (0, 2**n - 1) for n in (8, 16, 32, 64)},
    "char": (0, 255),
}
FLOAT32_MAX = 3.402823466e38
NAN_OR_INFINITE = (float("inf"), float("-inf"))


class Message:
    """Base of all generated classes."""

    __slots__ = ("__weakref__",)
    _definition: Definition
    _codec: Codec

    def __init__(self, **kwargs: Any) -> None:
        fields = self._definition.fields
        unknown = kwargs.keys() - {field.name for field in fields}
        if unknown:
            raise AssertionError(f"Invalid arguments passed to constructor: {', '.join(sorted(unknown))}")
        for field in fields:
            setattr(self, field.name, kwargs[field.name] if field.name in kwargs else _initial(field))

    @classmethod
    def get_fields_and_field_types(cls) -> dict[str, str]:
        return {field.name: _type_text(field) for field in cls._definition.fields}

    def __repr__(self) -> str:
        values = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in self._definition.fields)
        return f"{type(self).__module__}.{type(self).__name__}({values})"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, type(self)):
            return False
        for field in self._definition.fields:
            mine, theirs = getattr(self, field.name), getattr(other, field.name)
            same = np.array_equal(mine, theirs) if isinstance(mine, np.ndarray) else mine == theirs
            if not same:
                return False
        return True

    __hash__ = None  # type: ignore[assignment]

    def __copy__(self) -> Message:
        return self._made([copy(getattr(self, f.name)) for f in self._definition.fields])

    @classmethod
    def _made(cls, values: list[Any]) -> Any:
        """An object with these values, in the order of the fields, which came from a checked source."""
        message = cls.__new__(cls)
        for field, value in zip(cls._definition.fields, values, strict=True):
            object.__setattr__(message, f"_{field.name}", value)
        return message


def _type_text(field: Field) -> str:
    name = field.base or "/".join(field.nested.split("/")[::2])
    name = {"byte": "octet", "bool": "boolean", "char": "uint8", "float32": "float", "float64": "double"}.get(
        name, name
    )
    if field.length:
        name += f"<{field.length}>"
    if field.count is None:
        return name
    kind, size = field.count
    if kind == "array":
        return f"{name}[{size}]"
    return f"sequence<{name}, {size}>" if size else f"sequence<{name}>"


def _zero(field: Field) -> Any:
    if field.nested:
        return message_class(field.nested)()
    if field.base == "string":
        return ""
    if field.base == "byte":
        return b"\x00"
    return {"bool": False, "float32": 0.0, "float64": 0.0}.get(field.base, 0)


def _initial(field: Field) -> Any:
    if field.count is None:
        if field.default is None:
            return _zero(field)
        return float(field.default) if field.base.startswith("float") else field.default
    kind, size = field.count
    values = list(field.default) if field.default is not None else []
    if kind == "array" and field.default is None:
        values = [_zero(field) for _ in range(size)]
    return values


def _check_one(field: Field, value: Any) -> None:
    """Refuse a value that one element of the field cannot hold, with AssertionError."""
    name, base = field.name, field.base
    if field.nested:
        kind = message_class(field.nested)
        if not isinstance(value, kind):
            raise AssertionError(f"The '{name}' field must be a sub message of type '{kind.__name__}'")
    elif base == "string":
        if not isinstance(value, str):
            raise AssertionError(f"The '{name}' field must be of type 'str'")
        if field.length and len(value) > field.length:
            raise AssertionError(f"The '{name}' field must be string value not longer than {field.length}")
    elif base == "bool":
        if not isinstance(value, bool):
            raise AssertionError(f"The '{name}' field must be of type 'bool'")
    elif base == "byte":
        if not isinstance(value, bytes | memoryview) or len(value) != 1:
            raise AssertionError(f"The '{name}' field must be of type 'bytes' or 'ByteString' with length 1")
    elif base in INTEGERS:
        low, high = INTEGERS[base]
        if not isinstance(value, int):
            raise AssertionError(f"The '{name}' field must be of type 'int'")
        if not low <= value <= high:
            raise AssertionError(f"The '{name}' field must be an integer in [{low}, {high}]")
    else:
        if not isinstance(value, float):
            raise AssertionError(f"The '{name}' field must be of type 'float'")
        if base == "float32" and abs(value) > FLOAT32_MAX and value not in NAN_OR_INFINITE:
            raise AssertionError(f"The '{name}' field must be a float in [{-FLOAT32_MAX}, {FLOAT32_MAX}]")


def _checked_many(field: Field, value: Any) -> Any:
    """The container that a field keeps: numpy for arrays of numbers, array.array for sequences, else list."""
    assert field.count is not None
    kind, _ = field.count
    code = PRIMITIVES[field.base][2] if field.base in PRIMITIVES else ""
    if isinstance(value, array) and code and kind == "sequence":
        if value.typecode != code:
            raise AssertionError(f"The '{field.name}' array.array() must have the type code of '{code}'")
        _check_length(field, len(value))
        return value
    if isinstance(value, np.ndarray) and code and kind == "array":
        if value.dtype != np.dtype(code):
            raise AssertionError(
                f"The '{field.name}' numpy.ndarray() must have the dtype of '{np.dtype(code)}'"
            )
        _check_length(field, value.size)
        return value
    sequence = isinstance(value, Sequence | Set | UserList | np.ndarray | memoryview)
    if not sequence or isinstance(value, str):
        raise AssertionError(f"The '{field.name}' field must be a set or sequence of {_type_text(field)}")
    if isinstance(value, bytes | bytearray | memoryview) and code == "B" and kind == "sequence":
        _check_length(field, len(value))
        return array("B", bytes(value))
    items = value.tolist() if isinstance(value, np.ndarray) else list(value)
    _check_length(field, len(items))
    for item in items:
        _check_one(field, item)
    if not code:
        return items
    return np.array(items, dtype=np.dtype(code)) if kind == "array" else array(code, items)


def _check_length(field: Field, length: int) -> None:
    kind, size = field.count or ("sequence", 0)
    if kind == "array" and length != size:
        raise AssertionError(f"The '{field.name}' field must have length {size}")
    if kind == "sequence" and size and length > size:
        raise AssertionError(f"The '{field.name}' field must have length <= {size}")


def _property(field: Field) -> property:
    slot = f"_{field.name}"

    def get(self: Any) -> Any:
        return getattr(self, slot)

    def put(self: Any, value: Any) -> None:
        if field.count is None:
            _check_one(field, value)
        else:
            value = _checked_many(field, value)
        object.__setattr__(self, slot, value)

    return property(get, put)


def make_class(definition: Definition) -> type[Message]:
    """The class of one structure."""
    package, kind, name = definition.name.split("/")
    body: dict[str, Any] = {
        "__slots__": tuple(f"_{field.name}" for field in definition.fields),
        "__module__": f"{package}.{kind}",
        "_definition": definition,
        **{field.name: _property(field) for field in definition.fields},
        **dict(definition.constants),
    }
    cls = type(name, (Message,), body)
    cls._codec = Codec(definition, lambda other: message_class(other)._codec, cls._made)
    return cls


@cache
def message_class(name: str) -> type[Message]:
    """The class of a message such as std_msgs/msg/String."""
    return make_class(definitions.message_definition(name))


def _service(name: str, request: Definition, response: Definition) -> type:
    package, kind, short = name.split("/")
    body = {
        "__module__": f"{package}.{kind}",
        "Request": make_class(request),
        "Response": make_class(response),
        "_type_name": name,
    }
    return type(short, (), body)


@cache
def service_class(name: str) -> type:
    """The class of a service such as std_srvs/srv/Trigger, with Request and Response."""
    package, kind, short = name.split("/")
    text = definitions.find_text(package, kind, short)
    if text is None:
        raise LookupError(f"no service {name} in {', '.join(map(str, definitions.FOLDERS))}")
    request, response = definitions.parts(text)
    return _service(
        name,
        definitions.parse(f"{name}_Request", request),
        definitions.parse(f"{name}_Response", response),
    )


@cache
def action_class(name: str) -> type:
    """The class of an action, with Goal, Result, Feedback and what goes over the wire in Impl."""
    package, kind, short = name.split("/")
    goal = message_class(f"{name}_Goal")
    identifier = Field("goal_id", "", "unique_identifier_msgs/msg/UUID", None, 0)

    def wrapped(part: str, *fields: Field) -> Definition:
        return Definition(f"{name}_{part}", fields, ())

    def nested(part: str) -> Field:
        return Field(part.lower(), "", f"{name}_{part}", None, 0)

    impl = type(
        "Impl",
        (),
        {
            "SendGoalService": _service(
                f"{name}_SendGoal",
                wrapped("SendGoal_Request", identifier, nested("Goal")),
                wrapped(
                    "SendGoal_Response",
                    Field("accepted", "bool", "", None, 0),
                    Field("stamp", "", "builtin_interfaces/msg/Time", None, 0),
                ),
            ),
            "GetResultService": _service(
                f"{name}_GetResult",
                wrapped("GetResult_Request", identifier),
                wrapped("GetResult_Response", Field("status", "int8", "", None, 0), nested("Result")),
            ),
            "FeedbackMessage": make_class(wrapped("FeedbackMessage", identifier, nested("Feedback"))),
            "CancelGoalService": service_class("action_msgs/srv/CancelGoal"),
            "GoalStatusMessage": message_class("action_msgs/msg/GoalStatusArray"),
        },
    )
    body = {
        "__module__": f"{package}.{kind}",
        "Goal": goal,
        "Result": message_class(f"{name}_Result"),
        "Feedback": message_class(f"{name}_Feedback"),
        "Impl": impl,
        "_type_name": name,
    }
    return type(short, (), body)
