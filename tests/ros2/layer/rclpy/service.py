"""Services: a request topic in, a reply topic out, with the header of rmw_cyclonedds before the fields."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from typing import Any

from rclpy.impl import dds

HEADER = struct.Struct("<Qq")  # the client's guid, its sequence number
DISCOVERY = 1.0  # s that a reply waits for its reader to be known


class RequestId:
    """Whom to answer."""

    def __init__(self, guid: int, sequence: int, participant: Any) -> None:
        self.guid = guid
        self.sequence = sequence
        self.participant = participant


class Service:
    def __init__(
        self, node: Any, srv_type: Any, name: str, callback: Callable[[Any, Any], Any], group: Any, qos: Any
    ) -> None:
        self.srv_type = srv_type
        self.srv_name = name
        self.callback = callback
        self.callback_group = group
        base = dds.dds_name(srv_type._type_name)
        owner = f"serviceid={node.context.next_id()};".encode()
        participant, policies = node.context.participant, dds.policies(qos, owner)
        self._writer = dds.Writer(participant, f"rr{name}Reply", f"{base}Response_", policies)
        self._reader = dds.Reader(participant, f"rq{name}Request", f"{base}Request_", policies, node.wake)
        self._known: set[Any] = set()

    @property
    def service_name(self) -> str:
        return self.srv_name

    @property
    def ready(self) -> bool:
        return self._reader.ready

    def take_request(self) -> tuple[RequestId, Any] | None:
        found = self._reader.take()
        if found is None:
            return None
        data, writer = found
        guid, sequence = HEADER.unpack_from(data, 4)
        request = self.srv_type.Request._codec.decode(data, skip=HEADER.size)
        return RequestId(guid, sequence, self._reader.participant_of(writer)), request

    def take(self) -> Callable[[], Any] | None:
        found = self.take_request()
        if found is None:
            return None
        asker, request = found

        def call() -> None:
            self.send_response(self.callback(request, self.srv_type.Response()), asker)

        return call

    def send_response(self, response: Any, asker: RequestId) -> None:
        if not isinstance(response, self.srv_type.Response):
            raise TypeError(f"the service {self.srv_name} answered {type(response)}")
        due = time.monotonic() + DISCOVERY
        while asker.participant not in self._known and time.monotonic() < due:
            self._known = set(self._writer.readers())  # else the reply would find nobody
            if asker.participant not in self._known:
                time.sleep(0.001)
        self._writer.write(
            self.srv_type.Response._codec.encode(response, HEADER.pack(asker.guid, asker.sequence))
        )

    def destroy(self) -> None:
        self._reader.close()
        self._writer.close()
