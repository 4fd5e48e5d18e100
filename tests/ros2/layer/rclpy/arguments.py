"""--ros-args of a process: remaps, parameters, parameter files."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml


@dataclass
class Arguments:
    remaps: dict[str, str] = field(default_factory=dict)
    parameters: list[tuple[str, dict[str, Any]]] = field(default_factory=list)  # (node pattern, values)

    def values_for(self, full_name: str) -> dict[str, Any]:
        """Parameters of the node of that name, later ones winning."""
        found: dict[str, Any] = {}
        for pattern, values in self.parameters:
            if fnmatch.fnmatchcase(full_name, pattern.replace("**", "*")) or pattern.strip(
                "/"
            ) == full_name.strip("/"):
                found.update(values)
        return found


def parse_arguments(args: Sequence[str]) -> Arguments:
    """Raises ValueError for what is no ROS argument."""
    found = Arguments()
    words = iter(args)
    inside = False
    for word in words:
        if word == "--ros-args":
            inside = True
        elif word == "--":
            inside = False
        elif inside and word in ("-r", "--remap"):
            source, _, target = next(words).partition(":=")
            found.remaps[source] = target
        elif inside and word in ("-p", "--param"):
            name, _, value = next(words).partition(":=")
            found.parameters.append(("/**", {name: yaml.safe_load(value)}))
        elif inside and word == "--params-file":
            with open(next(words), encoding="utf-8") as file:
                for pattern, body in (yaml.safe_load(file) or {}).items():
                    found.parameters.append((pattern, _flat(body["ros__parameters"])))
        elif inside and word == "--log-level":
            next(words)
        elif inside:
            raise ValueError(f"unknown ROS argument {word!r}")
    return found


def _flat(values: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{before}{name}."))
        else:
            flat[before + name] = value
    return flat
