"""What goes into an engine, read from its folders and proved to fit together before anything is planned.

The language part is the model; a draft is a second checkpoint with the same vocabulary; Medusa heads come
from a folder that builders.medusa wrote; adapters are PEFT folders for the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from builders.architecture import Architecture
from builders.archs import read_program
from builders.companions import Companions
from builders.planner import default_context
from builders.reorder import order_inputs
from builders.sources import Source, open_source, read_config, read_vocabulary
from builders.sources.medusa import MedusaConfig, MedusaHeads, head_program, read_medusa_config
from builders.sources.vocabulary import token_ids
from builders.vocabulary_blocks import in_blocks
from builders.weights import Blocks, CheckpointWeights, Model
from edge_runtime.engine import peft
from edge_runtime.engine.adapter import Adapter
from edge_runtime.engine.folder import sha256_of
from edge_runtime.engine.manifest import DRAFT, LANGUAGE, MEDUSA, Origin, Vocabulary
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadCheckpoint, BadConfig, Unsupported, ValueOutOfRange

_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_BAD = (BadCheckpoint, BadConfig, Unsupported, ValueOutOfRange)


@dataclass(frozen=True, slots=True)
class Extras:
    """Folders beside the model: a draft, Medusa heads, adapters by the name that requests will use."""

    draft: Path | None = None
    medusa: Path | None = None
    adapters: Mapping[str, Path] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Part:
    """A model to be quantized and written under `name`."""

    name: str
    program: Program
    weights: Blocks
    origins: dict[str, Origin] = field(default_factory=dict)

    @property
    def model(self) -> Model:
        """The weights of a part that can be run: not those of heads, of which only blocks are read."""
        assert isinstance(self.weights, Model)
        return self.weights


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model folder: the open source, its program, its f32 weights and special ids."""

    source: Source
    architecture: Architecture
    weights: CheckpointWeights
    vocabulary: Vocabulary

    @property
    def program(self) -> Program:
        return self.architecture.program

    def part(self, name: str) -> Part:
        return Part(name, self.program, self.weights, self.architecture.origins())


@dataclass(frozen=True, slots=True)
class Contents:
    """Everything an engine is made of; the language part comes first. `folders`: what else was read, for its
    digests, by the prefix that they get in the provenance."""

    target: Checkpoint
    parts: tuple[Part, ...]
    adapters: dict[str, Adapter]
    folders: dict[str, Source | MedusaHeads | Path]
    notices: list[str]

    @property
    def language(self) -> Part:
        """The model that answers, as it will be quantized: rotated, it is not `target`'s program any more."""
        return self.parts[0]

    def with_language(self, part: Part) -> Contents:
        return replace(self, parts=(part, *self.parts[1:]))

    def companions(self) -> Companions:
        return _companions([part.program for part in self.parts[1:]], self.adapters)

    def sha256(self) -> dict[str, str]:
        """Digest of every file that was read, by name; those beside the model as `draft/…` and so on."""
        found = self.target.source.sha256()
        for prefix, folder in self.folders.items():
            if isinstance(folder, Path):
                digests = {n: sha256_of(folder / n) for n in (peft.CONFIG, peft.WEIGHTS)}
            else:
                digests = folder.sha256()
            found |= {f"{prefix}/{name}": digest for name, digest in digests.items()}
        return found


@contextmanager
def open_contents(
    model: Path, extras: Extras, context: int | None, *, blocks: bool = False
) -> Iterator[Contents]:
    """Read everything that an engine is made of. `context` is the one asked for, in tokens. blocks: the
    model's vocabulary in blocks, where its weights are not quantized yet.

    Raises BadCheckpoint, BadConfig, Unsupported or ValueOutOfRange, which names the folder at fault.
    """
    with ExitStack() as stack:
        target = _checkpoint(stack, model, context, blocks=blocks)
        program = target.program
        planned = default_context(program.max_context, context)
        parts = [target.part(LANGUAGE)]
        folders: dict[str, Source | MedusaHeads | Path] = {}
        notices = list(target.source.notices)
        if extras.draft is not None:
            with _named(f"draft {extras.draft.name!r}"):
                draft = _checkpoint(stack, extras.draft, planned)
                check_same_vocabulary(target, draft)
            parts.append(draft.part(DRAFT))
            folders[DRAFT] = draft.source
            notices += [f"draft: {notice}" for notice in draft.source.notices]
        if extras.medusa is not None:
            with _named(f"Medusa heads {extras.medusa.name!r}"):
                heads = stack.enter_context(MedusaHeads(extras.medusa))
            programs = _head_programs(heads.config, program)
            parts += [Part(f"{MEDUSA}{k}", p, heads.weights(k, p)) for k, p in enumerate(programs, 1)]
            folders["medusa"] = heads
            if heads.config.base_sha256 != _weights_only(target.source.sha256()):
                notices.append(
                    f"the Medusa heads were trained on other weights ({heads.config.base}) than these; "
                    "answers stay right, but fewer of their guesses may be accepted"
                )
        adapters = {}
        for name, folder in extras.adapters.items():
            adapters[name] = read_adapter(name, folder, target.architecture)
            folders[f"lora.{name}"] = folder
        yield Contents(target, tuple(parts), adapters, folders, notices)


