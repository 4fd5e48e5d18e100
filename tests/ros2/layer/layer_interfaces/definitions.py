"""What an interface holds, read from rosbags' type stores and from .msg, .srv and .action text.

Text is looked for in this project's own packages (`ros2_nodes/edge_interfaces`) and in `texts/`, which has
what the stores lack. The stores keep no default values, so `STORE_DEFAULTS` has those of the types in use.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from rosbags.interfaces import Nodetype
from rosbags.typesys import Stores, get_typestore
from rosbags.typesys.base import create_field_desc
from rosbags.typesys.msg import MSGParser

HERE = Path(__file__).resolve().parent
OWN = HERE.parents[3] / "ros2_nodes"
FOLDERS = (OWN, HERE / "texts")
STORE_DEFAULTS: dict[str, dict[str, Any]] = {"geometry_msgs/msg/Quaternion": {"w": 1.0}}
PADDING = "structure_needs_at_least_one_member"


@dataclass(frozen=True)
class Field:
    """One field. `nested` names a message type, else `base` a primitive.

    count: None for one value, ("array", n) or ("sequence", bound); bound 0 has no limit. length: of a bounded
    string, 0 without one.
    """

    name: str
    base: str
    nested: str
    count: tuple[str, int] | None
    length: int
    default: Any = None


@dataclass(frozen=True)
class Definition:
    """One flat structure: a message, request, response, goal, result, feedback or an action's wrapper."""

    name: str  # package/kind/Name
    fields: tuple[Field, ...]
    constants: tuple[tuple[str, Any], ...]


@lru_cache(maxsize=1)
def store() -> Any:
    """rosbags' type store of the distribution that is played: ROS_DISTRO humble, else Jazzy."""
    humble = os.environ.get("ROS_DISTRO") == "humble"
    return get_typestore(Stores.ROS2_HUMBLE if humble else Stores.ROS2_JAZZY)


def _constant(kind: str, value: Any) -> Any:
    """As rosidl's Python has it: a byte is bytes of length one."""
    return bytes([value]) if kind in ("byte", "octet") else value


def _field(name: str, description: Any, default: Any = None) -> Field:
    kind, detail = description
    count = None
    if kind in (Nodetype.ARRAY, Nodetype.SEQUENCE):
        count = ("array" if kind == Nodetype.ARRAY else "sequence", int(detail[1]))
        kind, detail = detail[0]
    if kind == Nodetype.NAME:
        return Field(name, "", detail, count, 0, default)
    return Field(name, detail[0], "", count, int(detail[1]), default)


def parse(name: str, text: str) -> Definition:
    """The structure that one part of an interface text describes; name as in package/kind/Name."""
    package = name.split("/")[0]
    # Relative names mean messages of the same package, also inside .srv and .action text.
    message = MSGParser(f"MSG: {package}/msg/Text\n{text}\n").specification()[0]
    fields = tuple(_field(f.name, create_field_desc(f.typ), f.value) for f in message.fields)
    constants = tuple((c.name, _constant(str(c.typ), c.value)) for c in message.constants)
    return Definition(name, fields, constants)


def find_text(package: str, kind: str, name: str) -> str | None:
    """The text of package/kind/name.kind, or None where no folder has it."""
    for folder in FOLDERS:
        path = folder / package / kind / f"{name}.{kind}"
        if path.is_file():
            return path.read_text(encoding="utf-8")
    return None


def parts(text: str) -> list[str]:
    """The sections of a .srv or .action text, which lines of three dashes divide."""
    return re.split(r"(?m)^---\s*$", text)


@cache
def message_definition(name: str) -> Definition:
    """The definition of a message, as std_msgs/msg/String, or of an action's part, as pkg/action/Move_Goal.

    Raises:
        LookupError: neither the stores nor the folders have it.
    """
    package, kind, short = name.split("/")
    if kind == "action":
        return _action_part(name)
    text = find_text(package, "msg", short)
    if text is not None:
        return parse(name, text)
    if name not in store().fielddefs:
        raise LookupError(f"no message {name}: neither rosbags' store nor {', '.join(map(str, FOLDERS))}")
    constants, fields = store().fielddefs[name]
    defaults = STORE_DEFAULTS.get(name, {})
    return Definition(
        name,
        tuple(_field(n, d, defaults.get(n)) for n, d in fields if n != PADDING),
        tuple((n, _constant(str(kind), value)) for n, kind, value in constants),
    )


def _action_part(name: str) -> Definition:
    package, kind, short = name.split("/")
    action, _, part = short.rpartition("_")
    text = find_text(package, kind, action)
    if text is None:
        raise LookupError(f"no action {package}/action/{action} in {', '.join(map(str, FOLDERS))}")
    return parse(name, parts(text)[("Goal", "Result", "Feedback").index(part)])
