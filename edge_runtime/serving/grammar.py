"""Grammars that an answer must follow: JSON Schema, regular expressions, EBNF; compiled by `llguidance`."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadRequest, Unsupported, nearest
from edge_runtime.serving.constraint import Compiled, Constraint
from edge_runtime.serving.worker import Worker

if TYPE_CHECKING:
    from llguidance import LLTokenizer

Kind = Literal["json", "regex", "ebnf"]
Whitespace = Literal["compact", "spaced", "free"]

MAX_GRAMMAR_BYTES = 1 << 20
COMPILE_SECONDS = 5.0
CACHED = 8  # compiled grammars; a robot has a plan's schema and those of its tools
LIMITS = {
    "initial_lexer_fuel": 250_000,  # expressions in all: bounds memory, and a step's time to 0.3 s
    "max_lexer_states": 50_000,  # 1 to 2 KiB each
    "verbose_errors": False,
}
_SCRIPT = Path(__file__).with_name("grammar_worker.py")
_JSON = {
    "compact": {"whitespace_flexible": False},
    "spaced": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    # bounded, for a model at a high temperature may otherwise write spaces until its answer's end
    "free": {"whitespace_flexible": True, "whitespace_pattern": r" |\n[ \t]{0,32}"},
}


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must be, whole: made by `json_schema`, `regex` or `ebnf`, put into a Request.

    Raises BadRequest when its text is not well-formed; what only a compiler finds comes with the request.
    """

    kind: Kind
    text: str
    whitespace: Whitespace = "compact"

    @classmethod
    def json_schema(cls, schema: str | Mapping[str, Any], *, whitespace: Whitespace = "compact") -> Grammar:
        """JSON that a schema allows (draft 2020-12), given as text or as parsed JSON. Properties come in the
        schema's order, required ones of no `properties` after them. A keyword that cannot be enforced (`not`,
        `if`, `uniqueItems`, a `oneOf` whose branches overlap, a remote `$ref`) is an error with the request.

        whitespace: "compact" has none, which is the fewest tokens and what models trained on such JSON
        write; "spaced" is Python's json.dumps, ``{"a": 1, "b": 2}``; "free" lets the model choose, at each
        place at most a space, or a line break and 32 blanks.
        """
        if isinstance(schema, Mapping):
            try:
                schema = json.dumps(schema, default=_plain)
            except (TypeError, ValueError, RecursionError) as error:
                raise BadRequest(f"the schema is not JSON: {error}") from None
        return cls("json", schema, whitespace)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        """Text that a regular expression matches from first to last character. Syntax of Rust's regex crate:
        no look-around, no back-references, no word boundaries."""
        return cls("regex", pattern)

    @classmethod
    def ebnf(cls, text: str) -> Grammar:
        """Text of a context-free grammar, in llguidance's dialect of Lark or in llama.cpp's GBNF."""
        return cls("ebnf", text)

    def __post_init__(self) -> None:
        if self.kind not in ("json", "regex", "ebnf"):
            raise BadRequest(f"grammar kind is {self.kind!r:.60}; {nearest(str(self.kind)[:60], _KINDS)}")
        name = _KINDS[self.kind]
        if not isinstance(self.text, str):
            raise BadRequest(f"the {name} is {type(self.text).__name__}, expected text")
        if self.whitespace not in _JSON:
            raise BadRequest(
                f"whitespace is {self.whitespace!r:.60}; {nearest(str(self.whitespace)[:60], _JSON)}"
            )
        try:
            nbytes = len(self.text.encode("utf-8"))
        except UnicodeEncodeError as error:
            raise BadRequest(f"the {name} is not valid Unicode (character {error.start})") from None
        if nbytes > MAX_GRAMMAR_BYTES:
            raise BadRequest(f"the {name} has {nbytes} bytes, expected at most {MAX_GRAMMAR_BYTES}")
        if not self.text.strip():
            raise BadRequest(f"the {name} is empty")
        if self.kind == "json":
            _check_schema(self.text)
        elif self.kind == "ebnf" and self.text.lstrip().startswith("{"):
            raise BadRequest(
                "the EBNF grammar starts with '{', expected rules; for JSON use Grammar.json_schema"
            )


_KINDS = {"json": "schema", "regex": "regular expression", "ebnf": "EBNF grammar"}