def read_companions(extras: Extras, architecture: Architecture, context: int | None) -> Companions:
    """Draft and heads from their configs alone, for a plan without weights. Raises as `open_contents`."""
    program = architecture.program
    planned = default_context(program.max_context, context)
    programs = []
    if extras.draft is not None:
        with _named(f"draft {extras.draft.name!r}"):
            programs.append(read_architecture(read_config(extras.draft)[0], planned).program)
    if extras.medusa is not None:
        programs += _head_programs(read_medusa_config(extras.medusa), program)
    adapters = {name: read_adapter(name, f, architecture) for name, f in extras.adapters.items()}
    return _companions(programs, adapters)


def read_architecture(config: dict[str, Any], context: int | None) -> Architecture:
    """The architecture for the context that will be planned: some rotary tables depend on it."""
    longest = read_program(config).program.max_context
    architecture = read_program(config, context=default_context(longest, context))
    architecture.program.check()
    return architecture


def read_planned(
    model: Path, context: int | None, *, blocks: bool = False
) -> tuple[Architecture, dict[str, str]]:
    """What a plan without a build needs: the architecture, and tensor -> format of a checkpoint that is
    already quantized and there with its weights ({} for any other). blocks and errors as `open_contents`.
    """
    architecture = read_architecture(read_config(model)[0], context)
    if model.name == "config.json" or (model.is_dir() and not any(model.glob("*.safetensors"))):
        return in_blocks(architecture) if blocks else architecture, {}
    with open_source(model) as source:
        if not source.quantized:
            return in_blocks(architecture) if blocks else architecture, {}
        ordered = order_inputs(architecture, source.orders())
        return ordered, CheckpointWeights(ordered, source).kept()[0]


def read_adapter(name: str, folder: Path, architecture: Architecture) -> Adapter:
    """A PEFT folder as updates of the model's tensors. Raises as `engine.peft.read_peft`."""
    if not _NAME.fullmatch(name):
        raise BadConfig(f"--lora {name!r}: a name has 1 to 64 letters, digits, dots, dashes and underscores")
    with _named(f"adapter {name!r}"):
        return peft.read_peft(folder, architecture.origins(), architecture.program)


def check_same_vocabulary(target: Checkpoint, draft: Checkpoint) -> None:
    """A draft proposes ids, so every id must mean the same token. Raises BadCheckpoint naming both models."""
    pair = f"{draft.source.name!r} and {target.source.name!r}"
    size, wanted = draft.program.vocab_size, target.program.vocab_size
    if size != wanted:
        raise BadCheckpoint(f"{pair} have vocabularies of {size} and {wanted} tokens; a draft needs the same")
    if set(draft.vocabulary.eos) != set(target.vocabulary.eos):
        raise BadCheckpoint(
            f"{pair} end a text with ids {sorted(draft.vocabulary.eos)} and "
            f"{sorted(target.vocabulary.eos)}; a draft needs the same"
        )
    if draft.source.tokenizer_json == target.source.tokenizer_json:
        return
    have, want = ({i: t for t, i in token_ids(c.source).items() if i < wanted} for c in (draft, target))
    different = sorted(i for i in have.keys() | want.keys() if have.get(i) != want.get(i))
    if different:
        i = different[0]
        raise BadCheckpoint(
            f"{pair} differ in {len(different)} tokens, such as id {i}: {have.get(i)!r} and {want.get(i)!r}; "
            "a draft needs the same tokenizer"
        )


def _checkpoint(stack: ExitStack, folder: Path, context: int | None, *, blocks: bool = False) -> Checkpoint:
    source = stack.enter_context(open_source(folder))
    architecture = order_inputs(read_architecture(source.config, context), source.orders())
    if blocks and not source.quantized:
        architecture = in_blocks(architecture)
    weights = CheckpointWeights(architecture, source)
    return Checkpoint(source, architecture, weights, read_vocabulary(source, architecture.program.vocab_size))


def _head_programs(config: MedusaConfig, target: Program) -> list[Program]:
    return [head_program(config.hidden_size, config.vocab_size, target.max_context)] * config.heads


def _companions(programs: list[Program], adapters: Mapping[str, Adapter]) -> Companions:
    drafts = [program for program in programs if program.input_width is None]
    ranks = ({tensor: update.rank for tensor, update in adapter.items()} for adapter in adapters.values())
    return Companions(
        draft=drafts[0] if drafts else None,
        heads=tuple(program for program in programs if program.input_width is not None),
        adapters=tuple(ranks),
    )


def _weights_only(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if name.endswith(".safetensors")}


@contextmanager
def _named(what: str) -> Iterator[None]:
    """Says in an error which of the folders it is about."""
    try:
        yield
    except _BAD as error:
        raise type(error)(f"{what}: {error}") from error
