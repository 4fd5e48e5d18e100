"""Masks against brute force, and whole answers against jsonschema, re and a parser of our own."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import GrammarError
from edge_runtime.serving.constraint import Constraint
from edge_runtime.serving.grammar import Grammar, GrammarCompiler
from edge_runtime.serving.sampling import Sampler, Sampling
from edge_runtime.serving.tokenizer import Tokenizer
from tests.conftest import SHARED

PLANNER = Path(__file__).resolve().parents[2] / "examples" / "planner"
PLAN = json.loads((PLANNER / "plan.schema.json").read_text())
FOLDERS = {
    "planner": PLANNER / "model",
    "stories260K": SHARED / "models" / "stories260K",
    "llama2xs": SHARED / "models" / "llama2xs",
}


class Model:
    """A tokenizer of a real model, and what its tokens spell by an independent reading of tokenizer.json."""

    def __init__(self, folder: Path, padding: int = 0, eos: tuple[int, ...] = (2,)) -> None:
        data = (folder / "tokenizer.json").read_bytes()
        read = json.loads(data)
        self.known = len(read["model"]["vocab"])
        self.vocabulary = Vocabulary(bos=1, eos=eos, pad=None, size=self.known + padding)
        self.tokenizer = Tokenizer(data, self.vocabulary)
        self.compiler = GrammarCompiler(data, self.vocabulary)
        special = {token["id"] for token in read["added_tokens"]}
        spell = byte_level if read["decoder"]["type"] == "ByteLevel" else sentencepiece
        self.bytes: list[bytes | None] = [None] * self.vocabulary.size
        for text, i in read["model"]["vocab"].items():
            if i not in special and i < self.vocabulary.size:
                self.bytes[i] = spell(text)

    def text(self, tokens: list[int]) -> str:
        return b"".join(self.bytes[i] or b"" for i in tokens).decode("utf-8")

    def tokens(self, text: str) -> list[int]:
        """Greedily the longest tokens, ignorant of merges."""
        rest, out = text.encode(), []
        while rest:
            best = max((b for b in self.bytes if b and rest.startswith(b)), key=len)
            out.append(self.bytes.index(best))
            rest = rest[len(best) :]
        return out


def byte_level(text: str) -> bytes:
    """GPT-2's stand-ins for bytes: those that print stand for themselves, the rest from U+0100 on."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    table = {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}
    return bytes(table[c] for c in text)


def sentencepiece(text: str) -> bytes:
    if re.fullmatch("<0x[0-9A-F]{2}>", text):
        return bytes([int(text[3:5], 16)])
    return text.replace("\u2581", " ").encode()


@pytest.fixture(scope="module", params=FOLDERS)
def model(request: pytest.FixtureRequest):
    if not FOLDERS[request.param].is_dir():
        pytest.skip(f"real model {request.param} is not there")
    made = Model(FOLDERS[request.param], padding=9)
    yield made
    made.compiler.close()


@pytest.fixture(scope="module")
def planner():
    made = Model(FOLDERS["planner"], padding=9)
    yield made
    made.compiler.close()


def test_the_parser_sees_the_tokens_bytes(model: Model) -> None:
    model.compiler.compile(Grammar.regex("a"))
    library = model.compiler._tokenizer
    assert library is not None and library.vocab_size == model.known
    for i, spelled in enumerate(model.bytes[: model.known]):
        if spelled is None or spelled == b"\xff":  # which marks its special tokens, and is no UTF-8
            assert library.is_special_token(i)
        else:
            assert library.decode_bytes([i]) == spelled and not library.is_special_token(i)


# --- masks against brute force ---

LANGUAGES = {
    "words": (
        Grammar.regex("(go|goto|gone|stop|stopped| stop)"),
        ["go", "goto", "gone", "stop", "stopped", " stop"],
    ),
    "repeats": (
        Grammar.regex("[ab]{0,4}"),
        [""] + [f"{i:0{n}b}".translate({48: "a", 49: "b"}) for n in range(1, 5) for i in range(2**n)],
    ),
    "unicode": (Grammar.regex("(né|nè|ñ|日本|日|🤖🤖?)"), ["né", "nè", "ñ", "日本", "日", "🤖", "🤖🤖"]),
    "enum": (
        Grammar.json_schema({"enum": ["é", 'a"b', "tab\t", 12, 1, True, None, [1, "x"], {"k": []}]}),
        ['"é"', '"a\\"b"', '"tab\\t"', '"tab\\u0009"', "12", "1", "true", "null", '[1,"x"]', '{"k":[]}'],
    ),
    "object": (
        Grammar.json_schema(
            {
                "type": "object",
                "properties": {
                    "on": {"type": "boolean"},
                    "n": {"type": "integer", "minimum": 8, "maximum": 11},
                },
                "required": ["on"],
                "additionalProperties": False,
            }
        ),
        [f'{{"on":{b}{n}}}' for b in ("true", "false") for n in ("", *(f',"n":{i}' for i in range(8, 12)))],
    ),
    "rules": (
        Grammar.ebnf('start: verb " " noun ("s" | "")\nverb: "take" | "make"\nnoun: "cup" | "cap"'),
        [f"{v} {n}{s}" for v in ("take", "make") for n in ("cup", "cap") for s in ("", "s")],
    ),
}


