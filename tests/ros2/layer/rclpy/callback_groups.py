"""Which callbacks may run at once."""

from __future__ import annotations

import threading
from typing import Any


class CallbackGroup:
    def __init__(self) -> None:
        self.entities: set[Any] = set()

    def add_entity(self, entity: Any) -> None:
        self.entities.add(entity)

    def has_entity(self, entity: Any) -> bool:
        return entity in self.entities

    def enter(self, entity: Any) -> bool:
        """Whether a callback of the entity may begin now."""
        raise NotImplementedError

    def leave(self, entity: Any) -> None:
        raise NotImplementedError


class ReentrantCallbackGroup(CallbackGroup):
    def enter(self, entity: Any) -> bool:
        return True

    def leave(self, entity: Any) -> None:
        return None


class MutuallyExclusiveCallbackGroup(CallbackGroup):
    def __init__(self) -> None:
        super().__init__()
        self._active: Any = None
        self._lock = threading.Lock()

    def enter(self, entity: Any) -> bool:
        with self._lock:
            if self._active is not None:
                return False
            self._active = entity
            return True

    def leave(self, entity: Any) -> None:
        with self._lock:
            self._active = None
