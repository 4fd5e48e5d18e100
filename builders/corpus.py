"""Token windows that a model is calibrated on: from files, from the built-in text, or from the model itself.

Windows have equal length, so that batches are dense, and each begins with bos where the model has one. The
text never is the one that builds are measured on, unless a user gives the same file for both.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from builders import calibration_text
from builders.kept_corpus import kept
from builders.parts import Checkpoint
from builders.texts import ModelText, Passage, read_passages
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import Vocabulary
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig

SELF, BUILTIN = "self", "builtin"
LEAST = 8  # tokens of a window: shorter ones say nothing of attention
# Multiply-adds of matrices, twice, that are about a minute of one core. A fixed figure and no measured time:
# the same command must choose the same text on every machine.
SELF_FLOPS = 1.2e12
_OVERSAMPLE = 4  # how many times the tokens needed are read of a text before windows are chosen


@dataclass(frozen=True, slots=True)
class CorpusOptions:
    """How much text: at most `samples` windows of `length` tokens, chosen by `seed`.

    length None: 512, or the context where it is shorter.
    """

    samples: int = 128
    length: int | None = None
    seed: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """windows: int32 (samples, length). `name` says where they are from, without a path."""

    name: str
    windows: Array

    @property
    def tokens(self) -> int:
        return int(self.windows.size)

    @property
    def sha256(self) -> str:
        """Hex digest of the ids and their shape."""
        sha = hashlib.sha256(repr(self.windows.shape).encode())
        sha.update(np.ascontiguousarray(self.windows, "<i4").tobytes())
        return sha.hexdigest()


def window_length(options: CorpusOptions, context: int) -> int:
    """Tokens of a window. Raises BadConfig for options that mean nothing."""
    length = min(512, context) if options.length is None else options.length
    if not LEAST <= length <= context:
        raise BadConfig(f"--sample-tokens {length}: expected {LEAST} to {context}, the model's context")
    if not 1 <= options.samples <= 1 << 20:
        raise BadConfig(f"--samples {options.samples}: expected 1 to {1 << 20}")
    return length


def default_source(program: Program, options: CorpusOptions) -> str:
    """`self` for a model that writes all samples in about a minute of one core, else `builtin`.

    Text of the model's own is nearer to what it was trained on than any that we could ship.
    """
    length = window_length(options, program.max_context)
    work = 2.0 * sum(s.size for s in program.tensors.values() if s.role in ("matrix", "head"))
    return SELF if work * options.samples * length <= SELF_FLOPS else BUILTIN


def corpus_name(program: Program, source: str | Path | None, options: CorpusOptions) -> str:
    """What the corpus of make_corpus() is called, known before any of its text is. Raises BadConfig."""
    if source is None:
        source = default_source(program, options)
    if source == BUILTIN:
        return calibration_text.NAME
    return SELF if source == SELF else Path(source).name


def make_corpus(
    checkpoint: Checkpoint,
    source: str | Path | None,
    options: CorpusOptions,
    device: str = "auto",
    keep: Path | None = None,
) -> Corpus:
    """The windows for a model: `source` is a file, a folder, `self`, `builtin` or None (see default_source).

    What the model writes itself is kept in the file `keep`, and taken from there by another build. A folder
    named like one of the two words is given as ./self. Raises BadConfig, BadCheckpoint, BuildError,
    Unsupported.
    """
    length = window_length(options, checkpoint.program.max_context)
    if source is None:
        source = default_source(checkpoint.program, options)
    name = corpus_name(checkpoint.program, source, options)
    if source == SELF:
        subject = {
            "model": checkpoint.source.sha256(),
            "starts": calibration_text.NAME,
            "samples": options.samples,
            "length": length,
            "seed": options.seed,
        }
        return Corpus(name, kept(keep, subject, lambda: _own_text(checkpoint, options, length, device)))
    passages = [Passage(name, calibration_text.TEXT)] if source == BUILTIN else read_passages(Path(source))
    with ModelText(checkpoint.source, checkpoint.vocabulary) as text:
        documents = _documents(text, passages, options, length)
    windows = _choose(_pack(documents, checkpoint.vocabulary, length, name), options)
    return Corpus(name, windows)


def _own_text(checkpoint: Checkpoint, options: CorpusOptions, length: int, device: str) -> Array:
    from builders.self_text import plain_starts, write_samples  # they need torch

    starts = plain_starts(checkpoint.vocabulary)
    if checkpoint.source.chat_template is not None:
        with ModelText(checkpoint.source, checkpoint.vocabulary) as text:
            asked = [text.question(s, "the model's chat template") for s in calibration_text.sentences()]
        starts = [ids for ids in asked if len(ids) < length // 2] or starts
    return write_samples(
        checkpoint.weights,
        checkpoint.vocabulary,
        starts,
        samples=options.samples,
        length=length,
        seed=options.seed,
        device=device,
    )


def _documents(
    text: ModelText, passages: Sequence[Passage], options: CorpusOptions, length: int
) -> list[tuple[int, ...]]:
    """Ids of the passages in their order, without repetitions; of a large text a seeded choice."""
    wanted = _OVERSAMPLE * options.samples * length
    found: dict[int, tuple[int, ...]] = {}
    seen: set[tuple[int, ...]] = set()
    total = 0
    for i in np.random.default_rng(options.seed).permutation(len(passages)).tolist():
        try:
            before, after = text.split(passages[i])
        except BadConfig:
            for passage in passages[:i]:  # the first that is wrong is told, whichever was drawn first
                text.split(passage)
            raise
        ids = (*before, *after)
        if ids and ids not in seen:
            seen.add(ids)
            found[i] = ids
            total += len(ids)
        if total >= wanted:
            break
    return [found[i] for i in sorted(found)]


def _pack(documents: list[tuple[int, ...]], vocabulary: Vocabulary, length: int, name: str) -> Array:
    """Documents one after another, cut into different windows (n, length); a rest that fills none is dropped.

    A text shorter than one window gives one as long as itself.
    """
    mark = vocabulary.bos
    stream: list[int] = []
    for ids in documents:
        if mark is not None and ids[0] != mark:
            stream.append(mark)
        stream += ids
    length = min(length, len(stream))
    if length < LEAST:
        raise BadConfig(f"{name} gives {len(stream)} tokens to calibrate on, at least {LEAST} are needed")
    rows: dict[tuple[int, ...], None] = {}
    at = 0
    while True:
        start = [] if mark is None or stream[at] == mark else [mark]
        stop = at + length - len(start)
        if stop > len(stream):
            return np.array(list(rows), np.int32)
        rows[tuple(start + stream[at:stop])] = None
        at = stop
        if at == len(stream):
            return np.array(list(rows), np.int32)


def _choose(windows: Array, options: CorpusOptions) -> Array:
    """At most `samples` of them, by the seed, in their order."""
    if len(windows) <= options.samples:
        return windows
    rng = np.random.default_rng((options.seed, 1))
    return np.asarray(windows[np.sort(rng.choice(len(windows), options.samples, replace=False))])
