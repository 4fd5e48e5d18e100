"""What a part of gpu-check found, kept in a file line by line, and the results as JSON, table and chart."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NO_TIME = "not run: time"
SCHEMA = 1


@dataclass
class Report:
    """Of one part, in its own process: every addition is written at once, so that a crash loses nothing.

    deadline: time.monotonic() after which nothing new is begun.
    """

    name: str
    path: Path
    deadline: float
    found: dict[str, Any] = field(default_factory=lambda: {"figures": [], "checks": [], "notes": []})

    def left(self) -> float:
        """Seconds that the part may still take."""
        return self.deadline - time.monotonic()

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        goal: float | None = None,
        at_most: bool = False,
        spread: tuple[float, float] | None = None,
    ) -> None:
        """A measurement, and the issue's goal for it where there is one: at least it, or at most."""
        row: dict[str, Any] = {"name": name, "value": _short(value), "unit": unit}
        if spread is not None:
            row["spread"] = [_short(v) for v in spread]
        words = ""
        if goal is not None:
            met = value <= goal if at_most else value >= goal
            row |= {"goal": f"{'<=' if at_most else '>='} {goal:g} {unit}", "met": met}
            words = f"  (goal {row['goal']}: {'met' if met else 'NOT met'})"
        self.found["figures"].append(row)
        self._say(f"{name}: {_short(value):g} {unit}{words}")

    def check(self, name: str, ok: bool, detail: str = "") -> None:
        """Something that is right or wrong."""
        self.found["checks"].append({"name": name, "ok": bool(ok), "detail": detail})
        self._say(f"{'ok' if ok else 'WRONG'}: {name}{f' ({detail})' if detail else ''}")

    def note(self, text: str) -> None:
        self.found["notes"].append(text)
        self._say(text)

    def put(self, key: str, value: Any) -> None:
        """Anything else that belongs into the JSON."""
        self.found[key] = value
        self._write()

    @contextmanager
    def guarded(self, name: str, seconds: float = 1.0, *, ours: bool = True) -> Iterator[None]:
        """A piece that may fail or find no time: the part goes on with the next. ours: a failure is wrong."""
        if self.left() < seconds:
            raise OutOfTime(name)
        try:
            yield
        except OutOfTime:
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"[:1000]
            if ours:
                self.check(name, False, what)
                traceback.print_exc(limit=6, file=sys.stdout)
            else:
                self.note(f"{name} did not run: {what[:300]}")

    def each(self, pieces: dict[str, Callable[[], None]], seconds: float = 1.0, *, ours: bool = True) -> None:
        """Run pieces by name, each guarded; those that find no time are noted together."""
        late = []
        for name, piece in pieces.items():
            try:
                with self.guarded(name, seconds, ours=ours):
                    piece()
            except OutOfTime:
                late.append(name)
        if late:
            self.note(f"{NO_TIME}: {', '.join(late)}")

    def _say(self, text: str) -> None:
        print(f"  {text}", flush=True)
        self._write()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found))
        os.replace(partial, self.path)


class OutOfTime(Exception):
    """A piece was not begun."""


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    machine = results["machine"]
    lines = [
        f"# gpu-check: {machine.get('gpu', 'no GPU')}, {results['date']}, commit {results['commit']}",
        "",
        *([f"**{results['headline']}**", ""] if results.get("headline") else []),
        "| part | state | seconds | right | wrong |",
        "|---|---|---|---|---|",
    ]
    for name, part in results["parts"].items():
        checks = part.get("checks", [])
        right = sum(c["ok"] for c in checks)
        seconds = f"{part['seconds']:.0f}" if "seconds" in part else ""
        lines.append(f"| {name} | {part['state']} | {seconds} | {right} | {len(checks) - right} |")
    for name, part in results["parts"].items():
        figures, wrong = part.get("figures", []), [c for c in part.get("checks", []) if not c["ok"]]
        if figures or wrong or part.get("notes"):
            lines += ["", f"## {name}", ""]
        lines += [f"- WRONG: {c['name']}: {c['detail']}" for c in wrong]
        lines += [f"- {note}" for note in part.get("notes", [])]
        if figures:
            lines += ["", "| figure | value | unit | goal | |", "|---|---|---|---|---|"]
        for f in figures:
            met = {True: "met", False: "NOT met", None: ""}[f.get("met")]
            lines.append(f"| {f['name']} | {f['value']:g} | {f['unit']} | {f.get('goal', '')} | {met} |")
    return "\n".join(lines) + "\n"


def chart(results: dict[str, Any], path: Path) -> bool:
    """Shares of a yardstick as bars with the issue's goals. Whether it was drawn: not without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        (f["name"], f["value"], float(f["goal"].split()[1]) if "goal" in f else None)
        for part in results["parts"].values()
        for f in part.get("figures", [])
        if f["unit"] == "%"
    ]
    if not rows:
        return False
    figure, axes = pyplot.subplots(figsize=(9, 1.2 + 0.28 * len(rows)))
    names, values, goals = zip(*reversed(rows), strict=True)
    colors = [
        "#888888" if g is None else "#2a7f3f" if v >= g else "#b03030"
        for v, g in zip(values, goals, strict=True)
    ]
    axes.barh(range(len(rows)), values, color=colors)
    for i, goal in enumerate(goals):
        if goal is not None:
            axes.plot([goal, goal], [i - 0.45, i + 0.45], color="black", linewidth=1.5)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.set_xlabel("share in % of the yardstick measured in the same run; black: goal")
    axes.set_title(f"{results['machine'].get('gpu', '')}, {results['date']}", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True
