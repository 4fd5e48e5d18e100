"""Figures written down one by one as they are found, so that a run that was killed asks for none twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TextIO

from edge_runtime.engine.folder import MAX_INDEX, read_capped


class Journal:
    """A file of JSON lines: first what the figures are of, then [key…, figure] each. A file of anything else,
    and a line that was cut, are dropped; `path` None writes nothing down."""

    def __init__(self, path: Path | None, subject: object) -> None:
        self._known: dict[tuple[str, ...], float] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        head = json.dumps(subject, sort_keys=True)
        if path.exists():
            lines = read_capped(path, MAX_INDEX).decode("utf-8", "replace").split("\n")
            if lines[0] == head:
                self._known = dict(filter(None, map(_figure, lines[1:])))
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")
        self._file.write(head + "\n")
        for key, figure in self._known.items():
            self._write(key, figure)
        self._file.flush()

    def get(self, *key: str) -> float | None:
        return self._known.get(key)

    def put(self, figure: float, *key: str) -> float:
        """Write a figure down; gives it back."""
        self._known[key] = figure
        if self._file is not None:
            self._write(key, figure)
            self._file.flush()
        return figure

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, key: tuple[str, ...], figure: float) -> None:
        assert self._file is not None
        self._file.write(json.dumps([*key, figure]) + "\n")


def _figure(line: str) -> tuple[tuple[str, ...], float] | None:
    try:
        *key, figure = json.loads(line)
    except (ValueError, TypeError):
        return None
    return (
        (tuple(key), figure) if isinstance(figure, float) and all(isinstance(k, str) for k in key) else None
    )
