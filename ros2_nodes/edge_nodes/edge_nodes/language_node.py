"""The language node: any engine behind llama_ros's actions, with deadlines, priorities and schemas."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from std_msgs.msg import String

from edge_nodes.default_engine import cache_folder
from edge_nodes.edge_node import EdgeNode
from edge_nodes.engine import Engine
from edge_nodes.interfaces import HAVE_INTERFACES
from edge_nodes.job import ChatTurn, Ended, Job, Progress
from edge_nodes.qos import qos_profile
from edge_nodes.spinning import spin_node
from edge_nodes.text_topic import Heard, TextTopic
from edge_runtime import BadRequest

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class LanguageNode(EdgeNode):
    """Topics: `prompt` (String) in; `response` (whole) and `partial_response` (pieces) out, also without
    edge_interfaces."""

    def __init__(self, name: str = "language", **options: Any) -> None:
        self._topic: TextTopic | None = None
        self._whole: Any = None
        self._pieces: Any = None
        super().__init__(name, **options)

    def serve(self) -> None:
        if not HAVE_INTERFACES:
            self.get_logger().warning(
                "edge_interfaces is not built: only the topics prompt and response are served"
            )
            return
        from edge_interfaces.action import GenerateChatCompletions, GenerateResponse
        from edge_interfaces.srv import Detokenize, GetMetadata, SavePrefix, Tokenize

        from edge_nodes.answers import ChatAnswer, ResponseAnswer
        from edge_nodes.goal_server import GoalServer
        from edge_nodes.rejections import Rejections
        from edge_nodes.translation import job_of_chat, job_of_response

        rejections = Rejections(self)
        GoalServer(
            self,
            rejections,
            GenerateResponse,
            "generate_response",
            job_of_response,
            lambda handle: ResponseAnswer(),
        )
        GoalServer(
            self,
            rejections,
            GenerateChatCompletions,
            "generate_chat_completions",
            job_of_chat,
            lambda handle: ChatAnswer(self, handle),
        )
        for kind, name, callback in (
            (Tokenize, "tokenize", self._tokenize),
            (Detokenize, "detokenize", self._detokenize),
            (GetMetadata, "get_metadata", self._get_metadata),
            (SavePrefix, "save_prefix", self._save_prefix),
        ):
            self.create_service(kind, name, self.answering(callback), callback_group=self.calls)

    def open_topics(self) -> None:
        profile = qos_profile(self.parameters["output_qos"], self.parameters["output_qos_depth"])
        self._whole = self.create_lifecycle_publisher(String, "response", profile)
        self._pieces = self.create_lifecycle_publisher(String, "partial_response", profile)
        self._topic = TextTopic(self, "prompt", self._job_of_text, self._reply_of)

    def close_topics(self) -> None:
        topic, self._topic = self._topic, None
        if topic is not None:
            topic.close()
        for publisher in (self._whole, self._pieces):
            if publisher is not None:
                self.destroy_lifecycle_publisher(publisher)
        self._whole = self._pieces = None

    def _job_of_text(self, text: str, settings: Mapping[str, Any]) -> Job:
        if not text:
            raise BadRequest("the text is empty")
        chat = self.facts is not None and self.facts.has_chat
        return Job(
            prompt="" if chat else text,
            messages=(ChatTurn(role="user", content=text),) if chat else (),
            max_tokens=settings["context.n_predict"],
            temperature=settings["sampling.temp"],
            top_k=settings["sampling.top_k"],
            top_p=settings["sampling.top_p"],
            min_p=settings["sampling.min_p"],
            repetition_penalty=settings["sampling.penalty_repeat"],
            deadline=settings["deadline.default"] or None,
            speculate=settings["speculative.enabled"],
        )

    def _reply_of(self, heard: Heard) -> _TextReply:
        return _TextReply(self._whole, self._pieces)

    # --- services ---

    def _open_engine(self) -> Engine:
        if self.engine is None or self.facts is None:
            raise BadRequest(f"the node is {self.phase}: no engine is open; configure it first")
        return self.engine

    def _tokenize(self, request: Any, response: Any) -> None:
        response.tokens = self._open_engine().tokenize(request.text)

    def _detokenize(self, request: Any, response: Any) -> None:
        response.text = self._open_engine().detokenize(list(request.tokens))

    def _get_metadata(self, request: Any, response: Any) -> None:
        facts = self._open_engine().facts()
        for name in facts.__struct_fields__:
            value = getattr(facts, name)
            setattr(response, name, list(value) if isinstance(value, tuple) else value)

    def _save_prefix(self, request: Any, response: Any) -> None:
        engine = self._open_engine()
        if not _NAME.fullmatch(request.name):
            raise BadRequest(
                f"name is {request.name!r:.80}, expected letters, digits, '.', '_' and '-' of a file's name, "
                "without a folder: files go into the parameter prefix.folder"
            )
        if bool(request.text) == bool(request.messages):
            raise BadRequest("give either text or messages, the beginning that is to be kept")
        turns = [ChatTurn(role=m.role, content=m.content) for m in request.messages]
        folder = Path(self.parameters["prefix.folder"] or cache_folder() / "prefixes").expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadRequest(f"the folder {folder} of prefix.folder cannot be made: {error}") from error
        path = folder / f"{request.name}.prefix"
        response.tokens = engine.save_prefix(request.text, turns, str(path), request.adapter)
        response.path = str(path)


class _TextReply:
    """Publishes pieces as they come, and the whole in the end."""

    def __init__(self, whole: Any, pieces: Any) -> None:
        self._whole = whole
        self._pieces = pieces
        self._text: list[str] = []

    def add(self, event: Progress) -> None:
        if event.text:
            self._text.append(event.text)
            self._pieces.publish(String(data=event.text))

    def end(self, ended: Ended) -> None:
        if ended.reason in ("stop", "length"):
            self._whole.publish(String(data="".join(self._text)))


def main(args: list[str] | None = None) -> int:
    return spin_node(LanguageNode, args)


if __name__ == "__main__":
    raise SystemExit(main())
