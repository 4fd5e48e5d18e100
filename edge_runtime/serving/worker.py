"""A child process for work on untrusted input that no limit inside this process can end: it may hang, eat
memory or crash, and nothing is lost. Talks in lines of JSON, one object there, one back.
"""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

START_SECONDS = 30.0  # a busy robot starts an interpreter slowly


class Worker:
    """Runs a Python file that answers the first line with what became of the set-up, then line by line.

    One thread at a time; the owner holds a lock.
    """

    def __init__(self, script: Path) -> None:
        self._script = script
        self._process: subprocess.Popen[str] | None = None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, setup: dict[str, Any]) -> dict[str, Any] | None:
        """Start it anew; its answer to the set-up, None when it died or is not up within START_SECONDS."""
        self.close()
        self._process = subprocess.Popen(
            [sys.executable, str(self._script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
        )
        return self.ask(setup, START_SECONDS)

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer; None when the process died or took longer than `seconds`, and it is ended then."""
        answer = self._exchange(question, seconds)
        if answer is None:
            self.close()
        return answer

    def close(self) -> None:
        """End the process, at whatever it is."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):  # what was still to be written has no reader
                    pipe.close()

    def _exchange(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return None
        try:
            process.stdin.write(json.dumps(question) + "\n")
            process.stdin.flush()
            if not select.select([process.stdout], [], [], seconds)[0]:
                return None
            line = process.stdout.readline()  # the answer is written in one go
            answer: dict[str, Any] | None = json.loads(line) if line.endswith("\n") else None
            return answer
        except (OSError, ValueError):
            return None
