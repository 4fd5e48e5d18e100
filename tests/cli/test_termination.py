"""SIGTERM ends a command as Ctrl-C does: what is on the way out runs whole, and the exit code tells which."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edge_runtime.cli.termination import terminable

COMMAND = """
import os, signal, sys, time
from pathlib import Path
from edge_runtime.cli.output import Answer, Parser, run_command

def run(args):
    try:
        os.kill(os.getpid(), int(sys.argv[2]))
        time.sleep(30)
    finally:
        if int(sys.argv[2]) == signal.SIGTERM:
            os.kill(os.getpid(), signal.SIGTERM)  # as timeout(1) does
        Path(sys.argv[1]).write_text("cleared")
    return Answer({})

sys.exit(run_command(Parser("command", "", []), run, ["--json"]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_what_is_on_the_way_out_runs_whole(tmp_path: Path, number: int, code: int) -> None:
    target = tmp_path / "cleared"
    command = [sys.executable, "-c", COMMAND, str(target), str(int(number))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (code, "interrupted")
    assert '"KeyboardInterrupt"' in done.stdout
    assert target.read_text() == "cleared"


def test_a_handler_of_somebody_else_is_left_alone() -> None:
    def own(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, own)
    try:
        with terminable():
            assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGTERM) is own
    finally:
        signal.signal(signal.SIGTERM, before)


def test_the_default_comes_back() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with terminable() as told:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL and not told
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
