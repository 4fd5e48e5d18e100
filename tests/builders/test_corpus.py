"""What a model is calibrated on: ids against libraries that the runtime does not use, choices by seed,
mistakes named by file and line; text of the model's own against its own probabilities."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hf_folders import llama_config, write_model
from tokenizers import Tokenizer

from builders import calibration_text, evaluation_text
from builders.archs import read_program
from builders.corpus import BUILTIN, SELF, CorpusOptions, default_source, make_corpus
from builders.parts import Checkpoint, Extras, open_contents
from builders.texts import ModelText
from edge_runtime.errors import BadConfig

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'narrator' %}{{ raise_exception('no narrator') }}{% endif %}"
    "{{ m['role'][0] + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a' }}{% endif %}"
)
CHAT = [{"role": "user", "content": "bring it"}, {"role": "assistant", "content": "I have brought it"}]


def write_chat_model(folder: Path) -> Path:
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    write_model(folder, llama_config(vocab_size=259, max_position_embeddings=64))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    return folder


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkpoint]:
    folder = write_chat_model(tmp_path_factory.mktemp("corpus") / "chatty")
    with open_contents(folder, Extras(), None) as contents:
        yield contents.target


def ids_of(checkpoint: Checkpoint, text: str) -> list[int]:
    found: list[int] = Tokenizer.from_buffer(checkpoint.source.tokenizer_json).encode(text).ids
    return found


def test_a_text_is_cut_into_windows_that_begin_with_bos(chatty: Checkpoint, tmp_path: Path) -> None:
    text = "".join(f"line {i} of the story.\n" for i in range(20))
    (tmp_path / "story.txt").write_text(text)
    corpus = make_corpus(chatty, tmp_path / "story.txt", CorpusOptions(length=32))
    stream = [1, *ids_of(chatty, text)]  # bos begins the document, and each window after
    assert corpus.name == "story.txt" and corpus.windows.dtype == np.int32
    rows = [stream[:32]] + [[1, *stream[a : a + 31]] for a in range(32, len(stream) - 30, 31)]
    assert corpus.windows.tolist() == rows
    assert corpus.tokens == len(rows) * 32


def test_windows_are_chosen_by_the_seed_in_their_order(chatty: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("".join(f"{i} bottles on the wall, " for i in range(100)))
    whole = make_corpus(chatty, tmp_path / "a.txt", CorpusOptions(length=16)).windows.tolist()
    chosen = [
        make_corpus(chatty, tmp_path / "a.txt", CorpusOptions(20, 16, s)).windows.tolist() for s in (1, 1, 2)
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    for rows in chosen:
        at = [whole.index(row) for row in rows]
        assert len(rows) == 20 and at == sorted(set(at))


def test_a_short_text_gives_one_window_of_its_length(chatty: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("twelve chars")
    assert make_corpus(chatty, tmp_path / "a.txt", CorpusOptions()).windows.shape == (1, 13)
    (tmp_path / "a.txt").write_text("few")
    with pytest.raises(BadConfig, match=r"a\.txt gives 4 tokens to calibrate on, at least 8 are needed"):
        make_corpus(chatty, tmp_path / "a.txt", CorpusOptions())


def test_a_folder_is_its_texts_by_name_without_repetitions(chatty: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second text. " * 3)
    (tmp_path / "a.txt").write_text("first text. " * 3)
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n{"text": "third"}\n\n{"text": "first text. "}\n')
    (tmp_path / "d.bin").write_bytes(b"\xff\xfe")
    corpus = make_corpus(chatty, tmp_path, CorpusOptions(length=20))
    documents = ["first text. " * 3, "second text. " * 3, "third", "first text. "]
    stream = [i for text in documents for i in (1, *ids_of(chatty, text))]
    rows, at = [], 0
    while True:
        start = [] if stream[at] == 1 else [1]
        if at + 20 - len(start) > len(stream):
            break
        rows.append([*start, *stream[at : at + 20 - len(start)]])
        at += 20 - len(start)
    assert corpus.windows.tolist() == rows and corpus.name == tmp_path.name
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(BadConfig, match=r"holds no file that ends in \.txt, \.md, \.jsonl"):
        make_corpus(chatty, empty, CorpusOptions())


def test_chats_go_through_the_template_as_transformers_has_it(chatty: Checkpoint, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(chatty.source.folder)
    lines = [{"messages": CHAT}, {"prompt": "ab", "completion": "cdefg"}]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, lines)))
    corpus = make_corpus(chatty, tmp_path / "chats.jsonl", CorpusOptions(length=37))
    chat = theirs.apply_chat_template(CHAT, tokenize=False)
    stream = theirs(chat, add_special_tokens=False)["input_ids"]
    assert stream[0] == 1 and stream[-1] == 2  # its own bos: none is added
    stream += [1, *ids_of(chatty, "ab"), *ids_of(chatty, "cdefg"), 2]
    assert corpus.windows.tolist() == [stream[:37]]


def test_mistakes_name_file_and_line(chatty: Checkpoint, tmp_path: Path) -> None:
    def read(name: str, data: bytes | str) -> None:
        (tmp_path / name).write_bytes(data.encode() if isinstance(data, str) else data)
        make_corpus(chatty, tmp_path / name, CorpusOptions())

    good = '{"text": "a text that is long enough"}\n'
    for line, message in (
        ("nonsense", r"a\.jsonl, line 2 is not JSON"),
        ("[1]", r'a\.jsonl, line 2: expected \{"text"\}'),
        ('{"text": 1}', "line 2: expected"),
        ('{"text": "abc", "more": 1}', "line 2: expected"),
        ('{"messages": [{"role": "user"}, {}]}', "line 2: message 0: missing key 'content'"),
        (json.dumps({"messages": CHAT[::-1]}), "line 2: the chat must end with the assistant's answer"),
        (
            json.dumps({"messages": [{"role": "narrator", "content": "x"}, CHAT[1]]}),
            "line 2: the chat template refuses the messages: .*no narrator",
        ),
        ('{"text": "\\ud800"}', "line 2: .*not valid Unicode"),
    ):
        with pytest.raises(BadConfig, match=message):
            read("a.jsonl", good + line)
    with pytest.raises(BadConfig, match=r"b\.txt is not UTF-8 text \(byte 3\)"):
        read("b.txt", b"abc\xff")
    with pytest.raises(BadConfig, match=r"nowhere\.txt: No such file"):
        make_corpus(chatty, tmp_path / "nowhere.txt", CorpusOptions())
    for options, message in (
        (CorpusOptions(length=65), "--sample-tokens 65: expected 8 to 64, the model's context"),
        (CorpusOptions(length=4), "--sample-tokens 4"),
        (CorpusOptions(samples=0), "--samples 0"),
    ):
        with pytest.raises(BadConfig, match=message):
            make_corpus(chatty, BUILTIN, options)


def test_a_chat_without_a_template_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": CHAT}))
    with (
        open_contents(write_model(tmp_path / "plain"), Extras(), None) as contents,
        pytest.raises(BadConfig, match=r"a\.jsonl, line 1 is a chat, but the model has no chat template"),
    ):
        make_corpus(contents.target, tmp_path / "a.jsonl", CorpusOptions())


def test_a_large_text_is_read_in_part(
    chatty: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "large.txt").write_text("".join(f"line {i}\n" for i in range(100_000)))
    read: list[int] = []
    encode = ModelText.encode

    def counted(self: ModelText, text: str, where: str) -> list[int]:
        read.append(len(text))
        return encode(self, text, where)

    monkeypatch.setattr(ModelText, "encode", counted)
    corpus = make_corpus(chatty, tmp_path / "large.txt", CorpusOptions(samples=4, length=32))
    assert corpus.windows.shape == (4, 32)
    assert sum(read) < 300_000 < (tmp_path / "large.txt").stat().st_size


def test_the_built_in_text_is_not_the_one_that_builds_are_measured_on(chatty: Checkpoint) -> None:
    mine, theirs = (
        {s.strip() for s in re.split(r"[.!?\n]", text) if s.strip()}
        for text in (calibration_text.TEXT, evaluation_text.TEXT)
    )
    assert not mine & theirs and len(mine) > 100
    assert 6000 < len(calibration_text.TEXT) < 10_000
    corpus = make_corpus(chatty, BUILTIN, CorpusOptions())
    assert corpus.windows.shape[1] == 64 and len(corpus.windows) > 100
    assert corpus.name == calibration_text.NAME


def test_small_models_write_their_own_text_and_large_ones_do_not() -> None:
    small = read_program(llama_config()).program
    assert default_source(small, CorpusOptions()) == SELF
    large = llama_config(
        hidden_size=512, intermediate_size=2048, num_hidden_layers=12, max_position_embeddings=2048
    )
    assert default_source(read_program(large).program, CorpusOptions()) == BUILTIN
    assert default_source(read_program(large).program, CorpusOptions(samples=16)) == SELF


def test_own_text_follows_the_models_own_probabilities(real_model: Path) -> None:
    """The mean loss of sampled tokens is the mean entropy, up to the noise of sampling: by transformers."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    with open_contents(real_model, Extras(), None) as contents:
        windows = make_corpus(contents.target, SELF, CorpusOptions(samples=40, length=64)).windows
    assert windows.shape == (40, 64) and set(windows[:, 0]) == {1}
    model = transformers.AutoModelForCausalLM.from_pretrained(real_model, dtype=torch.float32).eval()
    ids = torch.from_numpy(windows).long()
    with torch.no_grad():
        log = model(ids).logits[:, :-1].double().log_softmax(-1)
    loss = -log.gather(-1, ids[:, 1:, None])[..., 0]
    after_end = ids[:, :-1] == 2  # what follows the other end of text is given, not drawn
    surprise = (loss + (log.exp() * log).sum(-1))[~after_end]
    spread = float(surprise.std()) / len(surprise) ** 0.5
    assert abs(float(surprise.mean())) < 4 * spread < 0.2