class GrammarCompiler:
    """Grammars to constraints over one model's tokens. Safe for several threads; its process, which proves
    grammars before they compile here, starts with the first one and ends with `close`.
    """

    def __init__(self, tokenizer_json: bytes, vocabulary: Vocabulary) -> None:
        self._json = tokenizer_json
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._worker = Worker(_SCRIPT)
        self._proving = threading.Lock()  # the worker and the tokenizer
        self._cache: OrderedDict[Grammar, Compiled] = OrderedDict()
        self._cached = threading.Lock()

    def compile(self, grammar: Grammar) -> Constraint:
        """The grammar's state at an answer's beginning.

        Raises BadRequest with the reason when the grammar is wrong, cannot be met, or takes more than
        COMPILE_SECONDS or the memory of its process to compile; Unsupported when llguidance is not installed
        or does not know this kind of tokenizer.
        """
        if not isinstance(grammar, Grammar):
            raise BadRequest(f"grammar is {type(grammar).__name__}, expected edge_runtime.Grammar")
        with self._cached:
            compiled = self._cache.get(grammar)
            if compiled is not None and not compiled.broken:
                self._cache.move_to_end(grammar)
                return compiled.start()
        compiled = self._compile(grammar)
        with self._cached:
            self._cache[grammar] = compiled
            self._cache.move_to_end(grammar)
            while len(self._cache) > CACHED:
                self._cache.popitem(last=False)
        return compiled.start()

    def close(self) -> None:
        """End the process. A later `compile` starts another."""
        with self._proving:
            self._worker.close()

    def _compile(self, grammar: Grammar) -> Compiled:
        with self._proving:
            if self._tokenizer is None:
                self._tokenizer = self._load()
            answer = self._ask(grammar)
        from llguidance import LLMatcher, LLParserLimits

        name = _KINDS[grammar.kind]
        if answer is None:
            raise BadRequest(
                f"the {name} needs more than {COMPILE_SECONDS:g} seconds or too much memory to compile, or "
                "is nested too deeply; make it simpler"
            )
        if "error" in answer:
            raise BadRequest(f"the {name} cannot be used: {_reason(answer['error'])}")
        matcher = LLMatcher(
            self._tokenizer,
            answer["grammar"],
            log_level=0,
            limits=LLParserLimits(**LIMITS),  # type: ignore[arg-type]
        )
        if matcher.is_error():  # the same library with the same limits has just said otherwise
            raise BadRequest(f"the {name} cannot be used: {_reason(matcher.get_error())}")
        return Compiled(matcher, self._tokenizer, self._vocabulary)

    def _load(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError:
            raise Unsupported(_MISSING) from None
        try:
            return LLTokenizer(self._json.decode("utf-8"), eos_token=self._end)
        except BaseException as error:  # the library panics on some files
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise Unsupported(
                f"llguidance cannot use this engine's tokenizer: {_reason(str(error))}"
            ) from None

    def _ask(self, grammar: Grammar) -> dict[str, Any] | None:
        if not self._worker.alive:
            answer = self._worker.start(
                {"tokenizer": self._json.decode("utf-8"), "end": self._end, "limits": LIMITS}
            )
            if answer is None or "ready" not in answer:
                self._worker.close()
                if answer is not None and "missing" in answer:
                    raise Unsupported(_MISSING)
                why = "its process does not start" if answer is None else _reason(answer["error"])
                raise Unsupported(f"structured output is not available: {why}")
        question = {"kind": grammar.kind, "text": grammar.text, "options": _JSON[grammar.whitespace]}
        return self._worker.ask(question, COMPILE_SECONDS)

    @property
    def _end(self) -> int:
        """The end token that stands for all of them; the parser needs to know one."""
        if not self._vocabulary.eos:
            raise Unsupported("this engine has no end token, which structured output needs")
        return self._vocabulary.eos[0]


_MISSING = "structured output needs llguidance; install it with: pip install 'edge-runtime[structured]'"


def _check_schema(text: str) -> None:
    try:
        schema = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"the schema is not JSON: {error}") from None
    if schema is False:
        raise BadRequest("the schema is false, which no answer can meet")
    if not isinstance(schema, dict):
        raise BadRequest(f"the schema is {type(schema).__name__}, expected a JSON object")
    if "x-guidance" in schema:
        raise BadRequest("the schema has 'x-guidance', expected the option whitespace of Grammar.json_schema")


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON number")


def _reason(error: str) -> str:
    """The library's words on one line; a long message quotes the grammar first and ends with the cause."""
    words = " ".join(error.removesuffix("<non-verbose/>").split())
    if words == "NoExtensionBias":
        return "nothing can meet it"
    return words if len(words) <= 300 else f"{words[:120]} ... {words[-160:]}"
