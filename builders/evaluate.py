"""What a build costs in quality: the engine's planes against the f32 checkpoint, without torch.

Both models run op by op on the reference backend, layer by layer and one tensor at a time, up to the input of
the logits; the logits are then compared block by block of the vocabulary. The engine's run uses the plan's KV
formats. Activations stay f32: what a backend's int8 activations add is held by its own tests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import Tokenizer

from builders import evaluation_text
from builders.comparison import BLOCK_ITEMS, Comparison, compare, logits
from builders.sources import Source
from builders.weights import EngineWeights, Weights, row_blocks
from edge_runtime.backends.protocol import Backend, Executor, PackedTensor, Part, StepBatch
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.folder import read_capped
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import KnownAnswer, Vocabulary
from edge_runtime.engine.ops import Logits
from edge_runtime.engine.plan import KvPlan, Plan, StepShape
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadCheckpoint, BadConfig

MAX_TEXT = 16 << 20
ANSWER_TOKENS = 16
PROMPT_TOKENS = 8
STEP_TOKENS = 2048  # of one evaluation step: buffers stay small, weights are read seldom
REFERENCE_LIMIT = 200_000_000  # parameters up to which the reference gives the known answer


@dataclass(frozen=True, slots=True)
class EvaluationText:
    """Token ids of the text, cut into windows that the context holds; `name` goes into the quality report."""

    name: str
    windows: tuple[Array, ...]

    @property
    def predicted(self) -> int:
        return sum(len(w) - 1 for w in self.windows)


def read_text(
    source: Source, vocabulary: Vocabulary, path: Path | None, *, limit: int, window: int
) -> EvaluationText:
    """The first `limit` tokens of the file (or of the built-in text), in windows of at most `window` tokens.

    Every window begins with bos where the model has one. Raises BadConfig for a text that is not usable,
    BadCheckpoint for a tokenizer that is not.
    """
    if path is None:
        name, text = evaluation_text.NAME, evaluation_text.TEXT
    else:
        name = path.name
        try:
            text = read_capped(path, MAX_TEXT).decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadConfig(
                f"{path} is not UTF-8 text (byte {error.start}); give a plain text file"
            ) from None
        except BadCheckpoint as error:
            raise BadConfig(f"evaluation text: {error}") from None
    try:
        tokenizer = Tokenizer.from_buffer(source.tokenizer_json)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
    except BaseException as error:  # the library raises bare Exception, and panics on some files
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise BadCheckpoint(f"tokenizer.json cannot be used: {error}") from None
    if ids and max(ids) >= vocabulary.size:
        raise BadCheckpoint(
            f"the tokenizer gives id {max(ids)}, the vocabulary has {vocabulary.size} entries"
        )
    start = [] if vocabulary.bos is None else [vocabulary.bos]
    room = window - len(start)
    ids = ids[:limit]
    count = -(-len(ids) // max(room, 1))  # windows of equal length: a short one would predict from nothing
    pieces = np.array_split(np.array(ids, np.int32), count) if ids and room > 0 else []
    windows = tuple(np.concatenate([start, p]).astype(np.int32) for p in pieces if len(start) + len(p) > 1)
    if not windows:
        raise BadConfig(f"{name} gives {len(ids)} tokens in windows of {window}; at least 2 are needed")
    return EvaluationText(name, windows)


def compare_models(reference: Weights, engine: Weights, kv: KvPlan, text: EvaluationText) -> Comparison:
    """Perplexity, KL and agreement of `engine` (with its KV formats) against `reference` (f32 cache)."""
    exact = msgspec.structs.replace(kv, k="f32", v="f32")
    x_f = hidden_states(reference, exact, text)
    x_q = hidden_states(engine, kv, text)
    targets = np.concatenate([w[1:] for w in text.windows])
    return compare(_logit_blocks(reference, x_f, engine, x_q), targets)


def hidden_states(weights: Weights, kv: KvPlan, text: EvaluationText) -> Array:
    """Inputs of the logits for every token that another follows, f32 (predicted tokens, hidden).

    Windows are taken together up to STEP_TOKENS, for every step reads all weights.
    """
    found = []
    for group in _groups(text.windows):
        tokens = sum(len(w) for w in group)
        pages = [-(-len(w) // kv.page_tokens) for w in group]
        table = np.full((len(group), max(pages)), -1, np.int32)
        for i, n in enumerate(pages):
            table[i, :n] = sum(pages[:i]) + np.arange(n)
        step = StepShape(context=max(map(len, group)), sequences=len(group), tokens=tokens, logits=1)
        sized = msgspec.structs.replace(kv, pages=sum(pages))
        executor = ReferenceExecutor(weights.program, weights, sized, step)
        hidden = executor.run_hidden(
            StepBatch(
                tokens=np.concatenate(group),
                positions=np.concatenate([np.arange(len(w), dtype=np.int32) for w in group]),
                sequence=np.repeat(np.arange(len(group), dtype=np.int32), [len(w) for w in group]),
                page_tables=table,
                logit_rows=np.zeros(0, np.int32),
            )
        )
        executor.close()
        last = np.cumsum([len(w) for w in group]) - 1
        found.append(np.delete(hidden, last, axis=0))
    return np.concatenate(found)


def _groups(windows: tuple[Array, ...]) -> list[list[Array]]:
    groups: list[list[Array]] = [[]]
    for w in windows:
        if groups[-1] and sum(map(len, groups[-1])) + len(w) > STEP_TOKENS:
            groups.append([])
        groups[-1].append(w)
    return groups


def _logit_blocks(f: Weights, x_f: Array, q: Weights, x_q: Array) -> Iterator[tuple[int, Array, Array]]:
    op = f.program.ops[-1]
    assert isinstance(op, Logits)  # Program.check has proved it
    spec = f.program.tensors[op.weight]
    bias_f, bias_q = (None if op.bias is None else w(op.bias)[0] for w in (f, q))
    # Blocks are bounded both in logits and in weights.
    for start, stop in row_blocks(spec.rows, max(len(x_f), spec.cols), BLOCK_ITEMS):
        part = slice(start, stop)
        yield (
            start,
            logits(op, x_f, f.block(op.weight, start, stop), None if bias_f is None else bias_f[part]),
            logits(op, x_q, q.block(op.weight, start, stop), None if bias_q is None else bias_q[part]),
        )


def known_answer(
    profile: Profile,
    program: Program,
    plan: Plan,
    planes: Callable[[str], Mapping[str, Array]],
    text: Array,
) -> KnownAnswer | None:
    """Greedy continuation of the text's first tokens, on the profile's backend if it runs here, else on the
    reference. None when the context is too short, or the model too large for the reference to take minutes.
    """
    if plan.step.context <= ANSWER_TOKENS:
        return None
    prompt = text[: min(PROMPT_TOKENS, plan.step.context - ANSWER_TOKENS)]
    reach = len(prompt) + ANSWER_TOKENS
    # Numbers do not depend on the sizes of a step, so the least that serves is loaded.
    kv = msgspec.structs.replace(plan.kv, pages=-(-reach // plan.kv.page_tokens))
    step = StepShape(context=reach, sequences=1, tokens=len(prompt), logits=1)
    backend = native_backend(profile)
    if backend is not None:
        formats = {name: chosen.format for name, chosen in plan.tensors.items()}
        if backend.supports(program, formats).ok:
            packed = {
                name: PackedTensor(
                    program.tensors[name].rows,
                    program.tensors[name].cols,
                    chosen.format,
                    chosen.packing,
                    planes(name),
                )
                for name, chosen in plan.tensors.items()
            }
            executor = backend.load(Part(program, packed, kv, step))
            return _continue(executor, backend.name, kv, prompt)
    if sum(spec.size for spec in program.tensors.values()) > REFERENCE_LIMIT:
        return None
    weights = EngineWeights(program, plan.tensors, planes)
    return _continue(ReferenceExecutor(program, weights, kv, step), "reference", kv, prompt)


def native_backend(profile: Profile) -> Backend | None:
    """The profile's backend (a file of that name) when it can run here."""
    name = f"edge_runtime.backends.{profile.backend}"
    if importlib.util.find_spec(name) is None:
        return None
    backend: Backend = importlib.import_module(name).BACKEND
    return backend if backend.available().ok else None


def _continue(executor: Executor, backend: str, kv: KvPlan, prompt: Array) -> KnownAnswer:
    """ANSWER_TOKENS greedy tokens; ends of text do not stop it."""
    table = np.arange(kv.pages, dtype=np.int32)[None]
    answer: list[int] = []
    tokens, at = np.ascontiguousarray(prompt, np.int32), 0
    try:
        while len(answer) < ANSWER_TOKENS:
            n = len(tokens)
            scores = executor.forward(
                StepBatch(
                    tokens=tokens,
                    positions=np.arange(at, at + n, dtype=np.int32),
                    sequence=np.zeros(n, np.int32),
                    page_tables=table,
                    logit_rows=np.array([n - 1], np.int32),
                )
            )
            answer.append(int(scores[0].argmax()))
            tokens, at = np.array(answer[-1:], np.int32), at + n
    finally:
        executor.close()
    return KnownAnswer(prompt=tuple(int(t) for t in prompt), answer=tuple(answer), backend=backend)
