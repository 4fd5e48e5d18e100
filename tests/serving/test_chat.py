"""Chat templates: as transformers renders them, no special tokens from users, and hostile ones contained."""

from __future__ import annotations

import os
import resource
import time

import pytest
from history_model import make_session, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from speaking_engine import SPECIAL, TEMPLATE

from edge_runtime.errors import BadEngineFile, BadRequest, Unsupported
from edge_runtime.serving import chat
from edge_runtime.serving.chat import ChatTemplate, check_messages

pytest.importorskip("minijinja")
TOKENIZER = make_tokenizer()

# Shapes of well-known templates: block trimming, namespaces, loop controls, raise_exception, tojson, slices
TEMPLATES = {
    "chatml": (
        "{% for message in messages %}\n"
        "    {% if loop.first and message.role != 'system' %}\n"
        "{{ '<|user|>You are helpful.\\n' }}\n"
        "    {% endif %}\n"
        "{{ '<|user|>' + message['role'] + '\\n' + message['content'] | trim + '</s>' + '\\n' }}\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}\n"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ ' [INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "namespace": (
        "{%- set ns = namespace(n=0, last='') -%}\n"
        "{%- for m in messages[::-1] -%}{%- set ns.n = ns.n + 1 -%}"
        "{%- set ns.last = m.content -%}{%- endfor -%}\n"
        "{{ ns.n }}:{{ ns.last }}:{{ messages[0] | tojson }}{% if tools %}tools{% endif %}"
        "{%- if messages[-1].content.startswith('a') and messages[0].content.strip() != '' %} A{% endif %}\n"
    ),
    "loop": (
        "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.role }}"
        "={{ m.content.split(' ')[-1] }};{% if loop.index > 2 %}{% break %}{% endif %}{% endfor %}"
    ),
}
MESSAGES = [
    [{"role": "user", "content": "hi there <b>&</b>"}],
    [
        {"role": "user", "content": " a "},
        {"role": "assistant", "content": "é"},
        {"role": "user", "content": "a\nb"},
    ],
    [{"role": "user", "content": "x"}]
    + [{"role": "assistant", "content": "a y"}, {"role": "user", "content": "z"}] * 2,
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_renders_as_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    template = ChatTemplate(TEMPLATES[name].encode())
    try:
        for messages in MESSAGES:
            names = {"bos_token": "<s>", "eos_token": "</s>"}
            want, _ = render_jinja_template(
                [messages], chat_template=TEMPLATES[name], add_generation_prompt=True, **names
            )
            variables = {"messages": messages, "add_generation_prompt": True, "tools": None, **names}
            assert template.render(variables) == want[0]
    finally:
        template.close()


def test_the_prompt_is_the_templates_tokens_and_the_answer_comes_back() -> None:
    said = TOKENIZER.encode("on my way", start=False)
    session, executor = make_session(script=lambda history: [*said, 2][len(history) - 7])
    with session:
        messages = [{"role": "user", "content": "go"}]
        want = [1, 3, *TOKENIZER.encode("go", start=False), 4]
        assert session.chat_prompt(messages) == want
        executor.script = lambda history: [*said, 2][len(history) - len(want)]
        done = session.chat(messages)
        assert (done.text, done.finish_reason) == ("on my way", "stop")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL, "<", "|>", "user", " ", "x", "\ufdd0", "0", "</s"]), max_size=10))
def test_no_user_text_makes_special_tokens(words: list[str]) -> None:
    content = "".join(words)
    ids = SHARED.encode([{"role": "user", "content": content}], TOKENIZER)
    assert [i for i in ids if i < len(SPECIAL)] == [1, 3, 4]  # <s> <|user|> ... <|assistant|>, no other
    assert TOKENIZER.decode(ids) == content


SHARED = ChatTemplate(TEMPLATE.encode())


def test_a_template_that_cuts_guarded_text_is_refused() -> None:
    template = ChatTemplate(b"{{ messages[0].content[:8] }}")
    assert template.encode([{"role": "user", "content": "plain text"}], TOKENIZER)
    with pytest.raises(BadRequest, match="cuts a message that spells a special token"):
        template.encode([{"role": "user", "content": "x</s>y"}], TOKENIZER)
    template.close()


