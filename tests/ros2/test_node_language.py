"""The language node over DDS: both actions, the services, the topics, with and without edge_interfaces."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from action_msgs.msg import GoalStatus
from builtin_interfaces.msg import Duration
from edge_interfaces.action import GenerateChatCompletions, GenerateResponse, MakePlan
from edge_interfaces.msg import ChatMessage, Rejection, SamplingConfig
from edge_interfaces.srv import Detokenize, GetMetadata, SavePrefix, Tokenize
from robot import Robot, wait_until
from sensor_msgs.msg import Image
from std_msgs.msg import String

NODE = "/language"
COMMAND = "bring me the red mug from the kitchen"
SUCCEEDED, ABORTED = GoalStatus.STATUS_SUCCEEDED, GoalStatus.STATUS_ABORTED
SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
)


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("prefixes")


@pytest.fixture(scope="module")
def asker(serve: Callable[..., Any], planner_path: Path, prefixes: Path) -> Robot:
    """Who asks the node that all tests share."""
    return serve(
        "edge_nodes.language_node",
        "language",
        engine__path=planner_path,
        feedback__period=0.0,
        prefix__folder=prefixes,
    )[1]


def respond(asker: Robot, **fields: Any) -> Any:
    return asker.send_goal(GenerateResponse, "/generate_response", GenerateResponse.Goal(**fields))


def chat(asker: Robot, text: str = COMMAND, **fields: Any) -> Any:
    goal = GenerateChatCompletions.Goal(messages=[ChatMessage(role="user", content=text)], **fields)
    return asker.send_goal(GenerateChatCompletions, "/generate_chat_completions", goal)


def test_a_response_is_streamed_and_told_whole(asker: Robot) -> None:
    goal = respond(asker, prompt="go to the", max_tokens=6, sampling_config=SamplingConfig(ignore_eos=True))
    status, result = goal.result()
    assert status == SUCCEEDED and result.finish_reason == "length" and result.error == ""
    assert len(result.response.tokens) == result.usage.completion_tokens == 6
    assert result.usage.total_tokens == result.usage.prompt_tokens + 6
    # Feedback is a topic: the last piece may come after the result
    pieces = goal.feedback
    wait_until(lambda: sum(len(f.partial_response.tokens) for f in pieces) == 6, 5.0, "all tokens")
    parts = [f.partial_response for f in pieces]
    assert "".join(p.text for p in parts) == result.response.text
    assert [t for p in parts for t in p.tokens] == list(result.response.tokens)
    assert all(p.token == p.tokens[-1] for p in parts if p.tokens)
    assert 0 < result.timing.ttft_ms <= result.timing.total_ms and result.timing.decode_tokens_per_s > 0
    # greedy: the same again; and its tokens are those of the text
    again = respond(asker, prompt="go to the", max_tokens=6, sampling_config=SamplingConfig(ignore_eos=True))
    assert again.result()[1].response.text == result.response.text
    text = asker.call(Detokenize, "/detokenize", Detokenize.Request(tokens=result.response.tokens))
    assert text.success and text.text == result.response.text


def test_a_response_stops_where_it_is_told(asker: Robot) -> None:
    sampling = SamplingConfig(ignore_eos=True)
    whole = respond(asker, prompt="go to the", max_tokens=30, sampling_config=sampling).result()[1]
    stop = whole.response.text[8:11]
    cut = respond(asker, prompt="go to the", max_tokens=30, stop=[stop], sampling_config=sampling)
    status, result = cut.result()
    assert status == SUCCEEDED and result.finish_reason == "stop"
    assert result.response.text == whole.response.text[: whole.response.text.index(stop)]


def test_a_conversation_goes_on_without_reset(asker: Robot) -> None:
    def usage(**fields: Any) -> Any:
        return (
            respond(asker, max_tokens=4, sampling_config=SamplingConfig(ignore_eos=True), **fields)
            .result()[1]
            .usage
        )

    first = usage(prompt="go to the kitchen")
    second = usage(prompt=" and then", reset=False)
    third = usage(prompt=" and then", reset=True)
    kept = first.prompt_tokens + first.completion_tokens
    assert second.prompt_tokens > kept >= third.prompt_tokens


def test_probabilities_of_tokens(asker: Robot) -> None:
    sampling = SamplingConfig(ignore_eos=True, n_probs=3)
    result = respond(asker, prompt="go to", max_tokens=3, sampling_config=sampling).result()[1]
    assert [p.chosen_token for p in result.response.probs] == list(result.response.tokens)
    for place in result.response.probs:
        chances = [t.probability for t in place.data]
        assert len(chances) == 3 and chances == sorted(chances, reverse=True) and sum(chances) <= 1.001
        assert place.data[0].token == place.chosen_token  # greedy


def test_a_json_schema_is_kept(asker: Robot) -> None:
    status, result = respond(asker, prompt="go", max_tokens=40, json_schema=SCHEMA).result()
    assert status == SUCCEEDED and result.finish_reason in ("stop", "length")
    if result.finish_reason == "stop":
        assert isinstance(json.loads(result.response.text)["n"], int)
    status, result = respond(
        asker, prompt="go", max_tokens=20, response_format="regex", grammar="(yes|no)"
    ).result()
    assert status == SUCCEEDED and result.response.text in ("yes", "no")


def test_a_chat_is_streamed_in_openais_shape(asker: Robot) -> None:
    goal = chat(asker)
    status, result = goal.result()
    assert status == SUCCEEDED and result.finish_reason == "stop" and result.object == "chat.completion"
    assert json.loads(result.choices[0].message.content)[0] == {"skill": "go_to", "place": "kitchen"}
    assert result.choices[0].message.role == "assistant" and result.choices[0].finish_reason == "stop"
    assert result.id.startswith("chatcmpl-") and result.created > 0 and result.model

    def told() -> str:
        return "".join(f.choices[0].delta.content for f in goal.feedback)

    wait_until(lambda: told() == result.choices[0].message.content, 5.0, "the whole content")
    chunks = [f.choices[0].delta for f in goal.feedback]
    assert [c.role for c in chunks] == ["assistant"] + [""] * (len(chunks) - 1)
    assert {f.id for f in goal.feedback} == {result.id} and goal.feedback[0].object == "chat.completion.chunk"
    assert not chat(asker, stream=False).feedback


def test_a_deadline_ends_a_goal_with_what_there_is(asker: Robot) -> None:
    sampling = SamplingConfig(ignore_eos=True)
    goal = respond(
        asker, prompt="go", max_tokens=1000, deadline=Duration(nanosec=40_000_000), sampling_config=sampling
    )
    status, result = goal.result()
    assert status == ABORTED and result.finish_reason == "deadline" and result.timing.deadline_missed
    assert 0 < len(result.response.tokens) < 1000


def test_a_goal_that_would_outlast_its_result_ends_by_a_deadline(
    start_node: Any, robot: Robot, planner_path: Path
) -> None:
    """rclpy forgets a goal after result.timeout, and the result of one that ends later reaches nobody."""
    start_node(
        "slow_node",
        "language",
        engine__path=planner_path,
        worker__enabled=False,
        result__timeout=10,
        test__step=0.2,
    )
    robot.activate(NODE)
    sampling = SamplingConfig(ignore_eos=True)
    goal = respond(robot, prompt="go to", max_tokens=900, sampling_config=sampling)
    status, result = goal.result(timeout=15.0)
    assert status == ABORTED and result.finish_reason == "deadline" and len(result.response.tokens) > 10


def test_a_higher_priority_goes_first(start_node: Any, robot: Robot, planner_path: Path) -> None:
    start_node("edge_nodes.language_node", "language", engine__path=planner_path, context__n_parallel=1)
    robot.activate(NODE)
    sampling = SamplingConfig(ignore_eos=True)
    ends: list[str] = []
    running = respond(robot, prompt="go", max_tokens=1000, sampling_config=sampling)
    low = respond(robot, prompt="go", max_tokens=200, sampling_config=sampling)
    high = respond(robot, prompt="go", max_tokens=200, priority=5, sampling_config=sampling)
    for name, goal in (("high", high), ("low", low)):
        goal._result.add_done_callback(lambda _, n=name: ends.append(n))
    assert {g.result()[0] for g in (running, low, high)} == {SUCCEEDED}
    assert ends == ["high", "low"]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "x", "images": [Image()]}, "no vision part"),
        ({"prompt": "x", "max_tokens": -1}, "max_tokens is -1"),
        ({"prompt": "x", "response_format": "xml"}, "response_format is 'xml'"),
        ({"prompt": "x", "response_format": "json_schema"}, "json_schema is empty"),
        ({"prompt": "x", "json_schema": "{"}, "schema"),
        ({"prompt": "x", "sampling_config": SamplingConfig(temp=float("nan"))}, "not a number"),
    ],
)
def test_a_wrong_goal_is_rejected_with_a_reason(asker: Robot, fields: dict[str, Any], words: str) -> None:
    rejections = asker.subscribe("/language/rejections", Rejection)
    assert respond(asker, prompt="go", max_tokens=1).result()[0] == SUCCEEDED
    assert not respond(asker, **fields).accepted
    told = rejections.wait()[0]
    assert words in told.reason and told.action == "generate_response", told


def test_what_only_the_engine_knows_is_wrong_aborts_with_a_reason(asker: Robot) -> None:
    for fields, words in (
        ({"prompt": "go " * 2000}, "context"),
        ({"prompt": "x", "adapter": "nope"}, "nope"),
    ):
        goal = respond(asker, **fields)
        status, result = goal.result()
        assert status == ABORTED and result.finish_reason == "error" and words in result.error, result.error


def test_services_answer_and_say_why_not(asker: Robot, prefixes: Path) -> None:
    tokens = asker.call(Tokenize, "/tokenize", Tokenize.Request(text=COMMAND))
    assert tokens.success and len(tokens.tokens) > 3
    text = asker.call(Detokenize, "/detokenize", Detokenize.Request(tokens=tokens.tokens))
    assert text.success and text.text == COMMAND
    wrong = asker.call(Detokenize, "/detokenize", Detokenize.Request(tokens=[1 << 30]))
    assert not wrong.success and "no token" in wrong.message
    facts = asker.call(GetMetadata, "/get_metadata")
    assert facts.success and facts.context == 1024 and facts.has_chat and facts.backend == "cpu"
    assert facts.memory_used <= facts.memory_planned and facts.vocabulary > max(tokens.tokens)
    kept = asker.call(SavePrefix, "/save_prefix", SavePrefix.Request(text=COMMAND * 8, name="greeting"))
    assert kept.success and kept.tokens > 0, kept.message
    assert Path(kept.path) == prefixes / "greeting.prefix" and Path(kept.path).is_file()
    for request, words in (
        (SavePrefix.Request(text="x", name="../evil"), "without a folder"),
        (SavePrefix.Request(name="both"), "either text or messages"),
    ):
        refused = asker.call(SavePrefix, "/save_prefix", request)
        assert not refused.success and words in refused.message
    assert asker.change_state(NODE, "deactivate") and asker.change_state(NODE, "cleanup")
    closed = asker.call(Tokenize, "/tokenize", Tokenize.Request(text="x"))
    asker.activate(NODE)
    assert not closed.success and "configure" in closed.message


def test_texts_on_topics(asker: Robot) -> None:
    whole, pieces = asker.subscribe("/response", String), asker.subscribe("/partial_response", String)
    asker.publish("/prompt", String(data=COMMAND))
    answer = whole.wait()[0].data
    assert json.loads(answer)[0] == {"skill": "go_to", "place": "kitchen"}
    assert "".join(m.data for m in pieces.messages) == answer


@pytest.mark.parametrize(
    ("kind", "asked", "answered"),
    [("language", "/prompt", "/response"), ("planner", "/command", "/plan_json")],
)
def test_without_edge_interfaces_the_topics_are_served(
    start_node: Any, robot: Robot, planner_path: Path, kind: str, asked: str, answered: str
) -> None:
    chosen = {"engine__path": planner_path} if kind == "language" else {}
    node = start_node("without_interfaces", kind, words=[kind], **chosen)
    robot.activate(f"/{kind}")
    answers = robot.subscribe(answered, String)
    robot.publish(asked, String(data=COMMAND))
    assert json.loads(answers.wait()[0].data)[0] == {"skill": "go_to", "place": "kitchen"}
    assert "edge_interfaces is not built" in node.said
    with pytest.raises(TimeoutError):
        robot.send_goal(MakePlan, "/make_plan", MakePlan.Goal(command="go"), timeout=0.5)
