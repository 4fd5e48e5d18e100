"""Exceptions by the names of rclpy.exceptions, as far as nodes and tests see them."""


class NotInitializedException(Exception):
    def __init__(self, *args: object) -> None:
        super().__init__("rclpy.init() has not been called", *args)


class ParameterException(Exception):
    """Base of what is wrong with parameters."""


class ParameterNotDeclaredException(ParameterException):
    def __init__(self, name: object) -> None:
        super().__init__("Invalid access to undeclared parameter(s)", name)


class ParameterAlreadyDeclaredException(ParameterException):
    def __init__(self, name: object) -> None:
        super().__init__("Parameter(s) already declared", name)


class InvalidParameterTypeException(ParameterException):
    def __init__(self, desired: object, expected: str) -> None:
        name, kind = desired.name, desired.type_.name  # type: ignore[attr-defined]
        super().__init__(f"Trying to set parameter '{name}' to '{kind}', expecting type '{expected}'")


class InvalidParameterValueException(ParameterException):
    def __init__(self, name: str, value: object, reason: str) -> None:
        super().__init__(f"Invalid parameter value ({value}) for parameter '{name}'. Reason: {reason}")


class ParameterImmutableException(ParameterException):
    def __init__(self, name: str) -> None:
        super().__init__("Attempted to modify read-only parameter", name)


class InvalidHandle(Exception):
    """An entity of rcl that was destroyed. The layer's entities have none, and it is never raised."""
