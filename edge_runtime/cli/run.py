"""edge-run: text from an engine, streamed; without a prompt a chat."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from edge_runtime.cli.options import (
    add_open_options,
    add_sampling_options,
    integer,
    number,
    open_with,
    sampling_of,
)
from edge_runtime.cli.output import Answer, Parser, profiles_answer, progress, run_command, size
from edge_runtime.errors import BadConfig, EdgeError, NumericError
from edge_runtime.serving.grammar import Grammar
from edge_runtime.serving.request import DEFAULT_MAX_TOKENS, Completion, Request
from edge_runtime.serving.sampling import Sampling
from edge_runtime.serving.session import Session

EXAMPLES = (
    'edge-run model.edge "Once upon a time"',
    'edge-run model.edge "bring me the red mug" --system "You plan robot skills." --max-tokens 64',
    "edge-run model.edge --temperature 0.7 --top-p 0.9                   (a chat)",
    'edge-run orin.edge "hello" --backend cpu --json                     (try it on a laptop)',
    'edge-run planner.edge "follow Anna" --json-schema plan.schema.json --deadline 0.5 --speculate draft',
    "edge-run model.edge --verify                                        (known answer)",
)
_HELP = "/reset forgets the conversation, /quit or end of input ends"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of edge-run; returns the exit code."""
    return run_command(make_parser(), run, argv)


def make_parser() -> Parser:
    parser = Parser("edge-run", "Generate text with an engine, or chat with it.", EXAMPLES)
    add = parser.add_argument
    add("engine", nargs="?", metavar="ENGINE", help="engine file (.edge)")
    add("prompt", nargs="?", metavar="PROMPT", help="without one: a chat on the terminal")
    add("--verify", action="store_true", help="repeat the engine's known answer first; alone, only that")
    add("--profiles", action="store_true", help="list the devices and stop")
    answer = parser.add_argument_group("answer")
    add = answer.add_argument
    add("--max-tokens", type=integer, default=DEFAULT_MAX_TOKENS, metavar="N", help="longest answer [256]")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this text (repeatable)")
    add("--stop-id", action="append", default=[], type=integer, metavar="ID", help="end at this token")
    add("--ignore-eos", action="store_true", help="go on after the model's end token")
    add("--deadline", type=number, metavar="SECONDS", help="end in time with what there is")
    add("--priority", type=integer, default=0, metavar="N", help="higher goes first [0]")
    add("--lora", metavar="NAME", help="adapter of the engine, or NAME=FOLDER of PEFT")
    add("--prefix", type=Path, metavar="FILE", help="saved prefix [ENGINE.prefix beside the engine, if any]")
    form = answer.add_mutually_exclusive_group()
    form.add_argument("--json-schema", type=Path, metavar="FILE", help="the answer is JSON of this schema")
    form.add_argument("--regex", metavar="PATTERN", help="the answer matches this pattern, whole")
    form.add_argument("--ebnf", type=Path, metavar="FILE", help="the answer follows this grammar")
    mode = answer.add_mutually_exclusive_group()
    mode.add_argument(
        "--chat", action="store_true", default=None, help="PROMPT is a user's turn [if there is a template]"
    )
    mode.add_argument(
        "--raw", "--no-chat", dest="chat", action="store_false", help="PROMPT is text to continue as it is"
    )
    add("--system", metavar="TEXT", help="system message of the chat")
    add_sampling_options(parser)
    add_open_options(parser)
    return parser


def run(args: argparse.Namespace) -> Answer:
    """Open, answer or chat, report."""
    if args.profiles:
        return profiles_answer()
    if args.engine is None:
        raise BadConfig("which engine file? (see edge-run --help)")
    if args.prompt is None and args.json and not args.verify:
        raise BadConfig("--json needs a PROMPT: a chat has no single answer")
    sampling = sampling_of(args)  # a bad value should not wait for a large engine to load
    args.grammar = _grammar(args)
    name, folder = _lora(args.lora)
    args.adapter = name
    adapters = {} if name is None or folder is None else {name: folder}
    with open_with(args, adapters=adapters, prefix=args.prefix) as session:
        for notice in session.notices:
            progress(f"note: {notice}")
        if args.verify:
            session.verify()
            progress("known answer: repeated")
            if args.prompt is None:
                return Answer({"verified": True, "backend": session.backend, "memory": _memory(session)})
        if args.prompt is None:
            return _converse(session, sampling, args)
        return _answer(session, sampling, args)


