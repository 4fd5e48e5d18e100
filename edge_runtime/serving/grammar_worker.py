"""The process that proves grammars. llguidance's limits end most hostile grammars, but not all: intersected
patterns take time without end, and a long chain of rules overflows the stack, which kills a process. So a
grammar compiles here first, where limits hold. Run as a file; reads and writes one JSON object a line.
Imports only the standard library and llguidance.
"""

from __future__ import annotations

import json
import resource
import sys
import threading
from typing import Any

MEMORY_BYTES = 192 << 20  # of one grammar, beyond what interpreter and tokenizer hold
STACK_BYTES = 1 << 20  # less than any thread of the runtime has, so that what passes here passes there
_WALK = 4  # tokens: an automaton that is too large shows itself in its first states


def main() -> None:
    sys.path.pop(0)  # this folder: its modules are not to be found by their bare names
    setup = json.loads(sys.stdin.readline())
    try:
        import llguidance
    except ImportError:
        _say({"missing": "llguidance"})
        return
    try:
        tokenizer = llguidance.LLTokenizer(setup["tokenizer"], eos_token=setup["end"])
        limits = llguidance.LLParserLimits(**setup["limits"])
        most = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _say({"ready": True})
    except BaseException as error:
        _say({"error": _text(error)})
        return
    for line in sys.stdin:
        try:
            text = _converted(**json.loads(line))
            why = _prove(text, tokenizer, limits)
            _say({"error": why} if why else {"grammar": text})
        except BaseException as error:  # the library's panics are no Exception
            _say({"error": _text(error)})


def _converted(kind: str, text: str, options: dict[str, Any]) -> str:
    """The grammar in llguidance's own form."""
    import llguidance

    if kind == "json":
        return llguidance.LLMatcher.grammar_from_json_schema(text, overrides=options)  # type: ignore[arg-type]
    if kind == "regex":
        return llguidance.LLMatcher.grammar_from_regex(text)
    return llguidance.grammar_from("ebnf", text)


def _prove(text: str, tokenizer: Any, limits: Any) -> str:
    """Why the grammar cannot be used, "" when it can."""
    import llguidance

    matcher = llguidance.LLMatcher(tokenizer, text, log_level=0, limits=limits)
    for _ in range(_WALK):
        if matcher.is_stopped():
            break
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_stopped() or not mask:
            break
        token = (mask & -mask).bit_length() - 1
        if not matcher.consume_token(token):
            break
    return matcher.get_error() if matcher.is_error() else ""


def _text(error: BaseException) -> str:
    return str(error).strip() or type(error).__name__


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