def test_own_text_repeats_by_seed_for_any_number_of_cores(
    chatty: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")

    def write(samples: int, seed: int = 1) -> list[list[int]]:
        rows: list[list[int]] = make_corpus(chatty, SELF, CorpusOptions(samples, 48, seed)).windows.tolist()
        return rows

    import torch

    first = write(40)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    assert write(40) == first
    torch.set_num_threads(threads)
    assert write(33) == first[:33]  # one row in the second batch, and the same random numbers
    assert write(40, seed=2) != first


def test_a_model_of_chats_answers_questions(chatty: Checkpoint) -> None:
    pytest.importorskip("torch")
    questions = [[1, *ids_of(chatty, f"u{s}a")] for s in calibration_text.sentences()]
    known = {tuple(q) for q in questions}
    windows = make_corpus(chatty, SELF, CorpusOptions(samples=20, length=64)).windows.tolist()
    assert len(windows) == 20
    for row in windows:
        starts = [i for i, token in enumerate(row) if token == 1 and (i == 0 or row[i - 1] == 2)]
        assert starts[0] == 0
        for at in starts:
            assert any(tuple(row[at : at + len(q)]) == q[: 64 - at] for q in known)


def test_own_text_is_written_once_for_builds_of_the_same_model(
    chatty: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    path, options = tmp_path / "c" / "own.safetensors", CorpusOptions(4, 24)
    first = make_corpus(chatty, SELF, options, keep=path)
    assert [p.name for p in path.parent.iterdir()] == ["own.safetensors"]
    data = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("builders.self_text.write_samples", None)  # nothing is written again
        assert make_corpus(chatty, SELF, options, keep=path).sha256 == first.sha256
    other = make_corpus(chatty, SELF, CorpusOptions(4, 24, seed=2), keep=path)
    assert other.sha256 != first.sha256 and path.read_bytes() != data
    assert make_corpus(chatty, SELF, options, keep=path).sha256 == first.sha256
    assert path.read_bytes() == data
    path.write_bytes(data[:-9])  # cut short
    assert make_corpus(chatty, SELF, options, keep=path).sha256 == first.sha256