def _answer(session: Session, sampling: Sampling, args: argparse.Namespace) -> Answer:
    as_chat = session.has_chat if args.chat is None else args.chat
    if as_chat:
        turn = {"role": "user", "content": args.prompt}
        request = session.chat_request([*_system(args), turn], sampling, **_options(args))
    elif args.system is not None:
        raise BadConfig("--system needs a chat; this engine has no chat template, or --raw was given")
    else:
        request = Request(prompt=args.prompt, sampling=sampling, **_options(args))
    done = _print(session, request, quiet=args.json)
    progress(_timings(session, done))
    data = {
        "text": done.text,
        "tokens": list(done.tokens),
        "finish_reason": done.finish_reason,
        "timing": msgspec.to_builtins(done.timing),
        "usage": msgspec.to_builtins(done.usage),
        "speculation": {
            "way": session.speculate,
            "drafted": done.usage.drafted,
            "accepted": done.usage.accepted,
        },
        "memory": _memory(session),
        "backend": session.backend,
        "kv": {"k": session.kv.k, "v": session.kv.v},
        "notices": list(session.notices),
    }
    if sampling.logprobs is not None:
        data["logprobs"] = list(done.logprobs)
        data["top_logprobs"] = [dict(top) for top in done.top_logprobs]
    return Answer(data, error=NumericError(done.error or "") if done.finish_reason == "error" else None)


def _converse(session: Session, sampling: Sampling, args: argparse.Namespace) -> Answer:
    """Turns read from the terminal until end of input. An answer that fails does not end the chat."""
    if args.chat is False:
        raise BadConfig("--raw needs a PROMPT; without one edge-run is a chat")
    session.chat_prompt([{"role": "user", "content": "hello"}])  # no template: say so before the first turn
    if sys.stdin.isatty():
        import readline  # noqa: F401  (line editing and history for input())

        progress(_HELP)
    history: list[Mapping[str, str]] = _system(args)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return Answer({"turns": sum(m["role"] == "user" for m in history)})
        except UnicodeDecodeError as error:
            progress(f"error: that line is not UTF-8 text: {error.reason}")
            continue
        if line.strip() == "/quit":
            return Answer({"turns": sum(m["role"] == "user" for m in history)})
        if line.strip() == "/reset":
            history = _system(args)
        elif line.strip():
            history = _turn(session, sampling, args, [*history, {"role": "user", "content": line}])


def _turn(
    session: Session, sampling: Sampling, args: argparse.Namespace, messages: list[Mapping[str, str]]
) -> list[Mapping[str, str]]:
    """Answer the last message; returns the conversation to go on from."""
    try:
        done = _print(session, session.chat_request(messages, sampling, **_options(args)))
    except EdgeError as error:
        progress(f"error: {error}")
        return messages[:-1]
    progress(_timings(session, done))
    return [*messages, {"role": "assistant", "content": done.text}]


def _print(session: Session, request: Request, quiet: bool = False) -> Completion:
    """Stream the answer to stdout; an interrupt ends the answer, not the program, once text has come."""

    def show(text: str) -> None:
        if not quiet:
            print(_visible(text), end="", flush=True)

    done = session.answer(request, show)
    if not quiet:
        print(flush=True)
    return done


def _system(args: argparse.Namespace) -> list[Mapping[str, str]]:
    return [] if args.system is None else [{"role": "system", "content": args.system}]


def _options(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "max_tokens": args.max_tokens,
        "stop": args.stop,
        "stop_ids": args.stop_id,
        "ignore_eos": args.ignore_eos,
        "deadline": args.deadline,
        "priority": args.priority,
        "grammar": args.grammar,
        "adapter": args.adapter,
    }


def _grammar(args: argparse.Namespace) -> Grammar | None:
    """Raises BadConfig for a file that cannot be read, BadRequest for a grammar that is none."""
    if args.json_schema is not None:
        return Grammar.json_schema(_text(args.json_schema, "--json-schema"))
    if args.ebnf is not None:
        return Grammar.ebnf(_text(args.ebnf, "--ebnf"))
    return None if args.regex is None else Grammar.regex(args.regex)


def _text(path: Path, option: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise BadConfig(f"{option} {path}: {why}") from None


def _lora(text: str | None) -> tuple[str | None, str | None]:
    """(name, folder) of NAME or NAME=FOLDER."""
    if text is None:
        return None, None
    name, equals, folder = text.partition("=")
    if not name or (equals and not folder):
        raise BadConfig(f"--lora {text!r:.60}: expected NAME, or NAME=FOLDER")
    return name, folder or None


def _timings(session: Session, done: Completion) -> str:
    t, usage = done.timing, done.usage
    guesses = f"{usage.accepted} of {usage.drafted} guesses stood · " if usage.drafted else ""
    ended = f"ended by {done.finish_reason} · " if done.finish_reason in ("deadline", "cancelled") else ""
    return (
        f"{ended}first token {t.ttft_ms:.1f} ms · {t.tokens_per_s:.1f} tokens/s · {guesses}"
        f"memory planned {size(session.memory.need)}, used {size(session.memory_used)}"
    )


def _memory(session: Session) -> dict[str, int]:
    return {"planned_bytes": session.memory.need, "used_bytes": session.memory_used}


def _visible(text: str) -> str:
    """A model's words must not drive a terminal: control characters are spelled out."""
    return "".join(
        c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text
    )


if __name__ == "__main__":
    sys.exit(main())
