"""Parameters and their messages."""

from __future__ import annotations

from array import array
from enum import IntEnum
from typing import Any

from rcl_interfaces.msg import Parameter as ParameterMsg
from rcl_interfaces.msg import ParameterType, ParameterValue

_FIELDS = {
    1: "bool_value",
    2: "integer_value",
    3: "double_value",
    4: "string_value",
    5: "byte_array_value",
    6: "bool_array_value",
    7: "integer_array_value",
    8: "double_array_value",
    9: "string_array_value",
}


class Parameter:
    class Type(IntEnum):
        NOT_SET = ParameterType.PARAMETER_NOT_SET
        BOOL = ParameterType.PARAMETER_BOOL
        INTEGER = ParameterType.PARAMETER_INTEGER
        DOUBLE = ParameterType.PARAMETER_DOUBLE
        STRING = ParameterType.PARAMETER_STRING
        BYTE_ARRAY = ParameterType.PARAMETER_BYTE_ARRAY
        BOOL_ARRAY = ParameterType.PARAMETER_BOOL_ARRAY
        INTEGER_ARRAY = ParameterType.PARAMETER_INTEGER_ARRAY
        DOUBLE_ARRAY = ParameterType.PARAMETER_DOUBLE_ARRAY
        STRING_ARRAY = ParameterType.PARAMETER_STRING_ARRAY

        @classmethod
        def from_parameter_value(cls, value: Any) -> Any:
            kinds = {type(None): 0, bool: 1, int: 2, float: 3, str: 4}
            if type(value) in kinds:
                return cls(kinds[type(value)])
            if isinstance(value, list | tuple | array) and value:
                first = type(value[0])
                if all(type(v) is first for v in value) and first in (bool, int, float, str):
                    return cls({bool: 6, int: 7, float: 8, str: 9}[first])
            raise TypeError(f"The given value is not one of the allowed types '{value}'.")

    def __init__(self, name: str, type_: Any = None, value: Any = None) -> None:
        self.name = name
        self.type_ = Parameter.Type.from_parameter_value(value) if type_ is None else type_
        self.value = value

    def to_parameter_msg(self) -> Any:
        return ParameterMsg(name=self.name, value=self.get_parameter_value())

    def get_parameter_value(self) -> Any:
        message = ParameterValue(type=int(self.type_))
        if self.type_ in _FIELDS:
            setattr(message, _FIELDS[self.type_], self.value)
        return message

    @classmethod
    def from_parameter_msg(cls, message: Any) -> Parameter:
        value = parameter_value_to_python(message.value)
        return cls(message.name, Parameter.Type(message.value.type), value)


def parameter_value_to_python(value: Any) -> Any:
    if value.type == 0:
        return None
    found = getattr(value, _FIELDS[value.type])
    return list(found) if value.type >= 5 else found