@pytest.mark.parametrize("name", LANGUAGES)
def test_masks_equal_brute_force_over_the_vocabulary(name: str, model: Model) -> None:
    grammar, words = LANGUAGES[name]
    language = [word.encode() for word in words]
    rng = np.random.default_rng(0)
    free = 0
    for _ in range(25):
        answer, said = model.compiler.compile(grammar), b""
        while True:
            mask = answer.mask()
            rest = [w[len(said) :] for w in language if w.startswith(said)]
            want = np.array([bool(b) and any(r.startswith(b) for r in rest) for b in model.bytes])
            may_end = b"" in rest
            want[2] = may_end
            assert answer.may_end == may_end and mask[2] == may_end
            assert not mask[model.known :].any()
            if may_end or len({r[0] for r in rest}) > 1:
                free += 1
                assert (mask == want).all()
            else:  # one byte is forced: only the tokens that the tokenizer makes of the forced text
                assert mask.any() and not (mask & ~want).any()
            assert answer.is_done == (rest == [b""])
            if answer.is_done or (may_end and rng.random() < 0.3):
                break
            mask[2] = False
            token = int(rng.choice(np.flatnonzero(mask)))
            answer.advance(token)
            said += model.bytes[token] or b""
        answer.advance(2)
        assert answer.is_done and answer.may_end and not answer.mask().any()
        assert said in language
    assert free > 20


def test_brute_force_would_notice_a_token_too_many(planner: Model) -> None:
    grammar, words = LANGUAGES["repeats"]
    mask = planner.compiler.compile(grammar).mask()
    fewer = [w for w in words if not w.startswith("b")]
    want = [bool(b) and any(w.encode().startswith(b) for w in fewer) for b in planner.bytes]
    want[2] = True
    assert (mask != np.array(want)).any()


# --- whole answers from random logits ---


def answer_of(model: Model, answer: Constraint, seed: int, closers: str = '"}]') -> str:
    """An answer drawn at temperature 1 from random logits, which favour an end more and more."""
    rng = np.random.default_rng(seed)
    sampler = Sampler(Sampling(temperature=1.0, seed=seed), [1], model.vocabulary.size, answer)
    closing = np.array(
        [b is not None and any(c.encode() in b for c in closers) for b in model.bytes], np.float32
    )
    closing[2] = 1
    tokens: list[int] = []
    while len(tokens) < 2000:
        logits = rng.normal(0, 2, model.vocabulary.size).astype(np.float32)
        logits += 0.05 * (len(tokens) - 10) * closing
        token = sampler.choose(logits).token
        if token == 2:
            return model.text(tokens)
        tokens.append(token)
    raise AssertionError("the answer does not end")


SCHEMAS = {
    "plan": PLAN,
    "strings": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 2, "maxLength": 12},
            "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
            "day": {"type": "string", "format": "date"},
            "words": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
        },
        "required": ["name", "code", "day"],
        "additionalProperties": False,
    },
    "numbers": {
        "type": "array",
        "items": [],
        "prefixItems": [
            {"type": "integer", "minimum": -7, "maximum": 130},
            {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
            {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 50},
        ],
        "minItems": 3,
        "maxItems": 3,
    },
    "recursive": {
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {
                    "label": {"enum": ["é", "木", "🤖"]},
                    "branches": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2},
                },
                "required": ["label"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/tree",
    },
    "any": {"anyOf": [{"type": "null"}, {"const": {"a": [1]}}, {"type": "string", "maxLength": 5}]},
}
del SCHEMAS["numbers"]["items"]


@pytest.mark.parametrize("whitespace", ["compact", "spaced", "free"])
@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_meets_its_schema(name: str, whitespace: str, model: Model) -> None:
    """3 models x 5 schemas x 3 conventions x 14 = 630 answers."""
    schema = SCHEMAS[name]
    grammar = Grammar.json_schema(schema, whitespace=whitespace)  # type: ignore[arg-type]
    check = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    seen = set()
    for seed in range(14):
        text = answer_of(model, model.compiler.compile(grammar), seed)
        value = json.loads(text)
        check.validate(value)
        seen.add(text)
        blanks = re.sub(r'"(?:[^"\\]|\\.)*"', '""', text)
        if whitespace == "compact":
            assert not re.search(r"\s", blanks)
        elif whitespace == "spaced":
            assert re.sub(r"(?<=[,:]) ", "", blanks) == re.sub(r"\s", "", blanks)
            assert blanks.count(" ") == len(re.findall("[,:]", blanks))
        else:
            assert not re.search(r"  |\n\s*\n", re.sub(r"\n[ \t]{0,32}", "\n", blanks))
    assert len(seen) > (2 if name in ("any", "recursive") else 10)


