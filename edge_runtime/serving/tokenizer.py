"""Text to token ids and back: the engine's tokenizer.json, run by the `tokenizers` library."""

from __future__ import annotations

import re
import threading

from tokenizers import Tokenizer as Library

from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadEngineFile, BadRequest

MAX_TEXT_BYTES = 1 << 20
_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_CONTEXT_TOKENS = 8  # how many tokens of the prompt a continuation is decoded with
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Safe for several threads. Raises BadEngineFile when tokenizer.json cannot be used."""

    def __init__(self, data: bytes, vocabulary: Vocabulary) -> None:
        try:
            self._library = Library.from_buffer(data)
            self._library.no_padding()
            self._library.no_truncation()
            added = self._library.get_added_tokens_decoder()
            size = self._library.get_vocab_size(with_added_tokens=True)
        except BaseException as error:  # the library raises bare Exception, and panics on some files
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            raise BadEngineFile(f"the engine's tokenizer.json cannot be used: {error}") from None
        self.vocabulary = vocabulary
        self._lock = threading.Lock()  # encode_special_tokens is a switch of the library's object
        self._silent = frozenset(i for i, token in added.items() if token.special)
        special = self._silent | {
            i for i in (vocabulary.bos, vocabulary.pad, *vocabulary.eos) if i is not None
        }
        unknown = getattr(self._library.model, "unk_token", None)
        # The unknown token is special too, and yet what ordinary text may become.
        self._control = frozenset(i for i in special if unknown is None or self.piece(i) != unknown)
        self._bytes = frozenset(i for i in range(size) if _BYTE.fullmatch(self.piece(i)))

    def encode(self, text: str, *, start: bool = True, control: bool = False) -> list[int]:
        """Ids of a text. start: add what the tokenizer's post-processor adds, such as bos.

        control: let text such as "</s>" become the special token of that name; otherwise it stays text, so
        that no user's words can end or open a turn. Raises BadRequest for text that is not valid Unicode, has
        more than MAX_TEXT_BYTES bytes of UTF-8, or becomes ids beyond the model's vocabulary.
        """
        check_text(text, "the prompt")
        ids = self._encode(text, start, control)
        for i in ids:
            if i >= self.vocabulary.size:
                raise BadRequest(f"the text becomes token {i}, the model has {self.vocabulary.size} tokens")
        return ids

    def has_control(self, text: str) -> bool:
        """Whether the text, read with `control`, holds a special token."""
        return not self._control.isdisjoint(self._encode(text, False, True))

    def decode(self, ids: list[int]) -> str:
        """Text of ids, special tokens left out."""
        return self._library.decode(ids, skip_special_tokens=True)

    def piece(self, token: int) -> str:
        """The token as the vocabulary spells it, "" for an id without one."""
        return self._library.id_to_token(token) or ""

    def is_silent(self, token: int) -> bool:
        """Whether `decode` leaves it out: a special token, or an id that the tokenizer does not know."""
        return token in self._silent or not self.piece(token)

    def is_byte(self, token: int) -> bool:
        """Whether it is one raw byte, such as ``<0xE2>``: its text depends on its neighbours."""
        return token in self._bytes

    def _encode(self, text: str, start: bool, control: bool) -> list[int]:
        with self._lock:
            self._library.encode_special_tokens = not control
            found = self._library.encode(text, add_special_tokens=start)
        ids: list[int] = found.ids
        if not control and any(
            i in self._control and not added
            for i, added in zip(ids, found.special_tokens_mask, strict=True)  # added by the post-processor
        ):
            raise BadRequest("the text spells a special token that this tokenizer cannot read as plain text")
        return ids


class Detokenizer:
    """Text of a growing list of ids, piece by piece: never half a character, and the pieces joined are
    exactly the whole list decoded at once.

    context: the prompt that the ids continue, so that a first word keeps its leading space. None: on its own.
    """

    def __init__(self, tokenizer: Tokenizer, context: list[int] | None = None) -> None:
        self._tokenizer = tokenizer
        self._ids = _clean_tail(tokenizer, context or [])
        self._start = 0  # decoding begins here: some tokens before what is new, whose text is not empty
        self._shown = len(self._ids)  # text of the ids before this is out
        self._before = tokenizer.decode(self._ids)  # text of the ids from _start to _shown

    def add(self, token: int) -> str:
        """Text that is certain now; "" while a character is incomplete."""
        if self._tokenizer.is_silent(token):
            return ""
        self._ids.append(token)
        if self._tokenizer.is_byte(token):  # a later byte could still change how this run is read
            return ""
        whole = self._tokenizer.decode(self._ids[self._start :])
        text = whole[len(self._before) :]
        if not text or text.endswith(_REPLACEMENT):
            return ""
        alone = self._tokenizer.decode(self._ids[self._shown :])
        if alone:
            self._start, self._before = self._shown, alone
        else:
            self._before = whole
        self._shown = len(self._ids)
        return text

    def finish(self) -> str:
        """What was held back, incomplete characters as U+FFFD."""
        whole = self._tokenizer.decode(self._ids[self._start :])
        text = whole[len(self._before) :]
        self._shown, self._before = len(self._ids), whole
        return text


def check_text(text: object, what: str) -> None:
    """Raise BadRequest unless it is a str of valid Unicode with fewer than MAX_TEXT_BYTES bytes of UTF-8."""
    if not isinstance(text, str):
        raise BadRequest(f"{what} is {type(text).__name__}, expected text")
    try:
        nbytes = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise BadRequest(
            f"{what} is not valid Unicode: a lone surrogate at character {error.start}; give valid UTF-8 text"
        ) from None
    if nbytes >= MAX_TEXT_BYTES:
        raise BadRequest(f"{what} has {nbytes} bytes, expected fewer than {MAX_TEXT_BYTES}; shorten it")


def _clean_tail(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """The last few ids whose text stands for itself: no raw bytes, no special tokens, no half characters."""
    tail: list[int] = []
    for token in reversed(ids[-_CONTEXT_TOKENS:]):
        if tokenizer.is_byte(token) or tokenizer.is_silent(token):
            break
        tail.insert(0, token)
    text = tokenizer.decode(tail)
    return [] if text.startswith(_REPLACEMENT) or text.endswith(_REPLACEMENT) else tail
