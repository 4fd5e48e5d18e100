"""Quality of service of topics by parameter, in Isaac ROS's words: DEFAULT, SENSOR_DATA, SYSTEM_DEFAULT."""

from __future__ import annotations

import copy

from rclpy.qos import (
    QoSProfile,
    qos_profile_sensor_data,
    qos_profile_system_default,
)

_PROFILES = {
    "SENSOR_DATA": qos_profile_sensor_data,
    "SYSTEM_DEFAULT": qos_profile_system_default,
}


def qos_profile(word: str, depth: int) -> QoSProfile:
    """The profile that a checked parameter names, with a history of `depth` messages (0: its own)."""
    if word == "DEFAULT":
        return QoSProfile(depth=depth or 10)
    profile = copy.copy(_PROFILES[word])
    if depth:
        profile.depth = depth
    return profile
