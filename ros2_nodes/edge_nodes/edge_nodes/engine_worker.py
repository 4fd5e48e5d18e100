"""The worker process: an EngineHost behind the protocol. Ends when its node does.

python -m edge_nodes.engine_worker --fd N --nice N
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from edge_nodes.engine import EngineOptions
from edge_nodes.engine_host import EngineHost
from edge_nodes.job import ChatTurn, Event
from edge_nodes.process import settle_process
from edge_nodes.protocol import Answer, Beat, Call, Cancel, Channel, ProtocolError, Submit, to_worker
from edge_runtime import EdgeError

BEAT_SECONDS = 0.2


class EngineWorker:
    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._host = EngineHost()
        self._over = threading.Event()
        self._calls = ThreadPoolExecutor(
            2, thread_name_prefix="call"
        )  # a long one holds up none but the next

    def run(self) -> None:
        threading.Thread(target=self._beat, name="beat", daemon=True).start()
        try:
            while (message := self._channel.receive()) is not None:
                if isinstance(message, Submit):
                    self._host.submit(message.number, message.job, self._tell)
                elif isinstance(message, Cancel):
                    self._host.cancel(message.number)
                else:
                    self._calls.submit(self._call, message)
        except (OSError, ProtocolError) as error:
            print(f"edge_nodes worker: {error}", file=sys.stderr, flush=True)
        self._over.set()
        self._host.close()

    def _tell(self, event: Event) -> None:
        try:
            self._channel.send(event)
        except OSError:
            self._over.set()  # the node is gone; `run` ends as well

    def _call(self, call: Call) -> None:
        try:
            value = _METHODS[call.method](self._host, *call.arguments)
            answer = Answer(id=call.id, value=msgspec.Raw(msgspec.json.encode(value)))
        except EdgeError as error:
            answer = Answer(id=call.id, error=type(error).__name__, why=str(error))
        except Exception as error:
            answer = Answer(id=call.id, error="EdgeError", why=f"{type(error).__name__}: {error}")
        try:
            self._channel.send(answer)
        except (OSError, ProtocolError) as error:
            print(f"edge_nodes worker: {error}", file=sys.stderr, flush=True)

    def _beat(self) -> None:
        """Ends the process where the node is gone, whatever a step or a call is in the middle of."""
        parent = os.getppid()
        while not self._over.wait(BEAT_SECONDS):
            try:
                self._channel.send(Beat(step_s=self._host.step_seconds, figures=self._host.figures()))
            except OSError:
                os._exit(0)
            if os.getppid() != parent:
                os._exit(0)


def _open(host: EngineHost, options: dict[str, Any]) -> Any:
    return host.open(msgspec.convert(options, EngineOptions, strict=False))


def _save(host: EngineHost, text: str, turns: list[dict[str, str]], path: str, adapter: str) -> int:
    return host.save_prefix(text, [msgspec.convert(t, ChatTurn) for t in turns], path, adapter)


_METHODS: dict[str, Any] = {
    "open": _open,
    "prove": EngineHost.prove,
    "facts": EngineHost.facts,
    "tokenize": EngineHost.tokenize,
    "detokenize": EngineHost.detokenize,
    "save_prefix": _save,
    "forget": EngineHost.forget,
}


def main(kind: type[EngineWorker] = EngineWorker) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True)
    parser.add_argument("--nice", type=int, default=0)
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the node's to handle
    os.nice(options.nice)
    settle_process()
    kind(Channel(socket.socket(fileno=options.fd), to_worker)).run()
    os._exit(0)  # threads of a call that hangs must not keep the process


if __name__ == "__main__":
    raise SystemExit(main())
