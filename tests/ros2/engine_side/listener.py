"""Listens to a job: its events, and a wait for the last one."""

from __future__ import annotations

import threading

from edge_nodes.job import ChatTurn, Ended, Event, Job, Progress


class Listener:
    def __init__(self) -> None:
        self.pieces: list[Progress] = []
        self.ends: list[Ended] = []
        self._over = threading.Event()

    def __call__(self, event: Event) -> None:
        if isinstance(event, Progress):
            self.pieces.append(event)
        else:
            self.ends.append(event)
            self._over.set()

    def wait(self, seconds: float = 20.0) -> Ended:
        assert self._over.wait(seconds), "the job did not end"
        return self.ends[0]

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)


def command(text: str, **fields: object) -> Job:
    return Job(messages=(ChatTurn(role="user", content=text),), **fields)  # type: ignore[arg-type]


def long_job(**fields: object) -> Job:
    """One that runs for a while."""
    return Job(prompt="go to the kitchen", max_tokens=900, ignore_eos=True, **fields)  # type: ignore[arg-type]
