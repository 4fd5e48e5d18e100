"""A language node whose every step takes test.step seconds longer: a message is then quicker than one.

With worker.enabled the same file is the worker: python -m slow_node --fd N --nice N; seconds in SLOW_STEP.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from edge_nodes.engine_host import EngineHost
from edge_nodes.engine_worker import EngineWorker, main
from edge_nodes.language_node import LanguageNode
from edge_nodes.protocol import Channel
from edge_nodes.spinning import spin_node


def slow_down(host: EngineHost, seconds: float) -> None:
    really_open = host.open

    def opened(options: Any) -> Any:
        facts = really_open(options)
        session = host._session
        assert session is not None
        step = session.step

        def slow_step() -> Any:
            time.sleep(seconds)
            return step()

        session.step = slow_step  # type: ignore[method-assign]
        return facts

    host.open = opened  # type: ignore[method-assign]


class SlowNode(LanguageNode):
    def serve(self) -> None:
        super().serve()
        self._step = self.declare_parameter("test.step", 0.2).value

    def _make_engine(self, settings: Any) -> Any:
        engine = super()._make_engine(settings)
        if isinstance(engine, EngineHost):
            slow_down(engine, self._step)
        else:
            os.environ["SLOW_STEP"] = str(self._step)
            engine._command = (sys.executable, "-m", "slow_node")
        return engine


class SlowWorker(EngineWorker):
    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        slow_down(self._host, float(os.environ["SLOW_STEP"]))


if __name__ == "__main__":
    raise SystemExit(main(SlowWorker) if "--fd" in sys.argv else spin_node(SlowNode))
