"""TextTopic: texts on a topic become jobs, for robots without the action interfaces, and for speech.

A text that waited longer than input.max_age is dropped, and so is an answer that comes later than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from rclpy.callback_groups import MutuallyExclusiveCallbackGroup
from std_msgs.msg import String

from edge_nodes.edge_node import EdgeNode
from edge_nodes.inbox import Inbox
from edge_nodes.job import Ended, Job, Progress
from edge_nodes.jobs import Refusal
from edge_nodes.qos import qos_profile
from edge_runtime import EdgeError


@dataclass(frozen=True, slots=True)
class Heard:
    """A text, the node's time when it came (a Time message), and the monotonic one."""

    text: str
    stamp: Any
    at: float


class Reply(Protocol):
    """What becomes of one text's events. Called on a thread of the engine."""

    def add(self, event: Progress) -> None: ...

    def end(self, ended: Ended) -> None:
        """Publish the answer. Not called for one that is too old."""


class TextTopic:
    """job_of(text, settings): the job of a text, raising EdgeErrors. reply_of(heard): its Reply."""

    def __init__(
        self,
        node: EdgeNode,
        topic: str,
        job_of: Callable[[str, Mapping[str, Any]], Job],
        reply_of: Callable[[Heard], Reply],
    ) -> None:
        self._node = node
        self._topic = topic
        self._job_of = job_of
        self._reply_of = reply_of
        self.late = 0  # answers that were not published
        settings = node.parameters.snapshot
        self.inbox: Inbox[Heard] = Inbox(settings["input.depth"], self._serve, self._max_age)
        self._subscription = node.create_subscription(
            String,
            topic,
            node.guarded(self._on_text),
            qos_profile(settings["input_qos"], settings["input_qos_depth"]),
            callback_group=MutuallyExclusiveCallbackGroup(),
        )

    def close(self) -> None:
        self._node.destroy_subscription(self._subscription)
        self.inbox.close()

    def _max_age(self) -> float | None:
        return self._node.parameters["input.max_age"] or None

    def _on_text(self, message: Any) -> None:
        if self._node.phase != "active":
            return  # a topic has no way to refuse; the diagnostics tell the state
        self.inbox.put(Heard(message.data, self._node.get_clock().now().to_msg(), time.monotonic()))

    def _serve(self, heard: Heard, done: Callable[[], None]) -> None:
        """One text at a time is under way; `done` lets the next one come."""
        try:
            settings = self._node.parameters.snapshot
            jobs = self._node.check_accepting()
            job = self._job_of(heard.text, settings)
            reply = self._reply_of(heard)
            jobs.start(
                job,
                self._node.guarded(reply.add),
                lambda ended: self._end(heard, reply, ended, done),
            )
        except (Refusal, EdgeError) as error:
            self._node.get_logger().warning(f"a text on {self._topic} is not answered: {error}")
            done()
        except Exception as error:
            self._node.unexpected(f"a text on {self._topic}", error)
            done()

    def _end(self, heard: Heard, reply: Reply, ended: Ended, done: Callable[[], None]) -> None:
        try:
            limit = self._max_age()
            if limit is not None and time.monotonic() - heard.at > limit:
                self.late += 1
                self._node.get_logger().warning(f"an answer to {self._topic} came after {limit:g} s: dropped")
            else:
                reply.end(ended)
        except Exception as error:
            self._node.unexpected(f"an answer to {self._topic}", error)
        finally:
            done()