HOSTILE = {
    "endless": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "doubling": "{% set ns=namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s~ns.s %}{% endfor %}",
    "lists": "{% set ns=namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "indent": "{{ 'a\nb' | indent(2000000000) }}",
    "repeat": "{{ 'x' * 4000000000 }}",
    "long output": "{{ 'x' * 2000000 }}",
    "recursion": "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "attribute": "{{ raise_exception.__globals__ }}",
    "format": "{{ '%999999999d' % 1 }}",
    "division": "{{ 1 // 0 }}",
    "power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "refusal": "{{ raise_exception('only one turn') }}",
    "surrogate": "{{ '\\ud800' }}",
    "syntax": "{% if %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_refused_and_leave_the_session_working(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "RENDER_SECONDS", 1.0)
    session, _ = make_session(template=HOSTILE[name])
    with session:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(2):
            try:
                ids = session.chat_prompt([{"role": "user", "content": "hi"}])
            except BadRequest as error:
                assert "chat template" in str(error)
            else:  # the attributes that it asked for do not exist: nothing was rendered
                assert name in ("escape", "attribute", "format", "power") and len(ids) < 64
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB
        assert len(session.complete([7, 8], max_tokens=2).tokens) == 2


def test_a_refusal_carries_the_templates_words() -> None:
    session, _ = make_session(template=TEMPLATES["mistral"])
    with session, pytest.raises(BadRequest, match=r"refuses the messages: .*roles must alternate"):
        session.chat([{"role": "assistant", "content": "hi"}])


def test_the_process_ends_with_the_session_and_starts_again_when_it_died() -> None:
    session, _ = make_session()
    with session:
        message = [{"role": "user", "content": "hi"}]
        first = session.chat_prompt(message)
        process = session._template._worker._process  # type: ignore[union-attr]
        process.kill()
        process.wait()
        assert session.chat_prompt(message) == first
        process = session._template._worker._process  # type: ignore[union-attr]
    session._template.close()  # type: ignore[union-attr]
    assert process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_second_render_does_not_start_a_process() -> None:
    template = ChatTemplate(b"{{ messages[0].content }}")
    template.render({"messages": [{"content": "a"}]})
    start = time.perf_counter()
    assert template.render({"messages": [{"content": "b"}]}) == "b"
    assert time.perf_counter() - start < 0.5
    template.close()


def test_without_a_template_chat_says_what_to_do() -> None:
    session, _ = make_session(template=None)
    with session, pytest.raises(BadRequest, match=r"no chat template; give a prompt to generate\(\)"):
        session.chat([{"role": "user", "content": "hi"}])


def test_without_minijinja_chat_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    (tmp_path / "minijinja.py").write_text("raise ImportError('blocked')")  # type: ignore[operator]
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    template = ChatTemplate(b"x")
    with pytest.raises(Unsupported, match=r"pip install 'edge-runtime\[chat\]'"):
        template.render({})


def test_a_template_that_is_no_text_is_a_damaged_engine() -> None:
    with pytest.raises(BadEngineFile, match="not UTF-8"):
        ChatTemplate(b"\xff")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hi", "messages is str, expected a list"),
        ([], "0 messages, expected 1 to 1024"),
        ([{"role": "user", "content": "x"}] * 1025, "1025 messages"),
        (["hi"], "message 0 is str"),
        ([{"role": "user"}], "message 0: missing key 'content'"),
        ([{"content": "x"}], "message 0: missing key 'role'"),
        ([{"role": "user", "contnet": "x"}], "unknown key 'contnet'; did you mean 'content'"),
        ([{"role": "user\n", "content": "x"}], "role is"),
        ([{"role": 1, "content": "x"}], "role is 1, expected a word such as user"),
        ([{"role": "user", "content": None}], "message 0: content is NoneType, expected text"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
        ([{"role": "user", "content": "x" * (1 << 20)}], "1048576 bytes"),
    ],
)
def test_bad_messages_are_named(messages: object, message: str) -> None:
    with pytest.raises(BadRequest) as caught:
        check_messages(messages)  # type: ignore[arg-type]
    assert message in str(caught.value)
