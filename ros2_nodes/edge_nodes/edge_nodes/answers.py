"""Answers of the language actions: events to feedback and result."""

from __future__ import annotations

from typing import Any

from edge_interfaces import msg
from edge_interfaces.action import GenerateChatCompletions, GenerateResponse

from edge_nodes.edge_node import EdgeNode
from edge_nodes.job import Ended, Progress
from edge_nodes.translation import fill_end, partial_of, response_of


class _Pieces:
    """Events of a goal, and those that no feedback has told yet."""

    def __init__(self) -> None:
        self.events: list[Progress] = []
        self._told = 0

    def add(self, event: Progress) -> None:
        self.events.append(event)

    def untold(self) -> list[Progress]:
        new = self.events[self._told :]
        self._told = len(self.events)
        return new


class ResponseAnswer(_Pieces):
    """Of generate_response."""

    def feedback(self) -> Any | None:
        new = self.untold()
        if not new:
            return None
        partial = partial_of("".join(e.text for e in new), [t for e in new for t in e.tokens])
        return GenerateResponse.Feedback(partial_response=partial)

    def end(self, ended: Ended) -> tuple[Any, bool]:
        result = GenerateResponse.Result(response=response_of(self.events))
        return fill_end(result, ended), ended.reason in ("stop", "length")


class ChatAnswer(_Pieces):
    """Of generate_chat_completions, in OpenAI's shape."""

    def __init__(self, node: EdgeNode, handle: Any) -> None:
        super().__init__()
        facts = node.facts
        self._stream = handle.request.stream
        self._head = {
            "id": "chatcmpl-" + bytes(handle.goal_id.uuid).hex(),
            "created": node.get_clock().now().to_msg().sec,
            "model": "" if facts is None else facts.name,
            "system_fingerprint": "" if facts is None else facts.digest,
        }
        self._begun = False

    def feedback(self) -> Any | None:
        new = self.untold() if self._stream else []
        if not new:
            return None
        delta = msg.ChatMessage(role="" if self._begun else "assistant", content="".join(e.text for e in new))
        self._begun = True
        chunk = msg.ChatChoiceChunk(index=0, delta=delta)
        return GenerateChatCompletions.Feedback(object="chat.completion.chunk", choices=[chunk], **self._head)

    def end(self, ended: Ended) -> tuple[Any, bool]:
        message = msg.ChatMessage(role="assistant", content="".join(e.text for e in self.events))
        choice = msg.ChatChoice(index=0, message=message, finish_reason=ended.reason)
        result = GenerateChatCompletions.Result(object="chat.completion", choices=[choice], **self._head)
        return fill_end(result, ended), ended.reason in ("stop", "length")
