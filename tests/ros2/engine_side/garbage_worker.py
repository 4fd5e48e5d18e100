"""A worker that does not keep to the protocol: what it does is in the variable EDGE_GARBAGE."""

from __future__ import annotations

import argparse
import os
import socket
import struct
import time

from edge_nodes.engine_worker import EngineWorker
from edge_nodes.protocol import Answer, Channel, Submit, to_worker

parser = argparse.ArgumentParser()
parser.add_argument("--fd", type=int)
parser.add_argument("--nice", type=int)
end = socket.socket(fileno=parser.parse_args().fd)
what = os.environ["EDGE_GARBAGE"]


class Garbage(EngineWorker):
    """As it should be until the first job comes; then as told."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        real, misbehave = self._host.submit, self._misbehave

        def submit(number: int, job: object, listener: object) -> None:
            if os.path.exists(os.environ["EDGE_GARBAGE_ONCE"]):
                os.unlink(os.environ["EDGE_GARBAGE_ONCE"])
                misbehave()
            real(number, job, listener)  # type: ignore[arg-type]

        self._host.submit = submit  # type: ignore[method-assign]

    def _misbehave(self) -> None:
        if what == "length":
            end.sendall(struct.pack(">I", 1 << 31) + b"x" * 64)
        elif what == "json":
            end.sendall(struct.pack(">I", 9) + b'{"type":1')
        elif what == "unknown":
            end.sendall(struct.pack(">I", 15) + b'{"type":"nope"}')
        elif what == "stray":  # answers nobody asked for
            self._channel.send(Answer(id=10**9))
        elif what == "hang":
            host = self._host
            session = host._session
            assert session is not None
            session.step = lambda: time.sleep(60)  # type: ignore[assignment,method-assign,return-value]
        elif what == "exit":
            os._exit(7)


assert Submit is not None
if what == "never":
    time.sleep(60)
Garbage(Channel(end, to_worker)).run()
os._exit(0)
