"""Task accuracy: the share of a task file's cases that a model gets right, as a robot would ask it.

Text becomes tokens, and tokens text, by the runtime's own tokenizer and chat template; answers are greedy.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import numpy as np

from builders.runner import Runner
from builders.sources import Source
from builders.task_file import Case, TaskFile, read_json, same_json
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.errors import BadConfig, BadEngineFile, BadRequest, Unsupported
from edge_runtime.serving.chat import ChatTemplate, check_messages
from edge_runtime.serving.tokenizer import Detokenizer, Tokenizer

PLACES = 8  # cases that are answered at once


@dataclass(frozen=True, slots=True)
class _Ready:
    """A case in tokens: the prompt int32 (n,), and each choice (prompt and choice (n + m,), m)."""

    case: Case
    prompt: Array
    choices: tuple[tuple[Array, int], ...]

    @property
    def context(self) -> int:
        """Tokens of the longest sequence that it needs."""
        if self.choices:
            return max(len(ids) for ids, _ in self.choices)
        return len(self.prompt) + self.case.max_tokens


class Task:
    """A task file in the tokens of one model. `context`: tokens of the longest sequence that a case needs."""

    def __init__(self, file: TaskFile, source: Source, vocabulary: Vocabulary, context: int) -> None:
        """Raises BadConfig naming the line of a case that the model, or `context` tokens, cannot take."""
        self.name = file.name
        try:
            self._tokenizer = Tokenizer(source.tokenizer_json, vocabulary)
        except BadEngineFile as error:
            raise BadConfig(f"task file {file.name}: {error}") from None
        template = source.chat_template
        with closing(ChatTemplate((template or "").encode())) as chat:
            self._cases = [self._ready(case, chat if template else None) for case in file.cases]
        self.context = max(ready.context for ready in self._cases)
        for ready in self._cases:
            if ready.context > context:
                raise BadConfig(
                    f"{self.name} line {ready.case.line}: prompt and answer need {ready.context} tokens, the "
                    f"plan's context is {context}; shorten them or max_tokens, or give a longer --context"
                )

    def __len__(self) -> int:
        return len(self._cases)

    @property
    def places(self) -> int:
        """Sequences that a runner for it should hold at once."""
        return min(PLACES, len(self._cases))

    def answered(self, runner: Runner, step: Callable[[str], None] = lambda what: None) -> list[bool]:
        """Whether each case is answered rightly, in the order of the file; `step` hears of every case."""
        right = [False] * len(self._cases)
        asked = [i for i, ready in enumerate(self._cases) if not ready.choices]
        texts = runner.greedy(
            [self._cases[i].prompt for i in asked],
            [self._cases[i].case.max_tokens for i in asked],
            frozenset(self._tokenizer.vocabulary.eos),
            lambda index: step(f"line {self._cases[asked[index]].case.line}"),
        )
        for i, ids in zip(asked, texts, strict=True):
            right[i] = is_right(self._cases[i].case, self._text(self._cases[i], ids))
        for i, ready in enumerate(self._cases):
            if ready.choices:
                sums = [log_likelihood(runner, ids, count) for ids, count in ready.choices]
                right[i] = int(np.argmax(sums)) == ready.case.expected
                step(f"line {ready.case.line}")
        return right

    def _ready(self, case: Case, chat: ChatTemplate | None) -> _Ready:
        try:
            if isinstance(case.prompt, str):
                prompt = self._tokenizer.encode(case.prompt)
                choices = [self._continued(case.prompt, choice) for choice in case.choices]
            elif chat is None:
                raise BadRequest("it has messages, but the model has no chat template; give a prompt")
            else:
                prompt = chat.encode(check_messages(case.prompt), self._tokenizer)
                own = [self._tokenizer.encode(choice, start=False) for choice in case.choices]
                choices = [(prompt + ids, len(ids)) for ids in own]
            if not prompt or not all(0 < count < len(ids) for ids, count in choices):
                raise BadRequest("the prompt or a choice becomes no tokens")
        except BadRequest as error:
            raise BadConfig(f"{self.name} line {case.line}: {error}") from None
        except Unsupported as error:
            raise Unsupported(f"{self.name} line {case.line}: {error}") from None
        return _Ready(
            case, np.array(prompt, np.int32), tuple((np.array(ids, np.int32), n) for ids, n in choices)
        )

    def _continued(self, prompt: str, choice: str) -> tuple[list[int], int]:
        """Tokens of prompt and choice, and how many are the choice's; as lm-evaluation-harness cuts them:
        read as one text, white space at the prompt's end counted to the choice."""
        context = prompt.rstrip()
        if not context:
            context, whole = prompt, prompt + choice
        else:
            whole = context + prompt[len(context) :] + choice
        ids = self._tokenizer.encode(whole)
        return ids, len(ids) - len(self._tokenizer.encode(context))

    def _text(self, ready: _Ready, ids: list[int]) -> str:
        continues = isinstance(ready.case.prompt, str)
        text = Detokenizer(self._tokenizer, ready.prompt.tolist() if continues else None)
        return "".join([*(text.add(token) for token in ids), text.finish()])


def is_right(case: Case, answer: str) -> bool:
    """Whether a generated answer is the expected one. An answer that is no JSON is wrong, not an error."""
    if case.scoring == "exact":
        return answer.strip() == str(case.expected).strip()
    try:
        return same_json(read_json(answer), case.expected)
    except (ValueError, RecursionError):
        return False


def log_likelihood(runner: Runner, ids: Array, count: int) -> float:
    """Sum of the log-probabilities (nats, f64) of the last `count` tokens, each after those before it."""
    total, targets = 0.0, ids[len(ids) - count :]
    for logits in runner.read(0, ids[:-1], count):
        z = logits.astype(np.float64)
        top = z.max(axis=1)
        chosen = z[np.arange(len(z)), targets[: len(z)]]
        total += float((chosen - top - np.log(np.exp(z - top[:, None]).sum(axis=1))).sum())
        targets = targets[len(z) :]
    return total