@pytest.mark.parametrize(
    "pattern",
    [
        r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
        r"(left|right|forward) ([0-9]|[1-9][0-9])( cm)?",
        r"[a-zé日🤖]{1,20}",
        r"\+?[0-9]{3,12}(x[0-9]+)?",
        r"(ab?){0,9}c",
    ],
)
def test_every_answer_matches_its_regex(pattern: str, model: Model) -> None:
    for seed in range(8):
        text = answer_of(model, model.compiler.compile(Grammar.regex(pattern)), seed, "cm0")
        assert re.fullmatch(pattern, text)


SUMS = {
    "Lark": 'start: term | start ("+" | "-") term\nterm: NUMBER | "(" start ")"\nNUMBER: /[1-9][0-9]{0,3}/',
    "GBNF": 'root ::= term (("+" | "-") term)*\nterm ::= [1-9] [0-9]? | "(" root ")"',
}


@pytest.mark.parametrize("dialect", SUMS)
def test_every_answer_is_of_its_grammar(dialect: str, model: Model) -> None:
    grammar = Grammar.ebnf(SUMS[dialect])
    texts = [answer_of(model, model.compiler.compile(grammar), seed, ")") for seed in range(30)]
    for text in texts:
        assert re.fullmatch(r"[0-9()+-]+", text)
        for node in ast.walk(ast.parse(text, mode="eval")):
            assert isinstance(node, ast.Expression | ast.BinOp | ast.Constant | ast.Add | ast.Sub)
    assert len(set(texts)) > 20 and any(re.search(r"\([^)]*\(", text) for text in texts)


# --- the answer's state ---


def test_a_character_of_several_tokens_is_finished_first(model: Model) -> None:
    answer = model.compiler.compile(Grammar.regex("(é|è|日)x"))
    first = model.bytes.index(b"\xc3")
    answer.advance(first)
    assert {model.bytes[i] for i in np.flatnonzero(answer.mask())} == {b"\xa9", b"\xa8"}
    assert not answer.may_end
    answer.advance(model.bytes.index(b"\xa8"))
    assert {model.bytes[i] for i in np.flatnonzero(answer.mask())} == {b"x"}


def test_any_of_several_end_tokens_ends_it() -> None:
    model = Model(FOLDERS["planner"], padding=3, eos=(2, 4, 1025))
    for end in (2, 4, 1025):
        answer = model.compiler.compile(Grammar.regex("a{2,3}"))
        a = model.bytes.index(b"a")
        answer.advance(a)
        assert not answer.mask()[[2, 4, 1025]].any()
        with pytest.raises(GrammarError, match=f"token {end} does not follow"):
            answer.advance(end)
        answer.advance(a)
        assert answer.may_end and not answer.is_done
        assert set(np.flatnonzero(answer.mask())) == {2, 4, 1025, a}
        assert answer.allowed_prefix([end, end]) == 1
        answer.advance(end)
        assert answer.is_done and not answer.mask().any()
        with pytest.raises(GrammarError):
            answer.advance(end)
    answer = model.compiler.compile(Grammar.regex("a"))
    answer.advance(a)
    assert answer.is_done and set(np.flatnonzero(answer.mask())) == {2, 4, 1025}
    with pytest.raises(GrammarError):
        answer.advance(a)
    model.compiler.close()


@pytest.mark.parametrize("token", [5, 1023, 1024, 1032, 1033, -1, 2**31])
def test_a_token_that_does_not_follow_is_refused_and_changes_nothing(token: int, planner: Model) -> None:
    answer = planner.compiler.compile(Grammar.regex("[ab]c"))
    before = answer.mask().copy()
    with pytest.raises(GrammarError, match=f"token {token} does not follow the grammar"):
        answer.advance(token)
    assert (answer.mask() == before).all()
    assert answer.allowed_prefix([token]) == 0


def test_no_token_of_the_model_continues_it() -> None:
    """A model with fewer tokens than its tokenizer: what would continue the answer lies beyond."""
    model = Model(FOLDERS["planner"], padding=-100)
    last = model.tokenizer.piece(1000)
    answer = model.compiler.compile(Grammar.ebnf("start: <[1000]>"))
    assert last and not answer.mask().any()
    assert answer.forced() == []
    with pytest.raises(GrammarError, match="allows none of the model's tokens"):
        Sampler(Sampling(), [1], 924, answer).choose(np.zeros(924, np.float32))
    model.compiler.close()


