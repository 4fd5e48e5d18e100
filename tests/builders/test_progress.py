"""What edge-build tells of its progress: few lines in a log, but never minutes without; else bars."""

from __future__ import annotations

import io
import sys

import pytest

from builders.report import ProgressBar


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("edge_runtime.cli.output.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def log_of(
    clock: Clock, capsys: pytest.CaptureFixture[str], count: int, seconds: float, *, steps: bool = False
) -> list[str]:
    """Lines of a phase of `count` steps of so many seconds."""
    with ProgressBar(steps=steps) as bar:
        bar.phase("sensitivity", count)
        for i in range(count):
            clock.now += seconds
            bar.step(f"KL tensor{i}")
    return capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("count", [1, 2, 9, 10, 72, 1000])
def test_a_long_phase_tells_its_tenths(count: int, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log_of(clock, capsys, count, 60.0)
    assert lines[0] == f"sensitivity ({count})"
    assert len(lines) == min(count, 10)
    for line in lines[1:]:
        told, _, what = line.partition("%: KL tensor")
        done = 1 + int(what)
        assert told == f"sensitivity {10 * (10 * done // count)}"


def test_a_short_phase_is_one_line(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    assert log_of(clock, capsys, 69, 0.07) == ["sensitivity (69)"]


def test_lines_are_seconds_apart(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """12 s: a line after 5 and after 10."""
    lines = log_of(clock, capsys, 12, 1.0)
    assert lines == ["sensitivity (12)", "sensitivity 40%: KL tensor4", "sensitivity 80%: KL tensor9"]


def test_engines_of_a_fleet_are_told_one_by_one(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log_of(clock, capsys, 12, 60.0, steps=True)
    assert lines == ["sensitivity (12)", *(f"KL tensor{i}" for i in range(12))]


def test_a_log_is_a_log_where_colours_are_forced(
    clock: Clock, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert log_of(clock, capsys, 2, 0.0) == ["sensitivity (2)"]


def test_a_terminal_has_a_bar_and_no_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBar() as bar:
        bar.step("before any phase")
        bar.phase("quantize", 2)
        bar.step("one")
        bar.step("two")
    shown = terminal.getvalue()
    assert "2/2" in shown and "two" in shown and "quantize (2)" not in shown and "%:" not in shown
