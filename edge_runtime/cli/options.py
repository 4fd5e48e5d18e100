"""Options that edge-run and edge-bench share: how to open an engine, how to sample."""

from __future__ import annotations

import argparse
import re
from typing import Any

from edge_runtime.cli.output import Parser
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.plan import DRAFT_LENGTH
from edge_runtime.errors import BadConfig
from edge_runtime.serving.guessing import AUTO, WAYS
from edge_runtime.serving.open import open_engine
from edge_runtime.serving.sampling import Sampling
from edge_runtime.serving.session import Session

_SIZE = re.compile(r"([0-9]{1,12})\s*(B|KiB|MiB|GiB)?")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def add_open_options(parser: Parser) -> None:
    """--backend, --threads, --kv, --context, --speculate, --draft-length, --memory-limit, --no-verify."""
    add = parser.add_argument_group("engine").add_argument
    add("--backend", default="auto", metavar="NAME", help="auto (as planned), cpu, reference [auto]")
    add("--threads", type=integer, default=0, metavar="N", help="threads of the backend [all cores]")
    add("--kv", metavar="FORMAT", help=f"{', '.join(K_FORMATS)} (c: K per channel), or K,V [as planned]")
    add("--context", type=integer, metavar="N", help="longest sequence, at most the planned one [as planned]")
    add(
        "--speculate",
        default=AUTO,
        metavar="WAY",
        help=f"guess ahead: {', '.join(WAYS)}, or auto: what the engine has parts for [auto]",
    )
    add("--draft-length", type=integer, metavar="N", help=f"tokens guessed ahead at most [{DRAFT_LENGTH}]")
    add("--memory-limit", metavar="SIZE", help="bytes it may take, such as 512MiB [what is free]")
    add("--no-verify", action="store_true", help="do not check the digests of the file's data")


def open_with(args: argparse.Namespace, **more: Any) -> Session:
    """Open args.engine as the options say; `more`: other arguments of open_engine, whose errors come."""
    return open_engine(
        args.engine,
        backend=args.backend,
        threads=args.threads,
        kv=args.kv,
        context=args.context,
        speculate=args.speculate,
        draft_length=args.draft_length,
        verify=not args.no_verify,
        memory_limit=None if args.memory_limit is None else _nbytes(args.memory_limit),
        **more,
    )


def add_sampling_options(parser: Parser) -> None:
    """One option for each field of Sampling; the default is greedy."""
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=number, default=0.0, metavar="T", help="0 = greedy [0]")
    add("--top-k", type=integer, default=0, metavar="K", help="keep the K likeliest tokens [0 = all]")
    add("--top-p", type=number, default=1.0, metavar="P", help="keep the fewest that reach P [1 = all]")
    add("--min-p", type=number, default=0.0, metavar="P", help="keep those above P times the top [0]")
    add("--repetition-penalty", type=number, default=1.0, metavar="X", help="above 1 repeats less [1]")
    add("--frequency-penalty", type=number, default=0.0, metavar="X", help="-2 to 2, for each use [0]")
    add("--presence-penalty", type=number, default=0.0, metavar="X", help="-2 to 2, once used [0]")
    add("--seed", type=integer, metavar="N", help="same seed, same text [fresh]")
    add("--logprobs", type=integer, metavar="N", help="log probabilities of the N likeliest, in --json")


def sampling_of(args: argparse.Namespace) -> Sampling:
    """Raises BadRequest naming the option whose value is not valid."""
    return Sampling(
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        seed=args.seed,
        logprobs=args.logprobs,
    )


def integer(text: str) -> int:
    """An argparse type; a mistake becomes BadConfig, with what the option was given."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not an integer") from None


def number(text: str) -> float:
    """An argparse type: see `integer`."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r:.60} is not a number") from None


def _nbytes(text: str) -> int:
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadConfig(f"--memory-limit {text!r:.60}: expected bytes or a size such as 512MiB")
    return int(match[1]) * _UNITS[match[2] or "B"]
