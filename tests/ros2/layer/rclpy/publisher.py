"""Publishers."""

from __future__ import annotations

from typing import Any

from rclpy.impl import dds


class Publisher:
    def __init__(self, node: Any, msg_type: Any, topic: str, qos: Any) -> None:
        self.msg_type = msg_type
        self.topic_name = topic
        self.qos_profile = qos
        type_name = dds.dds_name(msg_type._definition.name)
        self._writer = dds.Writer(node.context.participant, f"rt{topic}", type_name, dds.policies(qos))

    def publish(self, msg: Any) -> None:
        if not isinstance(msg, self.msg_type):
            raise TypeError(f"Expected {self.msg_type}, got {type(msg)}")
        self._writer.write(self.msg_type._codec.encode(msg))

    def get_subscription_count(self) -> int:
        return len(self._writer.readers())

    def destroy(self) -> None:
        self._writer.close()
