"""Launch actions of lifecycle nodes that are configured and activated where asked. Used by launch/*.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch import LaunchContext
from launch.actions import DeclareLaunchArgument, OpaqueFunction, RegisterEventHandler
from launch.event_handlers import OnProcessStart
from launch.events.process import ProcessStarted
from launch.substitutions import LaunchConfiguration
from launch_ros.actions import LifecycleNode, Node

from edge_nodes.bringup import NodeSpec, read_bringup
from edge_runtime import BadConfig

RESPAWN_SECONDS = 2.0


def arguments(kind: str) -> list[Any]:
    """Those of the launch file of one node kind."""
    return [
        DeclareLaunchArgument("name", default_value=kind, description="the node's name"),
        DeclareLaunchArgument("namespace", default_value="", description="the node's namespace"),
        DeclareLaunchArgument(
            "engine",
            default_value="",
            description="the .edge file; empty: the parameter file's, or the default",
        ),
        DeclareLaunchArgument("params", default_value="", description="a ROS parameter file"),
        DeclareLaunchArgument(
            "autostart",
            default_value="true",
            description="configure and activate the node each time it starts; false: leave that to you",
        ),
        DeclareLaunchArgument(
            "respawn", default_value="true", description="start the process again if it dies"
        ),
    ]


def one_node(kind: str) -> Any:
    """The actions of the node that those arguments describe."""

    def make(context: LaunchContext) -> list[Any]:
        def value(name: str) -> str:
            return LaunchConfiguration(name).perform(context)

        spec = NodeSpec(
            kind=kind,
            namespace=value("namespace"),
            autostart=_truth("autostart", value("autostart")),
            params=value("params"),
            parameters={"engine.path": value("engine")} if value("engine") else {},
        )
        return node_actions(value("name"), spec, respawn=_truth("respawn", value("respawn")))

    return OpaqueFunction(function=make)


def robot_nodes() -> Any:
    """The actions of all nodes of the file that the argument `robot` names."""

    def make(context: LaunchContext) -> list[Any]:
        path = LaunchConfiguration("robot").perform(context)
        if not path:
            raise BadConfig("robot:= is empty; give the YAML file with the robot's nodes")
        nodes = read_bringup(Path(path).expanduser())
        return [a for name, spec in nodes.items() for a in node_actions(name, spec, respawn=True)]

    return OpaqueFunction(function=make)


def node_actions(name: str, spec: NodeSpec, *, respawn: bool) -> list[Any]:
    """A lifecycle node, brought to `active` each time it starts where the spec asks for that."""
    node = LifecycleNode(
        package="edge_nodes",
        executable=f"{spec.kind}_node",
        name=name,
        namespace=spec.namespace,
        parameters=[
            *([spec.params] if spec.params else []),
            *([dict(spec.parameters)] if spec.parameters else []),
        ],
        remappings=list(spec.remap.items()),
        output="screen",
        respawn=respawn,
        respawn_delay=RESPAWN_SECONDS,
    )
    if not spec.autostart:
        return [node]

    def activate(event: ProcessStarted, context: LaunchContext) -> list[Any]:
        full = f"/{spec.namespace.strip('/')}/{name}".replace("//", "/")
        return [Node(package="edge_nodes", executable="activate", arguments=[full], output="screen")]

    return [RegisterEventHandler(OnProcessStart(target_action=node, on_start=activate)), node]


def _truth(name: str, word: str) -> bool:
    if word.lower() not in ("true", "false", "1", "0"):
        raise BadConfig(f"{name}:={word}, expected true or false")
    return word.lower() in ("true", "1")
