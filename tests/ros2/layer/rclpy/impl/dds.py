"""Bytes over DDS by the wire rules of rmw_cyclonedds, on the `cyclonedds` wheel.

Samples are CDR as it stands; the types that Cyclone is told have the right name and no content, since real
endpoints match by name as well.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from typing import Any

LOOPBACK = (
    '<CycloneDDS><Domain><General><Interfaces><NetworkInterface name="lo"/></Interfaces>'
    "<AllowMulticast>false</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex>"
    "<MaxAutoParticipantIndex>60</MaxAutoParticipantIndex>"
    '<Peers><Peer Address="127.0.0.1"/></Peers></Discovery>'
    "<Internal><WriterLingerDuration>100 ms</WriterLingerDuration></Internal></Domain></CycloneDDS>"
)
os.environ.setdefault("CYCLONEDDS_URI", LOOPBACK)

from cyclonedds.core import Listener, Policy, Qos  # noqa: E402
from cyclonedds.domain import DomainParticipant  # noqa: E402
from cyclonedds.idl import make_idl_struct  # noqa: E402
from cyclonedds.idl.annotations import final  # noqa: E402
from cyclonedds.idl.types import uint8  # noqa: E402
from cyclonedds.pub import DataWriter  # noqa: E402
from cyclonedds.sub import DataReader  # noqa: E402
from cyclonedds.topic import Topic  # noqa: E402

BATCH = 16  # samples of a take, for which the wheel allocates half a kilobyte each, present or not
BLOCKING = 100_000_000  # ns that a reliable write may wait


@functools.cache
def raw_type(name: str) -> Any:
    """A DDS type of that name whose samples are CDR bytes, header included."""
    cls = final(make_idl_struct("Raw", name, {"raw": uint8}, dataclassify=False))

    def init(self: Any, data: bytes) -> None:
        self.data = data

    cls.__init__ = init
    cls.serialize = lambda self, **_: self.data
    cls.deserialize = classmethod(lambda kind, data, **_: kind(bytes(data)))
    cls.deserialize_key = classmethod(lambda kind, data, **_: None)  # of a writer that left
    return cls


def dds_name(ros_name: str) -> str:
    """pkg/msg/Name to pkg::msg::dds_::Name_."""
    package, kind, name = ros_name.split("/")
    return f"{package}::{kind}::dds_::{name}_"


def policies(profile: Any, user_data: bytes = b"") -> Qos:
    """DDS QoS of a QoSProfile."""
    reliable = profile.reliability.name != "BEST_EFFORT"
    chosen = [
        Policy.Reliability.Reliable(BLOCKING) if reliable else Policy.Reliability.BestEffort,
        Policy.Durability.TransientLocal
        if profile.durability.name == "TRANSIENT_LOCAL"
        else Policy.Durability.Volatile,
        Policy.History.KeepAll
        if profile.history.name == "KEEP_ALL"
        else Policy.History.KeepLast(max(1, profile.depth)),
        Policy.DataRepresentation(use_cdrv0_representation=True),
    ]
    if user_data:
        chosen.append(Policy.Userdata(user_data))
    return Qos(*chosen)


class Participant:
    """One a context, as rmw_cyclonedds has; topics are shared by their endpoints."""

    def __init__(self, domain: int) -> None:
        self.entity = DomainParticipant(domain, Qos(Policy.Userdata(b"enclave=/;")))
        self._topics: dict[tuple[str, str], list[Any]] = {}  # [topic, users]
        self._lock = threading.Lock()

    def topic(self, name: str, type_name: str) -> Any:
        with self._lock:
            entry = self._topics.get((name, type_name))
            if entry is None:
                entry = self._topics[name, type_name] = [Topic(self.entity, name, raw_type(type_name)), 0]
            entry[1] += 1
            return entry[0]

    def leave(self, name: str, type_name: str) -> None:
        with self._lock:
            entry = self._topics[name, type_name]
            entry[1] -= 1
            if not entry[1]:
                del self._topics[name, type_name]


class Writer:
    def __init__(self, participant: Participant, topic: str, type_name: str, qos: Qos) -> None:
        self._where = (participant, topic, type_name)
        self._type = raw_type(type_name)
        self.entity = DataWriter(participant.entity, participant.topic(topic, type_name), qos=qos)
        self._closing = threading.Lock()

    def write(self, data: bytes) -> None:
        with self._closing:
            if self.entity is not None:
                self.entity.write(self._type(data))

    @property
    def handle(self) -> int:
        """The endpoint's number, unsigned."""
        return self.entity.get_instance_handle() & (2**64 - 1)

    def readers(self) -> list[Any]:
        """Participants of the readers that listen."""
        with self._closing:
            if self.entity is None:
                return []
            found = []
            for handle in self.entity.get_matched_subscriptions():
                data = self.entity.get_matched_subscription_data(handle)
                if data is not None:
                    found.append(data.participant_key)
            return found

    def close(self) -> None:
        with self._closing:
            entity, self.entity = self.entity, None
        if entity is not None:
            participant, topic, type_name = self._where
            del entity
            participant.leave(topic, type_name)


class _Heard(Listener):
    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._wake = wake

    def on_data_available(self, reader: Any) -> None:
        self._wake()


class Reader:
    """wake: called on a DDS thread whenever samples came."""

    def __init__(
        self, participant: Participant, topic: str, type_name: str, qos: Qos, wake: Callable[[], None]
    ) -> None:
        self._where = (participant, topic, type_name)
        self._lock = threading.Lock()
        self._waiting: list[tuple[bytes, int]] = []
        self._came = False
        self._owners: dict[int, Any] = {}  # of writers: asking cyclonedds each time takes longer than a reply

        def heard() -> None:
            self._came = True
            wake()

        self._listener = _Heard(heard)
        self.entity = DataReader(
            participant.entity, participant.topic(topic, type_name), qos=qos, listener=self._listener
        )

    @property
    def ready(self) -> bool:
        if not self._waiting and self._came:
            self._fetch()
        return bool(self._waiting)

    def take(self) -> tuple[bytes, int] | None:
        """The oldest sample and the handle of its writer."""
        with self._lock:
            return self._waiting.pop(0) if self._waiting else None

    def writers(self) -> int:
        entity = self.entity
        return 0 if entity is None else len(entity.get_matched_publications())

    def participant_of(self, writer: int) -> Any:
        if writer not in self._owners:
            data = self.entity.get_matched_publication_data(writer)
            if data is None:
                return None
            self._owners[writer] = data.participant_key
        return self._owners[writer]

    def close(self) -> None:
        with self._lock:
            entity, self.entity = self.entity, None
            self._waiting.clear()
        if entity is not None:
            entity.set_listener(None)
            participant, topic, type_name = self._where
            del entity
            participant.leave(topic, type_name)

    def _fetch(self) -> None:
        with self._lock:
            self._came = False  # before the take: what comes after it is heard again
            if self.entity is None:
                return
            more = True
            while more:
                samples = self.entity.take(BATCH)
                more = len(samples) == BATCH
                for sample in samples:
                    if hasattr(sample, "data"):  # else an InvalidSample: a writer that left
                        self._waiting.append((sample.data, sample.sample_info.publication_handle))
