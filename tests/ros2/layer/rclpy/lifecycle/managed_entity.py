"""What a lifecycle node takes along through its transitions."""

from __future__ import annotations

import functools
from collections.abc import Callable
from enum import Enum
from typing import Any

from .state_machine import ERROR, FAILURE, SUCCESS


class TransitionCallbackReturn(Enum):
    """What a transition callback says; values of lifecycle_msgs/Transition."""

    SUCCESS = 97
    FAILURE = 98
    ERROR = 99

    def to_label(self) -> str:
        return {"SUCCESS": SUCCESS, "FAILURE": FAILURE, "ERROR": ERROR}[self.name]


class ManagedEntity:
    """Agrees to every transition; override what matters. `state` is the one that the node comes from."""

    def on_configure(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    def on_cleanup(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    def on_shutdown(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS

    def on_error(self, state: Any) -> TransitionCallbackReturn:
        return TransitionCallbackReturn.SUCCESS


class SimpleManagedEntity(ManagedEntity):
    """One that only knows whether it is active.

    As in rclpy, only activate and deactivate change that: a node that ends in error processing or is shut
    down from `active` leaves it activated.
    """

    def __init__(self) -> None:
        self._enabled = False

    def on_activate(self, state: Any) -> TransitionCallbackReturn:
        self._enabled = True
        return TransitionCallbackReturn.SUCCESS

    def on_deactivate(self, state: Any) -> TransitionCallbackReturn:
        self._enabled = False
        return TransitionCallbackReturn.SUCCESS

    @property
    def is_activated(self) -> bool:
        return self._enabled

    @staticmethod
    def when_enabled(
        wrapped: Callable[..., Any] | None = None, *, when_not_enabled: Callable[[], Any] | None = None
    ) -> Callable[..., Any]:
        """Decorator of a method that does nothing, or calls when_not_enabled, unless active."""
        if wrapped is None:
            return functools.partial(SimpleManagedEntity.when_enabled, when_not_enabled=when_not_enabled)

        @functools.wraps(wrapped)
        def guarded(self: SimpleManagedEntity, *arguments: Any, **options: Any) -> None:
            if self._enabled:
                wrapped(self, *arguments, **options)
            elif when_not_enabled is not None:
                when_not_enabled()

        return guarded
