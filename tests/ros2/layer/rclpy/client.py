"""Clients of services."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

from rclpy.impl import dds
from rclpy.service import HEADER
from rclpy.task import Future


class Client:
    def __init__(self, node: Any, srv_type: Any, name: str, group: Any, qos: Any) -> None:
        self.srv_type = srv_type
        self.srv_name = name
        self.callback_group = group
        self._node = node
        base = dds.dds_name(srv_type._type_name)
        owner = f"clientid={node.context.next_id()};".encode()
        participant, policies = node.context.participant, dds.policies(qos, owner)
        self._reader = dds.Reader(participant, f"rr{name}Reply", f"{base}Response_", policies, node.wake)
        self._writer = dds.Writer(participant, f"rq{name}Request", f"{base}Request_", policies)
        self._guid = self._writer.handle
        self._sequence = itertools.count(1)
        self._pending: dict[int, Future] = {}
        self._lock = threading.Lock()

    def service_is_ready(self) -> bool:
        return bool(self._writer.readers()) and self._reader.writers() > 0

    def wait_for_service(self, timeout_sec: float | None = None) -> bool:
        due = None if timeout_sec is None else time.monotonic() + timeout_sec
        while not self.service_is_ready():
            if due is not None and time.monotonic() > due:
                return False
            time.sleep(0.005)
        return True

    def call_async(self, request: Any) -> Future:
        if not isinstance(request, self.srv_type.Request):
            raise TypeError(f"Expected {self.srv_type.Request}, got {type(request)}")
        future = Future(executor=self._node.executor)
        with self._lock:
            number = next(self._sequence)
            self._pending[number] = future
        self._writer.write(self.srv_type.Request._codec.encode(request, HEADER.pack(self._guid, number)))
        return future

    def remove_pending_request(self, future: Future) -> None:
        with self._lock:
            self._pending = {n: f for n, f in self._pending.items() if f is not future}

    @property
    def ready(self) -> bool:
        return self._reader.ready

    def take(self) -> Callable[[], Any] | None:
        found = self._reader.take()
        if found is None:
            return None
        data, _ = found
        guid, number = HEADER.unpack_from(data, 4)
        if guid != self._guid:
            return None
        with self._lock:
            future = self._pending.pop(number, None)
        if future is None:
            return None
        response = self.srv_type.Response._codec.decode(data, skip=HEADER.size)
        return lambda: future.set_result(response)

    def destroy(self) -> None:
        self._reader.close()
        self._writer.close()
