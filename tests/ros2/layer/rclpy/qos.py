"""QoS profiles and presets by the names of rclpy.qos."""

from __future__ import annotations

from enum import IntEnum
from typing import Any


class ReliabilityPolicy(IntEnum):
    SYSTEM_DEFAULT = 0
    RELIABLE = 1
    BEST_EFFORT = 2


class DurabilityPolicy(IntEnum):
    SYSTEM_DEFAULT = 0
    TRANSIENT_LOCAL = 1
    VOLATILE = 2


class HistoryPolicy(IntEnum):
    SYSTEM_DEFAULT = 0
    KEEP_LAST = 1
    KEEP_ALL = 2


QoSReliabilityPolicy, QoSDurabilityPolicy, QoSHistoryPolicy = (
    ReliabilityPolicy,
    DurabilityPolicy,
    HistoryPolicy,
)


class QoSProfile:
    """depth is needed unless history is KEEP_ALL, as in rclpy."""

    def __init__(self, **options: Any) -> None:
        known = {"history", "depth", "reliability", "durability"}
        if options.keys() - known:
            raise NotImplementedError(f"the layer has no QoS {sorted(options.keys() - known)}")
        if "history" not in options and "depth" not in options:
            raise ValueError("History and/or depth settings are required.")
        self.history = options.get("history", HistoryPolicy.KEEP_LAST)
        self.depth = options.get("depth", 0)
        self.reliability = options.get("reliability", ReliabilityPolicy.RELIABLE)
        self.durability = options.get("durability", DurabilityPolicy.VOLATILE)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QoSProfile) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]


def profile_of(qos: QoSProfile | int) -> QoSProfile:
    """What create_publisher and its like take: a profile or a depth."""
    if isinstance(qos, QoSProfile):
        return qos
    if not isinstance(qos, int) or qos < 0:
        raise ValueError("history depth must be greater than or equal to zero")
    return QoSProfile(depth=qos)


qos_profile_sensor_data = QoSProfile(depth=5, reliability=ReliabilityPolicy.BEST_EFFORT)
qos_profile_system_default = QoSProfile(
    depth=0,
    history=HistoryPolicy.SYSTEM_DEFAULT,
    reliability=ReliabilityPolicy.SYSTEM_DEFAULT,
    durability=DurabilityPolicy.SYSTEM_DEFAULT,
)
qos_profile_services_default = QoSProfile(depth=10)
qos_profile_parameters = QoSProfile(depth=1000)
qos_profile_parameter_events = QoSProfile(depth=1000)
qos_profile_action_status_default = QoSProfile(depth=1, durability=DurabilityPolicy.TRANSIENT_LOCAL)
