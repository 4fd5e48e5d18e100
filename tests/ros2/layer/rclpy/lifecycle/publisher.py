"""A publisher that is silent unless its node is active."""

from __future__ import annotations

from typing import Any

from rclpy.publisher import Publisher

from .managed_entity import SimpleManagedEntity


class LifecyclePublisher(SimpleManagedEntity, Publisher):
    def __init__(self, *arguments: Any, **options: Any) -> None:
        SimpleManagedEntity.__init__(self)
        Publisher.__init__(self, *arguments, **options)

    @SimpleManagedEntity.when_enabled
    def publish(self, msg: Any) -> None:
        Publisher.publish(self, msg)
