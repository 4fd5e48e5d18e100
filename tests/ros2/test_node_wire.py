"""What goes over the wire is what a real ROS 2 makes of it: bytes of rclpy and rmw_cyclonedds, kept here."""

from __future__ import annotations

import json

import pytest
from wire_messages import WIRE, decoded, encoded, messages

KEPT = json.loads(WIRE.read_text(encoding="utf-8"))


def test_every_message_has_its_bytes() -> None:
    assert list(messages()) == list(KEPT)


@pytest.mark.parametrize("name", KEPT)
def test_bytes_are_those_of_ros(name: str) -> None:
    message, kept = messages()[name], bytes.fromhex(KEPT[name])
    made = encoded(message)
    assert made[: len(kept)] == kept
    assert len(made) - len(kept) < 4 and not any(made[len(kept) :])  # to a whole word, on the wire
    assert decoded(kept, type(message)) == message
