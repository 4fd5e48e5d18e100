"""Goals of the language actions to jobs, and a job's events to feedback and results. No thread, no engine.

Functions take messages by duck typing and make new ones from `edge_interfaces`, which is there when they run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from edge_interfaces import msg

from edge_nodes.job import ChatTurn, Ended, Figures, GrammarText, Job, Progress
from edge_runtime import BadRequest, Unsupported

FORMATS = ("", "text", "json_schema", "regex", "ebnf")


def job_of_response(goal: Any, settings: Mapping[str, Any]) -> Job:
    """Of a GenerateResponse goal. Raises BadRequest, Unsupported."""
    if not goal.prompt:
        raise BadRequest("the prompt is empty; give at least one character")
    return Job(prompt=goal.prompt, continues=not goal.reset, keeps=True, **_common(goal, settings))


def job_of_chat(goal: Any, settings: Mapping[str, Any]) -> Job:
    """Of a GenerateChatCompletions goal. Raises BadRequest, Unsupported."""
    if not goal.messages:
        raise BadRequest("messages is empty; give at least one {role, content}")
    turns = tuple(ChatTurn(role=m.role, content=m.content) for m in goal.messages)
    return Job(messages=turns, **_common(goal, settings))


def seconds_of(duration: Any, settings: Mapping[str, Any]) -> float | None:
    """A goal's deadline in seconds, that of the parameter where it names none. Raises BadRequest."""
    seconds = duration.sec + duration.nanosec * 1e-9
    if seconds < 0:
        raise BadRequest(
            f"deadline is {seconds:g} s, expected a duration from now, or 0 for the node's default"
        )
    return float(seconds or settings["deadline.default"]) or None


def sampling_of(config: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a Job from a SamplingConfig, the node's parameters where it is silent."""

    def chosen(value: float, name: str) -> Any:
        if math.isnan(value):
            raise BadRequest(f"sampling_config.{name} is not a number")
        return settings[f"sampling.{name}"] if value < 0 else value

    return {
        "temperature": chosen(config.temp, "temp"),
        "top_k": chosen(config.top_k, "top_k"),
        "top_p": chosen(config.top_p, "top_p"),
        "min_p": chosen(config.min_p, "min_p"),
        "repetition_penalty": chosen(config.penalty_repeat, "penalty_repeat"),
        "frequency_penalty": config.penalty_freq,
        "presence_penalty": config.penalty_present,
        "seed": None if config.seed < 0 else config.seed,
        "logprobs": config.n_probs or None,
        "ignore_eos": config.ignore_eos,
    }


def _common(goal: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    if goal.images:
        raise Unsupported("the goal has images, and this engine has no vision part; send text alone")
    if goal.max_tokens < 0:
        raise BadRequest(
            f"max_tokens is {goal.max_tokens}, expected a positive number, or 0 for the node's default"
        )
    return {
        "max_tokens": goal.max_tokens or settings["context.n_predict"],
        "stop": tuple(goal.stop),
        "deadline": seconds_of(goal.deadline, settings),
        "priority": goal.priority,
        "grammar": _grammar(goal),
        "adapter": goal.adapter or None,
        "speculate": settings["speculative.enabled"],
        **sampling_of(goal.sampling_config, settings),
    }


def _grammar(goal: Any) -> GrammarText | None:
    wanted = goal.response_format
    if wanted not in FORMATS:
        raise BadRequest(
            f"response_format is {wanted!r:.60}, expected one of: {', '.join(map(repr, FORMATS))}"
        )
    if goal.json_schema and wanted not in ("", "json_schema"):
        raise BadRequest(f"json_schema is given, and response_format is {wanted!r}; leave one of them out")
    if wanted == "json_schema" and not goal.json_schema:
        raise BadRequest("response_format is 'json_schema', and json_schema is empty; give the schema")
    if goal.json_schema:
        return GrammarText(kind="json", text=goal.json_schema)
    if wanted not in ("regex", "ebnf"):
        if goal.grammar:
            raise BadRequest("grammar is given; say what it is with response_format 'regex' or 'ebnf'")
        return None
    if not goal.grammar:
        raise BadRequest(f"response_format is {wanted!r}, and grammar is empty; give the {wanted}")
    return GrammarText(kind=wanted, text=goal.grammar)


def partial_of(text: str, tokens: Sequence[int]) -> Any:
    """A PartialResponse message."""
    return msg.PartialResponse(text=text, token=tokens[-1] if tokens else 0, tokens=list(tokens))


def response_of(events: Sequence[Progress]) -> Any:
    """A Response message of all events of a job."""
    probs = [
        msg.TokenProbArray(
            chosen_token=chosen.token,
            data=[msg.TokenProb(token=i, probability=p, token_text=t) for i, p, t in chosen.top],
        )
        for event in events
        for chosen in event.probs
    ]
    tokens = [token for event in events for token in event.tokens]
    return msg.Response(text="".join(event.text for event in events), tokens=tokens, probs=probs)


def usage_of(figures: Figures) -> Any:
    return msg.Usage(
        prompt_tokens=figures.prompt_tokens,
        completion_tokens=figures.completion_tokens,
        total_tokens=figures.prompt_tokens + figures.completion_tokens,
        cached_tokens=figures.cached_tokens,
    )


def timing_of(figures: Figures) -> Any:
    return msg.Timing(
        queue_ms=figures.queue_ms,
        ttft_ms=figures.ttft_ms,
        total_ms=figures.total_ms,
        decode_tokens_per_s=figures.tokens_per_s,
        drafted=figures.drafted,
        accepted=figures.accepted,
        deadline_missed=figures.missed,
    )


def fill_end(result: Any, ended: Ended) -> Any:
    """The fields that every result has: finish_reason, error, usage, timing. Returns the result."""
    result.finish_reason = ended.reason
    result.error = ended.error
    result.usage = usage_of(ended.figures)
    result.timing = timing_of(ended.figures)
    result.timing.deadline_missed |= ended.reason == "deadline"
    return result
