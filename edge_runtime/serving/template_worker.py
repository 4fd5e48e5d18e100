"""The process that renders chat templates. A template comes with a model and is not trusted: neither fuel nor
an output cap keeps one from doubling a string until memory ends, so it runs where limits hold and nothing is
lost. Run as a file; reads and writes one JSON object a line. Imports only the standard library and minijinja.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from typing import Any

MEMORY_BYTES = 256 << 20  # beyond what the interpreter has mapped itself
FUEL = 1_000_000  # instructions of one render; a long chat takes some thousands
OUTPUT_BYTES = 1 << 20


def main() -> None:
    sys.path.pop(0)  # this folder: its modules are not to be found by their bare names
    setup = json.loads(sys.stdin.readline())
    try:
        import minijinja
    except ImportError:
        _say({"missing": "minijinja"})
        return
    # RLIMIT_AS counts reserved address space too: RLIMIT_DATA counts what can be written
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment: Any = minijinja.Environment(
        fuel=FUEL, trim_blocks=True, lstrip_blocks=True, auto_escape_callback=lambda name: False
    )
    environment.add_function("raise_exception", _raise)
    environment.add_function("strftime_now", lambda form: datetime.now().strftime(form))
    environment.add_filter("tojson", _tojson)
    try:
        environment.add_template("chat_template", setup["template"])
        _say({"ready": True})
    except BaseException as error:
        _say({"error": _first_line(error)})
        return
    for line in sys.stdin:
        try:
            text = environment.render_template("chat_template", **json.loads(line))
            if len(text.encode()) > OUTPUT_BYTES:
                _say({"error": f"the template's output is longer than {OUTPUT_BYTES} bytes"})
            else:
                _say({"text": text})
        except BaseException as error:  # the library's panics are no Exception
            _say({"error": _first_line(error)})


def _raise(message: str) -> None:
    raise ValueError(str(message)[:500])


def _tojson(value: Any, indent: int | None = None, **options: Any) -> str:
    """As Hugging Face has it: nothing escaped for HTML."""
    return json.dumps(value, ensure_ascii=False, indent=indent, **options)


def _first_line(error: BaseException) -> str:
    cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
    return (str(cause).strip() or type(cause).__name__).splitlines()[0][:500]


def _say(answer: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
