"""One manner for all commands: options, exit codes, --json, tables.

Exit codes: 0 done, 1 bad input, 2 does not fit, 3 a quality limit is broken, 130 interrupted, 143 terminated.
With --json exactly one object goes to stdout, also when the command fails; progress and errors go to stderr.

    def main(argv: Sequence[str] | None = None) -> int:
        return run_command(make_parser(), run, argv)      # run(args: Namespace) -> Answer
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import monotonic
from typing import Any, NoReturn, TextIO

import msgspec

from edge_runtime.cli.termination import terminable
from edge_runtime.engine.profile import Profile, list_profiles
from edge_runtime.errors import BadConfig, EdgeError, nearest

INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, + SIGTERM, as shells have it
_BAR = 24  # characters of a progress bar


@dataclass(frozen=True, slots=True)
class Answer:
    """What a command found: `data` for --json, `text` for people ("" when it was printed on the way).

    `error` is for a result that is complete and still a failure, such as a broken quality limit.
    """

    data: Any
    text: str = ""
    error: EdgeError | None = None


class Parser(argparse.ArgumentParser):
    """argparse whose mistakes are BadConfig (exit code 1, not argparse's 2) and name the nearest option."""

    def __init__(self, prog: str, description: str, examples: Sequence[str]) -> None:
        """`examples` are whole command lines, shown by --help. Adds --json."""
        shown = "examples:\n" + "\n".join(f"  {line}" for line in examples)
        codes = "exit codes: 0 done, 1 bad input, 2 does not fit, 3 quality limit broken"
        super().__init__(
            prog=prog,
            description=description,
            epilog=f"{shown}\n\n{codes}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,  # an abbreviation means something else once an option is added
        )
        self.add_argument("--json", action="store_true", help="print one JSON object on stdout")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_intermixed_args(args, namespace)
        if unknown:
            word = unknown[0].split("=")[0]
            if not word.startswith("-"):
                self.error(f"unexpected argument {word!r}")
            self.error(f"unknown option {word!r}: {nearest(word, self._options())}")
        return found

    def error(self, message: str) -> NoReturn:
        raise BadConfig(f"{message} (see {self.prog} --help)")

    def _options(self) -> list[str]:
        return [o for action in self._actions for o in action.option_strings]


def run_command(
    parser: Parser, run: Callable[[argparse.Namespace], Answer], argv: Sequence[str] | None = None
) -> int:
    """Parse, run, print; returns the exit code. Typed errors become one line, without a traceback."""
    words = sys.argv[1:] if argv is None else list(argv)
    as_json = "--json" in words
    told: list[int] = []
    try:
        with terminable() as told:
            try:
                answer = run(parser.parse_args(words))
            except EdgeError as error:
                answer = Answer(None, error=error)
            _show(answer, as_json)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if as_json:
            print('{"error":{"type":"KeyboardInterrupt","message":"interrupted"}}')
        return TERMINATED if told else INTERRUPTED
    except BrokenPipeError:  # the reader of our output left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that the exit flush is quiet
        return 0
    return answer.error.exit_code if answer.error else 0


def progress(text: str) -> None:
    """A line about what is going on, on stderr."""
    print(text, file=sys.stderr, flush=True)


class Progress:
    """How far something long is, on stderr: a line rewritten in place on a terminal; elsewhere one for each
    tenth, of which none comes sooner than `pause` seconds after the last, or after the beginning."""

    def __init__(self, title: str, stream: TextIO | None = None, *, pause: float = 0.0) -> None:
        self._title, self._stream = title, sys.stderr if stream is None else stream
        self._pause = pause
        self._tenth = -1
        self._told = monotonic() if pause else -math.inf  # when

    def __call__(self, done: int, total: int, what: str) -> None:
        """`done` of `total` steps are behind, and `what` is next (or was last)."""
        if self._stream.isatty():
            bar = ("#" * (_BAR * done // max(1, total))).ljust(_BAR, ".")
            line = f"{self._title} [{bar}] {100 * done // max(1, total):3}% {what}"
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{line[:width]}", end="\n" if done == total else "", file=self._stream, flush=True)
            return
        tenth, now = 10 * done // max(1, total), monotonic()
        if tenth > self._tenth and now - self._told >= self._pause:
            self._tenth, self._told = tenth, now
            print(f"{self._title} {10 * tenth}%: {what}", file=self._stream, flush=True)


def table(rows: Sequence[Sequence[object]], head: Sequence[str] = (), right: Sequence[int] = ()) -> str:
    """Plain text columns; the columns numbered in `right` are aligned to the right."""
    lines = [[_one_line(str(cell)) for cell in row] for row in ([head, *rows] if head else rows)]
    columns = max((len(line) for line in lines), default=0)
    widths = [max(len(line[i]) for line in lines if i < len(line)) for i in range(columns)]
    if head:
        lines.insert(1, ["-" * w for w in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(widths[i]) if i in right else cell.ljust(widths[i]) for i, cell in enumerate(line)
        ).rstrip()
        for line in lines
    )


def size(nbytes: float) -> str:
    """Bytes for people: ``1.5 MiB``."""
    for unit in ("B", "KiB", "MiB"):
        if abs(nbytes) < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} GiB"


def profiles_answer() -> Answer:
    """What `--profiles` prints: the devices there are."""
    profiles = list_profiles()
    rows = [(p.name, p.title, size(p.memory.total_bytes), _modes(p), p.default_mode) for p in profiles]
    text = table(rows, ("profile", "device", "memory", "power modes", "default"), right=(2,))
    data = [
        {
            "name": p.name,
            "title": p.title,
            "aliases": list(p.aliases),
            "backend": p.backend,
            "memory_bytes": p.memory.total_bytes,
            "power_modes": list(p.power_modes),
            "default_mode": p.default_mode,
            "precisions": list(p.precisions),
        }
        for p in profiles
    ]
    return Answer({"profiles": data}, text)


def _modes(profile: Profile) -> str:
    return ", ".join(profile.power_modes)


def _show(answer: Answer, as_json: bool) -> None:
    error = answer.error
    if error is not None:
        print(f"error: {_one_line(str(error))}", file=sys.stderr)
    if as_json:
        data = answer.data
        if error is not None:
            data = {**(data or {}), "error": _describe(error)}
        sys.stdout.write(msgspec.json.encode(data).decode() + "\n")
    elif answer.text:
        print(answer.text)


def _describe(error: EdgeError) -> dict[str, object]:
    fields = {k: v for k, v in vars(error).items() if isinstance(v, int | str)}  # need, have, source
    message = str(error).encode("utf-8", "backslashreplace").decode()  # paths may be no valid text
    return {"type": type(error).__name__, "message": message, **fields}


def _one_line(text: str) -> str:
    """Control characters of a hostile file's words must not reach a terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]+", " ", text)
