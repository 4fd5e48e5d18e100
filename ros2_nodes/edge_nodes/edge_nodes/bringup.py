"""The YAML that brings up a robot's set of nodes, read strictly; knows no ROS.

nodes:
  planner: {kind: planner}
  chat:
    kind: language
    namespace: /head
    parameters: {engine.path: /opt/engines/chat.edge, worker.nice: 10}
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edge_nodes.parameter_table import TABLES, Value
from edge_runtime import BadConfig, nearest, read_yaml

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeSpec:
    """One node of a robot. params: a ROS parameter file beside `parameters`, which win."""

    kind: str
    namespace: str = ""
    autostart: bool = True
    params: str = ""
    parameters: Mapping[str, Value] = field(default_factory=dict)
    remap: Mapping[str, str] = field(default_factory=dict)


_KEYS = tuple(NodeSpec.__dataclass_fields__)


def read_bringup(path: Path) -> dict[str, NodeSpec]:
    """The nodes by name. Raises BadConfig naming the file, the place and what was expected there."""
    top = _mapping(read_yaml(path, "set of nodes"), f"{path}")
    _known(top, ("nodes",), f"{path}")
    nodes = _mapping(top.get("nodes"), f"{path}: nodes")
    if not nodes:
        raise BadConfig(f"{path}: nodes is empty; name at least one, such as planner: {{kind: planner}}")
    return {name: _node(name, value, f"{path}: nodes.{name}") for name, value in nodes.items()}


def _node(name: str, value: object, place: str) -> NodeSpec:
    if not _NAME.fullmatch(name):
        raise BadConfig(f"{place}: not a node's name; expected letters, digits and _, a letter first")
    node = _mapping(value, place)
    _known(node, _KEYS, place)
    kind = node.get("kind")
    if kind not in TABLES:
        raise BadConfig(f"{place}.kind is {kind!r:.60}; {nearest(str(kind), TABLES)}")
    for key in ("namespace", "params"):
        if not isinstance(node.get(key, ""), str):
            raise BadConfig(f"{place}.{key} is {node[key]!r:.60}, expected a string")
    if not isinstance(node.get("autostart", True), bool):
        raise BadConfig(f"{place}.autostart is {node['autostart']!r:.60}, expected true or false")
    remap = _mapping(node.get("remap", {}), f"{place}.remap")
    for source, target in remap.items():
        if not isinstance(target, str) or not target:
            raise BadConfig(f"{place}.remap.{source} is {target!r:.60}, expected a topic's name")
    spec = {**node, "remap": remap, "parameters": _parameters(kind, node, f"{place}.parameters")}
    return NodeSpec(**spec)


def _parameters(kind: str, node: Mapping[str, Any], place: str) -> dict[str, Value]:
    """Checked as the node will check them, so that a slip is found before anything is started."""
    values = _mapping(node.get("parameters", {}), place)
    rows = {row.name: row for row in TABLES[kind]}
    _known(values, rows, place)
    for name, value in values.items():
        wanted = type(rows[name].default)
        if wanted is float and type(value) is int:
            values[name] = value = float(value)  # a whole number in YAML is no double to ROS
        if type(value) is not wanted:
            raise BadConfig(f"{place}.{name} is {value!r:.60}, expected {wanted.__name__}")
        trouble = rows[name].trouble(value)
        if trouble is not None:
            raise BadConfig(f"{place}: {trouble}")
    return values


def _mapping(value: object, place: str) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadConfig(f"{place}: expected a mapping of names, got {type(value).__name__}")
    return dict(value)


def _known(found: Iterable[str], known: Iterable[str], place: str) -> None:
    names = tuple(known)
    for key in found:
        if key not in names:
            raise BadConfig(f"{place}: unknown key {key!r:.60}; {nearest(key, names)}")
