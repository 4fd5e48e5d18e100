"""Declares a table's parameters with descriptors, checks changes with reasons, reads them as a snapshot."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from rcl_interfaces.msg import (
    FloatingPointRange,
    IntegerRange,
    ParameterDescriptor,
    SetParametersResult,
)
from rclpy.parameter import Parameter

from edge_nodes.parameter_table import Row
from edge_runtime import BadConfig, nearest


def descriptor(row: Row) -> ParameterDescriptor:
    described = ParameterDescriptor(description=row.text, read_only=row.fixed)
    if row.low is not None and row.high is not None:
        if isinstance(row.default, int):
            span = IntegerRange(from_value=int(row.low), to_value=int(row.high), step=0)
            described.integer_range = [span]
        else:
            reach = FloatingPointRange(from_value=float(row.low), to_value=float(row.high), step=0.0)
            described.floating_point_range = [reach]
    notes = []
    if row.words:
        notes.append("one of: " + ", ".join(repr(w) for w in row.words))
    if row.structural:
        notes.append("can be changed while the node is unconfigured only")
    described.additional_constraints = "; ".join(notes)
    return described


class Parameters:
    """The values of a node's table. Reading takes no lock: a change replaces the whole snapshot.

    locked: whether structural ones must not change now.
    """

    def __init__(self, node: Any, rows: Sequence[Row], locked: Callable[[], bool]) -> None:
        self._rows = {row.name: row for row in rows}
        self._locked = locked
        self._writing = threading.Lock()
        self.changed = 0  # accepted changes since the start
        self.refused = 0
        for row in rows:
            node.declare_parameter(row.name, row.default, descriptor(row))
        values = {row.name: node.get_parameter(row.name).value for row in rows}
        for row in rows:  # values from launch files and the command line come with the declaration
            trouble = row.trouble(values[row.name])
            if trouble is not None:
                raise BadConfig(f"parameter {trouble}")
        for name in getattr(node, "_parameter_overrides", ()):  # rclpy drops what nobody declared
            if not node.has_parameter(name):
                hint = nearest(name, self._rows)
                node.get_logger().warning(f"parameter {name!r} is not known and has no effect; {hint}")
        self._values: Mapping[str, Any] = MappingProxyType(values)
        node.add_on_set_parameters_callback(self._on_set)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    @property
    def snapshot(self) -> Mapping[str, Any]:
        """All values as of one moment."""
        return self._values

    def _on_set(self, parameters: Sequence[Parameter]) -> SetParametersResult:
        ours = {p.name: p.value for p in parameters if p.name in self._rows}
        reason = self._trouble(ours)
        if reason is not None:
            self.refused += 1
            return SetParametersResult(successful=False, reason=reason)
        with self._writing:  # held for a copy of a small dict
            self._values = MappingProxyType({**self._values, **ours})
            self.changed += len(ours)
        return SetParametersResult(successful=True)

    def _trouble(self, values: Mapping[str, Any]) -> str | None:
        for name, value in values.items():
            row = self._rows[name]
            if value is None:
                return f"{name} cannot be deleted"
            if row.structural and self._locked():
                return f"{name} decides what is opened: deactivate and clean up the node, then change it"
            trouble = row.trouble(value)
            if trouble is not None:
                return trouble
        return None
