"""Grammars from text to refusal: what is well-formed, what compiles, what is hostile, what is cached."""

from __future__ import annotations

import json
import resource
import sys
import threading
from pathlib import Path
from types import MappingProxyType

import pytest

from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadRequest, GrammarError, Unsupported
from edge_runtime.serving import grammar as module
from edge_runtime.serving.grammar import MAX_GRAMMAR_BYTES, Grammar, GrammarCompiler

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
TOKENIZER = (PLANNER / "model" / "tokenizer.json").read_bytes()
VOCABULARY = Vocabulary(bos=1, eos=(2,), pad=0, size=1024)


@pytest.fixture(scope="module")
def compiler():
    made = GrammarCompiler(TOKENIZER, VOCABULARY)
    yield made
    made.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Grammar.json_schema("{"), "the schema is not JSON"),
        (lambda: Grammar.json_schema('{"minimum": NaN}'), "NaN is no JSON number"),
        (lambda: Grammar.json_schema('{"minimum": ' + "9" * 5000 + "}"), "the schema is not JSON"),
        (lambda: Grammar.json_schema("[" * 100_000), "the schema is not JSON"),
        (lambda: Grammar.json_schema("[]"), "the schema is list, expected a JSON object"),
        (lambda: Grammar.json_schema("false"), "the schema is false, which no answer can meet"),
        (lambda: Grammar.json_schema({"const": {1, 2}}), "set is no JSON value"),
        (lambda: Grammar.json_schema({"const": "\ud800"}, whitespace="wide"), "did you mean|valid: compact"),
        (lambda: Grammar.json_schema({"x-guidance": {"lenient": True}}), "'x-guidance', expected the option"),
        (lambda: Grammar.json_schema(3), "the schema is int, expected text"),  # type: ignore[arg-type]
        (lambda: Grammar.json_schema(" "), "the schema is empty"),
        (lambda: Grammar.json_schema(json.dumps("x" * MAX_GRAMMAR_BYTES)), "bytes, expected at most 1048576"),
        (lambda: Grammar.regex(""), "the regular expression is empty"),
        (lambda: Grammar.regex("\ud800"), "the regular expression is not valid Unicode .character 0."),
        (lambda: Grammar.regex(b"a"), "the regular expression is bytes"),  # type: ignore[arg-type]
        (lambda: Grammar.ebnf("\n"), "the EBNF grammar is empty"),
        (lambda: Grammar.ebnf('{"grammars": []}'), "starts with '{', expected rules"),
        (lambda: Grammar("jsn", "{}"), "grammar kind is 'jsn'; did you mean 'json'"),  # type: ignore[arg-type]
    ],
)
def test_what_is_not_well_formed_is_named_at_once(make, message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        make()


def test_a_circular_schema_is_refused() -> None:
    schema: dict[str, object] = {}
    schema["items"] = schema
    with pytest.raises(BadRequest, match="not JSON"):
        Grammar.json_schema(schema)


def test_a_mapping_is_the_grammar_of_its_text() -> None:
    schema = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"enum": ["é"]}}}
    grammar = Grammar.json_schema(MappingProxyType(schema))
    assert grammar == Grammar.json_schema(json.dumps(schema)) and hash(grammar) == hash(grammar)


UNMEETABLE = {
    "lengths": (Grammar.json_schema({"type": "string", "minLength": 5, "maxLength": 2}), "minLength"),
    "enum": (Grammar.json_schema({"type": "integer", "enum": ["a"]}), "Unsatisfiable"),
    "no value": (Grammar.json_schema({"enum": []}), "Unsatisfiable"),
    "types": (Grammar.json_schema({"allOf": [{"type": "string"}, {"type": "null"}]}), "incompatible types"),
    "interval": (Grammar.json_schema({"type": "number", "minimum": 3, "maximum": 2}), "minimum"),
    "required": (
        Grammar.json_schema(
            {
                "type": "object",
                "properties": {"a": {"allOf": [{"const": 1}, {"const": 2}]}},
                "required": ["a"],
            }
        ),
        "required property 'a' is unsatisfiable",
    ),
    "reference to itself": (Grammar.json_schema({"$ref": "#"}), "nothing can meet it"),
    "endless object": (
        Grammar.json_schema({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}),
        "Too many items",
    ),
    "not": (Grammar.json_schema({"not": {"type": "string"}}), 'Unimplemented keys: ."not"'),
    "if": (Grammar.json_schema({"if": {}, "then": {}}), "Unimplemented keys"),
    "oneOf": (Grammar.json_schema({"oneOf": [{"type": "string"}, {"minLength": 2}]}), "oneOf"),
    "remote": (Grammar.json_schema({"$ref": "https://example.com/schema.json"}), "example.com"),
    "file": (Grammar.json_schema({"$ref": "file:///etc/passwd"}), "not present"),
    "dangling": (Grammar.json_schema({"$ref": "#/$defs/none"}), "/.defs/none"),
    "type": (Grammar.json_schema({"type": "strin"}), "Invalid type: strin"),
    "format": (Grammar.json_schema({"type": "string", "format": "no-such"}), "Unknown format"),
    "surrogate": (Grammar.json_schema('{"const": "\\ud800"}'), "hex escape"),
    "bad regex": (Grammar.regex("[a"), "unclosed character class"),
    "back-reference": (Grammar.regex(r"(a)\1"), "backreferences are not supported"),
    "look-ahead": (Grammar.regex("(?=a)b"), "look-around"),
    "empty class": (Grammar.regex(r"[^\s\S]"), "nothing can meet it"),
    "unknown rule": (Grammar.ebnf("start: other"), 'unknown name: "other"'),
    "endless rule": (Grammar.ebnf("start: start"), "nothing can meet it"),
    "no rule": (Grammar.ebnf("root ::= ("), "GBNF"),
    "padding id": (Grammar.ebnf("start: <[1024]>"), "Token range end too large"),
}