FORCED: dict[str, Callable[[], Grammar]] = {
    "plan": lambda: Grammar.json_schema(PLAN),
    "object": lambda: Grammar.json_schema(
        {
            "type": "object",
            "properties": {"hello world": {"const": "some constant 日本 text"}, "b": {"type": "boolean"}},
            "required": ["hello world", "b"],
        }
    ),
    "regex": lambda: Grammar.regex("(take the red|take the blue) mug( now)?"),
}


@pytest.mark.parametrize("name", FORCED)
def test_forced_tokens_are_what_the_masks_leave(name: str, model: Model) -> None:
    grammar = FORCED[name]()
    rng = np.random.default_rng(1)
    total = 0
    for _ in range(10):
        answer = model.compiler.compile(grammar)
        for _ in range(60):
            if answer.is_done:
                break
            forced = answer.forced()
            masks = answer.masks(forced)
            assert len(masks) == len(forced) + 1
            for mask, token in zip(masks, forced, strict=False):
                assert list(np.flatnonzero(mask)) == [token]
            total += len(forced)
            allowed = np.flatnonzero(answer.mask())
            answer.advance(int(rng.choice(allowed)))
    assert total > (0 if name == "plan" else 20)


def test_masks_along_a_draft_are_those_of_stepping(model: Model) -> None:
    grammar = Grammar.json_schema(PLAN)
    text = '[{"skill":"go_to","place":"kitchen"},{"skill":"wait","seconds":30}]'
    good = model.tokenizer.encode(text, start=False)
    while (model.bytes[good[0]] or b"").startswith(b" "):  # a sentencepiece's first word has a space
        good = model.tokens(text)
    stepped = model.compiler.compile(grammar)
    rows = [stepped.mask().copy()]
    for token in good:
        stepped.advance(token)
        rows.append(stepped.mask().copy())
    assert stepped.is_done
    answer = model.compiler.compile(grammar)
    for at in range(0, len(good), 3):
        draft = good[at : at + 8]
        count = next((i for i, token in enumerate(draft) if not rows[at + i][token]), len(draft))
        masks = answer.masks(draft)
        assert answer.allowed_prefix(draft) == count == len(masks) - 1
        assert (masks == rows[at : at + count + 1]).all()
        assert answer.allowed_prefix([*draft[:2], 1, *draft[2:]]) == min(count, 2)
        for token in good[at : at + 3]:
            answer.advance(token)
    assert answer.masks([]).shape == (1, model.vocabulary.size)


@pytest.mark.parametrize("whitespace", ["compact", "free"])
def test_a_model_that_writes_compact_json_is_left_alone(whitespace: str, planner: Model) -> None:
    """Each token of 200 held-out plans, as the planner was taught them, is among the allowed."""
    grammar = Grammar.json_schema(PLAN, whitespace=whitespace)  # type: ignore[arg-type]
    lines = (PLANNER / "heldout.jsonl").read_text().splitlines()[:200]
    for line in lines:
        tokens = planner.tokenizer.encode(json.loads(line)["expected"], start=False)
        answer = planner.compiler.compile(grammar)
        for token in tokens:
            assert answer.mask()[token]
            answer.advance(token)
        assert answer.is_done and answer.mask()[2]


def test_a_fork_goes_its_own_way(planner: Model) -> None:
    answer = planner.compiler.compile(Grammar.regex("[ab]{1,6}c"))
    a, b, c = (planner.bytes.index(x) for x in (b"a", b"b", b"c"))
    answer.advance(a)
    before = answer.mask().copy()
    other = answer.fork()
    for token in (b, b, c, 2):
        other.advance(token)
    assert other.is_done and not answer.is_done
    assert (answer.mask() == before).all()
    third = other.fork()
    assert third.is_done and not third.mask().any()
    answer.advance(c)
    assert answer.is_done and set(np.flatnonzero(answer.mask())) == {2}


def test_an_answer_does_not_depend_on_forks_and_looks(planner: Model) -> None:
    grammar = Grammar.json_schema(PLAN)
    rng = np.random.default_rng(2)
    plain, watched = planner.compiler.compile(grammar), planner.compiler.compile(grammar)
    for _ in range(200):
        want = plain.mask().copy()
        watched.forced()
        ahead = watched.fork()
        for _ in range(int(rng.integers(0, 9))):
            if ahead.is_done:
                break
            ahead.advance(int(rng.choice(np.flatnonzero(ahead.mask()))))
        assert (watched.mask() == want).all()
        if plain.is_done:
            break
        token = int(rng.choice(np.flatnonzero(want)))
        plain.advance(token)
        watched.advance(token)
