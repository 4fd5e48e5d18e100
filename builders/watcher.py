"""Watcher: hears how a build goes on; the command line shows it, by default nobody does."""

from __future__ import annotations


class Watcher:
    """The base hears everything and says nothing."""

    def phase(self, name: str, steps: int) -> None:
        """A phase of so many steps begins."""

    def step(self, what: str) -> None:
        """One step of it is done."""