@pytest.mark.parametrize("name", UNMEETABLE)
def test_what_cannot_be_met_or_enforced_is_refused_with_the_reason(
    name: str, compiler: GrammarCompiler
) -> None:
    grammar, message = UNMEETABLE[name]
    with pytest.raises(BadRequest, match=message) as caught:
        compiler.compile(grammar)
    assert "cannot be used" in str(caught.value) and len(str(caught.value)) < 400


def nested(depth: int) -> str:
    return '{"type":"array","items":' * depth + "{}" + "}" * depth


HOSTILE = {
    "patterns that all must match": lambda: Grammar.json_schema(
        {"allOf": [{"type": "string", "pattern": f".*{chr(97 + i)}.*"} for i in range(24)]}
    ),
    "slow properties": lambda: Grammar.json_schema(
        {"patternProperties": {f"^a{{{i}}}b": {} for i in range(300)}}
    ),
    "large prime": lambda: Grammar.json_schema({"type": "integer", "multipleOf": 999_983}),
    "chain of rules": lambda: Grammar.ebnf(
        "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}' for i in range(30_000)) + '\nr30000: "y"'
    ),
    "chain of terminals": lambda: Grammar.ebnf(
        "start: T0\n" + "\n".join(f'T{i}: "x" T{i + 1}' for i in range(20_000)) + '\nT20000: "y"'
    ),
    "doubling rules": lambda: Grammar.ebnf(
        "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40)) + '\nr40: "y"'
    ),
    "wide GBNF": lambda: Grammar.ebnf("root ::= " + " | ".join(f'"a{i}"' for i in range(60_000))),
    "deep GBNF": lambda: Grammar.ebnf("root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "deep groups": lambda: Grammar.ebnf("start: " + "(" * 100_000 + '"a"' + ")" * 100_000),
    "deep regex": lambda: Grammar.regex("(" * 100_000 + "a" + ")" * 100_000),
    "wide regex": lambda: Grammar.regex("|".join(str(i * 7919) for i in range(100_000))),
    "repeats of repeats": lambda: Grammar.regex("(a{1000}){1000}"),
    "a long text": lambda: Grammar.ebnf('start: "' + "a" * 1_000_000 + '"'),
    "many keys": lambda: Grammar.json_schema({"properties": {f"k{i}": {} for i in range(50_000)}}),
    "many branches": lambda: Grammar.json_schema(
        {"anyOf": [{"properties": {f"k{i}": {}}, "required": [f"k{i}"]} for i in range(8000)]}
    ),
    "deep schema": lambda: Grammar.json_schema(nested(300)),
}
HARMLESS = {
    "catastrophic for backtracking": lambda: Grammar.regex("(a+)+b"),
    "doubling states": lambda: Grammar.regex("(a|b)*a(a|b){2000}"),
    "a large enum": lambda: Grammar.json_schema({"enum": [f"v{i}" for i in range(20_000)]}),
    "a huge array": lambda: Grammar.json_schema({"type": "array", "minItems": 10**5, "items": {}}),
    "nested arrays": lambda: Grammar.json_schema(nested(60)),
}


@pytest.mark.parametrize("name", [*HOSTILE, *HARMLESS])
def test_hostile_grammars_end_in_bounded_time_and_memory(
    name: str, compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar = {**HOSTILE, **HARMLESS}[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if name in HOSTILE:
        monkeypatch.setattr(module, "COMPILE_SECONDS", 1.0)
        with pytest.raises(BadRequest, match=r"cannot be used|make it simpler"):
            compiler.compile(grammar)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB
    else:
        answer = compiler.compile(grammar)
        for _ in range(50):
            if answer.is_done:
                break
            answer.advance(int(answer.mask().nonzero()[0][-1]))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 192 << 10
    assert compiler.compile(Grammar.regex("ab?")).mask().any()


def test_a_grammar_compiles_once_and_needs_no_process_then() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCABULARY)
    grammar = Grammar.regex("yes|no")
    first = compiler.compile(grammar)
    compiler.close()
    second = compiler.compile(Grammar.regex("yes|no"))
    assert not compiler._worker.alive
    assert (first.mask() == second.mask()).all()
    compiler.compile(Grammar.regex("up|down"))
    assert compiler._worker.alive
    compiler.close()


def test_the_cache_keeps_the_last_used() -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCABULARY)
    grammars = [Grammar.regex(f"a{{{i}}}") for i in range(1, module.CACHED + 2)]
    for grammar in grammars[:-1]:
        compiler.compile(grammar)
    compiler.compile(grammars[0])
    compiler.compile(grammars[-1])
    assert list(compiler._cache) == [*grammars[2:-1], grammars[0], grammars[-1]]
    compiler.close()


def test_a_grammar_that_breaks_later_ends_its_answer_and_compiles_again(compiler: GrammarCompiler) -> None:
    doubling = "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(40))
    grammar = Grammar.ebnf(f'start: /[0-9]{{30}}/ r0\n{doubling}\nr40: "y"')
    other = compiler.compile(Grammar.regex("a+"))
    for _ in range(2):
        answer = compiler.compile(grammar)
        assert not answer._compiled.broken
        with pytest.raises(GrammarError, match=r"the grammar cannot go on: .*Too many items"):
            for _ in range(100):
                answer.advance(int(answer.mask().nonzero()[0][0]))
        assert answer._compiled.broken
        assert other.mask().any()


def test_threads_compile_and_drive_side_by_side(compiler: GrammarCompiler) -> None:
    schema = Grammar.json_schema((PLANNER / "plan.schema.json").read_text())
    alone = path_of(compiler.compile(schema))
    found: list[list[int]] = []

    def work(i: int) -> None:
        compiler.compile(Grammar.regex(f"x{{{i + 1}}}"))
        for _ in range(20):
            found.append(path_of(compiler.compile(schema)))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [alone] * 80


def path_of(answer) -> list[int]:
    """Always the middle one of the allowed tokens, and how many there were."""
    path = []
    for _ in range(60):
        if answer.is_done:
            break
        allowed = answer.mask().nonzero()[0]
        path += [int(allowed[len(allowed) // 2]), len(allowed)]
        answer.advance(path[-2])
    return path


def test_without_llguidance_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = GrammarCompiler(TOKENIZER, VOCABULARY)
    with monkeypatch.context() as blocked:
        blocked.setitem(sys.modules, "llguidance", None)
        with pytest.raises(Unsupported, match=r"pip install 'edge-runtime\[structured\]'"):
            compiler.compile(Grammar.regex("a"))
    (tmp_path / "llguidance.py").write_text("raise ImportError('blocked')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(Unsupported, match=r"pip install 'edge-runtime\[structured\]'"):
        compiler.compile(Grammar.regex("a"))
    monkeypatch.undo()
    assert compiler.compile(Grammar.regex("a")).mask().any()
    compiler.close()


def test_a_tokenizer_that_cannot_be_used_is_said(compiler: GrammarCompiler) -> None:
    plain = json.loads(TOKENIZER)
    plain["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    for data, vocabulary, message in (
        (
            json.dumps(plain).encode(),
            VOCABULARY,
            "llguidance cannot use this engine's tokenizer: .*WordPiece",
        ),
        (b"{}", VOCABULARY, "llguidance cannot use this engine's tokenizer"),
        (TOKENIZER, Vocabulary(bos=1, eos=(), pad=0, size=1024), "no end token"),
        (TOKENIZER, Vocabulary(bos=1, eos=(1030,), pad=0, size=1040), "EOS token ID 1030"),
    ):
        with pytest.raises(Unsupported, match=message):
            GrammarCompiler(data, vocabulary).compile(Grammar.regex("a"))
    with pytest.raises(BadRequest, match=r"grammar is str, expected edge_runtime\.Grammar"):
        compiler.compile("a")  # type: ignore[arg-type]
