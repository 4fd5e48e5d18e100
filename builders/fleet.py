"""edge-build --matrix: every cell of a fleet file built, and a table of what came out.

A cell that fails stops no other. One whose engine is there, of the same recipe, files and tools, is left as
it is. Results are written beside the engines after every cell, so that an interruption loses none of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from builders.fleet_cell import BUILT, FAILED, UNCHANGED, Row
from builders.fleet_crews import Crew, crew_of
from builders.fleet_file import Cell, Fleet
from builders.watcher import Watcher
from edge_runtime.cli.output import size, table
from edge_runtime.errors import BadConfig, BuildError

RESULTS = "results"  # .json and .md, in the fleet's folder
LOGS = "logs"
_HEAD = (
    *("model", "profile", "variant", "weights", "size", "need", "have", "tokens/s"),
    *("ppl rise", "KL", "accuracy", "seconds", "status"),
)
_RIGHT = tuple(range(4, 12))


def build_fleet(
    fleet: Fleet, *, force: bool, jobs: int | None, ray: str | None, watcher: Watcher | None = None
) -> list[Row]:
    """Build all cells, `jobs` at once; the rows in the order of the file. `ray`: see `crew_of`.

    Raises BadConfig, BuildError (the folder cannot be written), Unsupported and BackendUnavailable (Ray);
    what goes wrong in a cell is in its row.
    """
    if jobs is not None and jobs < 1:
        raise BadConfig(f"--jobs is {jobs}, expected at least 1")
    watcher = watcher or Watcher()
    try:
        fleet.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{fleet.output} cannot be made: {error.strerror}") from None
    rows: dict[str, Row] = {}
    waiting, running = list(fleet.cells), list[Cell]()
    watcher.phase("fleet", len(waiting))
    with ExitStack() as stack:
        crew: Crew = crew_of(ray, jobs)
        stack.callback(crew.stop)
        while waiting or running:
            for cell in _startable(waiting, running, crew.room):
                waiting.remove(cell)
                running.append(cell)
                crew.start(cell, force, fleet.output / LOGS / f"{cell.name}.log")
            for cell, outcome in crew.ended():
                running.remove(cell)
                names = {"name": cell.name, "model": cell.model, "profile": cell.profile}
                row = msgspec.convert({**names, "variant": cell.variant, **outcome}, Row)
                rows[cell.name] = row
                write_results(fleet, [rows[c.name] for c in fleet.cells if c.name in rows])
                watcher.step(f"{row.name}: {row.status}")
    return [rows[cell.name] for cell in fleet.cells]


def _startable(waiting: Sequence[Cell], running: Sequence[Cell], room: int) -> list[Cell]:
    """The next cells, in order; of those that share a calibration one at a time, for the first makes it."""
    busy = {cell.calibration for cell in running}
    found: list[Cell] = []
    for cell in waiting:
        if len(running) + len(found) == room:
            break
        if cell.calibration is None or cell.calibration not in busy:
            found.append(cell)
            busy.add(cell.calibration)
    return found


def write_results(fleet: Fleet, rows: Sequence[Row]) -> None:
    """results.json and results.md in the fleet's folder, each replaced as a whole. Raises BuildError."""
    data = msgspec.json.format(msgspec.json.encode(fleet_data(fleet, rows)), indent=1)
    _replace(fleet.output / f"{RESULTS}.json", data + b"\n")
    _replace(fleet.output / f"{RESULTS}.md", _markdown(fleet, rows).encode())


def fleet_data(fleet: Fleet, rows: Sequence[Row]) -> dict[str, Any]:
    """The object that --json prints and results.json holds."""
    return {
        "fleet": fleet.name,
        "output": str(fleet.output),
        "counts": {s: sum(row.status == s for row in rows) for s in (BUILT, UNCHANGED, FAILED)},
        "rows": [msgspec.to_builtins(row) for row in rows],
    }


def fleet_text(rows: Sequence[Row]) -> str:
    """The table for people, and under it why cells failed and which limits --force overrode."""
    lines = [table([_cells(row) for row in rows], _HEAD, right=_RIGHT)]
    lines += [f"{row.name}: {row.error}" for row in rows if row.error is not None]
    lines += [
        f"{row.name}: written by --force although {'; '.join(row.broken)}" for row in rows if row.broken
    ]
    return "\n".join(lines)


def worst_error(rows: Sequence[Row]) -> BuildError | None:
    """An error with the greatest exit code of all cells, or None when all are well."""
    bad = [row for row in rows if row.exit_code]
    if not bad:
        return None
    error = BuildError(f"{len(bad)} of {len(rows)} engines were not built: {', '.join(r.name for r in bad)}")
    error.exit_code = max(row.exit_code for row in bad)
    return error


def _cells(row: Row) -> tuple[str, ...]:
    def shown(value: float | None, pattern: str) -> str:
        return "" if value is None else pattern.format(value)

    def nbytes(value: int | None) -> str:
        return "" if value is None else size(value)

    return (
        row.model,
        row.profile,
        row.variant,
        row.weights or "",
        nbytes(row.bytes),
        nbytes(row.need),
        nbytes(row.have),
        shown(row.tokens_per_s, "{:.1f}"),
        shown(row.ppl_increase, "{:+.2f}%"),
        shown(row.kl_mean, "{:.5f}"),
        shown(row.accuracy, "{:.2%}"),
        f"{row.seconds:.1f}",
        row.status if not row.exit_code else f"{row.status} ({row.exit_code})",
    )


def _markdown(fleet: Fleet, rows: Sequence[Row]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    rule = ["--:" if i in _RIGHT else "---" for i in range(len(_HEAD))]
    lines = [f"# {fleet.name}", "", line(_HEAD), line(rule), *(line(_cells(row)) for row in rows)]
    notes = [f"- {row.name}: {row.error}" for row in rows if row.error is not None]
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise BuildError(f"{path} cannot be written: {error.strerror}") from None
