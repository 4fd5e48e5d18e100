"""The wire between a node and its worker: frames of JSON over a Unix socket, read strictly. No pickle.

A frame is its length (4 bytes, big endian, at most MAX_FRAME) and one tagged record.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from typing import Any, TypeVar

import msgspec

from edge_nodes.job import Ended, Job, Progress
from edge_runtime import EdgeError

MAX_FRAME = 8 << 20
_LENGTH = struct.Struct(">I")
R = TypeVar("R")


class ProtocolError(EdgeError):
    """What the other side sent is no message of this protocol."""


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Call(_Message, frozen=True, tag="call"):
    """A method of the engine with its arguments; answered by an Answer of that id."""

    id: int
    method: str
    arguments: list[Any] = []


class Submit(_Message, frozen=True, tag="submit"):
    number: int
    job: Job


class Cancel(_Message, frozen=True, tag="cancel"):
    number: int


class Answer(_Message, frozen=True, tag="answer"):
    """value, or the class name and text of the EdgeError that was raised."""

    id: int
    value: msgspec.Raw = msgspec.Raw(b"null")
    error: str = ""
    why: str = ""


class Beat(_Message, frozen=True, tag="beat"):
    """The worker lives. step_s: how long its running step has been under way; figures: Session.snapshot()."""

    step_s: float
    figures: dict[str, Any] = {}


ToWorker = Call | Submit | Cancel
FromWorker = Answer | Beat | Progress | Ended
to_worker = msgspec.json.Decoder(ToWorker)
from_worker = msgspec.json.Decoder(FromWorker)


class Channel:
    """One end of the socket. Several threads may send, one receives."""

    def __init__(self, end: socket.socket, decoder: msgspec.json.Decoder[R]) -> None:
        self._socket = end
        self._decoder = decoder
        self._sending = threading.Lock()

    def send(self, message: msgspec.Struct) -> None:
        """Raises OSError when the other side is gone, ProtocolError for what no frame can hold."""
        data = msgspec.json.encode(message)
        if len(data) > MAX_FRAME:
            raise ProtocolError(f"a message of {len(data)} bytes, a frame holds {MAX_FRAME}")
        with self._sending:
            self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive(self) -> Any | None:
        """The next message; None when the other side closed between two. Raises ProtocolError, OSError."""
        head = self._exactly(_LENGTH.size, end_allowed=True)
        if head is None:
            return None
        (length,) = _LENGTH.unpack(head)
        if not 0 < length <= MAX_FRAME:
            raise ProtocolError(f"a frame of {length} bytes, expected 1 to {MAX_FRAME}")
        data = self._exactly(length)
        try:
            return self._decoder.decode(data)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(f"a frame is no message: {str(error)[:200]}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # closed by the other side already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _exactly(self, count: int, *, end_allowed: bool = False) -> bytes | None:
        parts, got = [], 0
        while got < count:
            part = self._socket.recv(min(count - got, 1 << 16))
            if not part:
                if end_allowed and not got:
                    return None
                raise ProtocolError(f"the other side closed after {got} of {count} bytes")
            parts.append(part)
            got += len(part)
        return b"".join(parts)
