"""A layer in the shape of rclpy over the `cyclonedds` wheel: for tests on machines without ROS only.

It has the API that the nodes and their tests use, with real DDS, CDR, QoS, services, actions and lifecycle,
and raises NotImplementedError elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rclpy.utilities import get_default_context, ok, try_shutdown

__all__ = [
    "create_node",
    "get_default_context",
    "init",
    "ok",
    "shutdown",
    "spin",
    "spin_once",
    "try_shutdown",
]


def init(*, args: Sequence[str] | None = None, context: Any = None, domain_id: int | None = None) -> None:
    from rclpy.context import install_signal_handlers

    chosen = get_default_context() if context is None else context
    chosen.init(sys.argv[1:] if args is None else args, domain_id=domain_id)
    if context is None:
        install_signal_handlers(chosen)


def shutdown(*, context: Any = None) -> None:
    (context or get_default_context()).shutdown()


def create_node(name: str, **options: Any) -> Any:
    from rclpy.node import Node

    return Node(name, **options)


def spin(node: Any, executor: Any = None) -> None:
    from rclpy.executors import SingleThreadedExecutor

    chosen = executor or SingleThreadedExecutor(context=node.context)
    chosen.add_node(node)
    chosen.spin()


def spin_once(node: Any, *, executor: Any = None, timeout_sec: float | None = None) -> None:
    from rclpy.executors import SingleThreadedExecutor

    chosen = executor or SingleThreadedExecutor(context=node.context)
    chosen.add_node(node)
    try:
        chosen.spin_once(timeout_sec)
    finally:
        chosen.remove_node(node)
