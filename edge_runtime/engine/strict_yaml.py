"""YAML files that people write for this project, read strictly: plain values, short, every key once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from edge_runtime.errors import BadConfig

MAX_FILE_BYTES = 64 * 1024  # the longest shipped profile has 4 KiB; anything larger was not written by hand


class _Loader(yaml.SafeLoader):
    """Plain YAML only: anchors could make a small file large, and a key given twice hides a mistake."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="YAML aliases (*name) are not read", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    problem = f"key {key.value[:60]!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, what: str) -> object:
    """The value of a file that holds `what` (a noun). Raises BadConfig naming line and column."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadConfig(f"{str(path)!r}: cannot be read: {error}") from error
    if len(data) > MAX_FILE_BYTES:
        raise BadConfig(f"{path}: larger than {MAX_FILE_BYTES // 1024} KiB; a {what} is a short YAML file")
    try:
        return yaml.load(data.decode("utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path}: not UTF-8 text (byte {error.start}); a {what} is a YAML file") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise BadConfig(f"{path}: not valid YAML{at}: {str(error.problem)[:200]}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date or number
        raise BadConfig(f"{path}: not valid YAML: {str(error)[:200]}") from error
