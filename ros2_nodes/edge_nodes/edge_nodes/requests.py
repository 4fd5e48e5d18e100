"""A Job as a request of edge_runtime, which checks its fields."""

from __future__ import annotations

from collections.abc import Sequence

from edge_nodes.job import Job
from edge_runtime import BadRequest, Grammar, Request, Sampling

_GRAMMARS = {"json": Grammar.json_schema, "regex": Grammar.regex, "ebnf": Grammar.ebnf}


def request_of(job: Job, prompt: str | Sequence[int]) -> Request:
    """Raises BadRequest naming the field that is wrong."""
    sampling = Sampling(
        temperature=job.temperature,
        top_k=job.top_k,
        top_p=job.top_p,
        min_p=job.min_p,
        repetition_penalty=job.repetition_penalty,
        frequency_penalty=job.frequency_penalty,
        presence_penalty=job.presence_penalty,
        seed=job.seed,
        logprobs=job.logprobs,
    )
    return Request(
        prompt=prompt,
        sampling=sampling,
        max_tokens=job.max_tokens,
        stop=job.stop,
        ignore_eos=job.ignore_eos,
        continues=not job.messages,
        deadline=job.deadline,
        priority=job.priority,
        grammar=None if job.grammar is None else _GRAMMARS[job.grammar.kind](job.grammar.text),
        adapter=job.adapter,
        speculate=job.speculate,
    )


def check_job(job: Job) -> None:
    """What can be known to be wrong before an engine sees it. Raises BadRequest."""
    if not job.prompt and not job.messages:
        raise BadRequest("the prompt is empty; give at least one character")
    request_of(job, job.prompt or "-")
