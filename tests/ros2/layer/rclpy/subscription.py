"""Subscriptions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rclpy.impl import dds


class Subscription:
    def __init__(
        self, node: Any, msg_type: Any, topic: str, callback: Callable[[Any], Any], qos: Any, group: Any
    ) -> None:
        self.msg_type = msg_type
        self.topic_name = topic
        self.callback = callback
        self.callback_group = group
        self.qos_profile = qos
        type_name = dds.dds_name(msg_type._definition.name)
        self._reader = dds.Reader(
            node.context.participant, f"rt{topic}", type_name, dds.policies(qos), node.wake
        )

    @property
    def ready(self) -> bool:
        return self._reader.ready

    def take(self) -> Callable[[], Any] | None:
        found = self._reader.take()
        if found is None:
            return None
        message = self.msg_type._codec.decode(found[0])
        return lambda: self.callback(message)

    def get_publisher_count(self) -> int:
        return self._reader.writers()

    def destroy(self) -> None:
        self._reader.close()
