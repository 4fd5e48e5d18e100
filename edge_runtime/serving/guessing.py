"""How a session guesses ahead: which way an engine offers, what it needs in memory, and loading it."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from edge_runtime.backends.protocol import Backend, DeviceCode, Part
from edge_runtime.engine.file import Engine, EnginePart
from edge_runtime.engine.manifest import DRAFT, medusa_parts
from edge_runtime.engine.memory import part_nbytes, weights_nbytes
from edge_runtime.engine.plan import DRAFT_LENGTH, MAX_DRAFT_LENGTH, KvPlan, StepShape
from edge_runtime.errors import BadConfig, Unsupported, nearest
from edge_runtime.serving.device import check_supports
from edge_runtime.serving.draft import DraftModel
from edge_runtime.serving.lookup import Lookup
from edge_runtime.serving.medusa import NODES, MedusaHeads
from edge_runtime.serving.metrics import Clock
from edge_runtime.serving.speculative import Proposer

AUTO = "auto"
WAYS = ("off", "draft", "lookup", "medusa")
_SMALL = 2 << 20  # bytes of weights


@dataclass(frozen=True, slots=True)
class Guessing:
    """way: one of WAYS; length: tokens guessed at most, the nodes of a tree; parts: the engine's parts that
    it takes, and the sizes to load them with.
    """

    way: str
    length: int
    parts: tuple[tuple[EnginePart, KvPlan, StepShape], ...] = ()
    trees: bool = False

    @property
    def rows(self) -> int:
        """Rows of logits that one sequence needs in a step."""
        return 1 if self.way == "off" else 1 + self.length

    @property
    def weights_nbytes(self) -> int:
        """Bytes of its parts' weights as they lie in the file."""
        return sum(weights_nbytes(part.program, part.plan.tensors) for part, _, _ in self.parts)

    def nbytes(self, backend: str, threads: int) -> int:
        """Bytes of weights, KV cache and buffers beside the language part's."""
        return sum(
            part_nbytes(
                part.program,
                part.plan.tensors,
                kv,
                step,
                threads=_threads(part, threads),
                backend=backend,
            )
            for part, kv, step in self.parts
        )

    def load(
        self, backend: Backend, code: DeviceCode, threads: int, page_tokens: int, clock: Clock
    ) -> Proposer | None:
        """Raises as Backend.load does."""
        executors = [
            backend.load(Part(part.program, part.weights, kv, step, code), threads=_threads(part, threads))
            for part, kv, step in self.parts
        ]
        match self.way:
            case "draft":
                _, _, step = self.parts[0]
                return DraftModel(executors[0], step, page_tokens, self.length, clock)
            case "medusa":
                return MedusaHeads(executors, most=self.length, trees=self.trees, clock=clock)
            case "lookup":
                return Lookup(self.length)
            case _:
                return None


def _threads(part: EnginePart, threads: int) -> int:
    """A small part's steps are shorter than it takes to wake a second thread."""
    return 1 if weights_nbytes(part.program, part.plan.tensors) < _SMALL else threads


def choose_guessing(
    engine: Engine, backend: Backend, asked: str, length: int | None, kv: KvPlan, step: StepShape
) -> Guessing:
    """The way that is asked for. auto: draft model, heads, or the text itself, whichever the engine has
    first; none where a backend's numbers change with the step, for then the text would.

    Raises BadConfig for an unknown way or length, Unsupported for one that the engine has no part for.
    """
    if asked not in (*WAYS, AUTO):
        raise BadConfig(f"unknown way to speculate {asked!r:.60}; {nearest(asked, (*WAYS, AUTO))}")
    if length is not None and not 1 <= length <= MAX_DRAFT_LENGTH:
        raise BadConfig(f"draft length {length}: expected 1 to {MAX_DRAFT_LENGTH}")
    parts = engine.manifest.parts
    heads = medusa_parts(parts)
    way = asked
    if asked == AUTO:
        way = "off" if not backend.exact else "draft" if DRAFT in parts else "medusa" if heads else "lookup"
    elif asked == "draft" and DRAFT not in parts:
        raise Unsupported("this engine has no draft part; build it with edge-build --draft FOLDER")
    elif asked == "medusa" and not heads:
        raise Unsupported("this engine has no Medusa heads; build it with edge-build --medusa FOLDER")
    found = []
    if way == "draft":
        part = engine.part(DRAFT)
        own = msgspec.structs.replace(part.plan.kv, page_tokens=kv.page_tokens, pages=kv.pages)
        shape = msgspec.structs.replace(
            step, context=min(step.context, part.program.max_context), logits=step.sequences
        )
        found = [(part, own, shape)]
    elif way == "medusa":
        for name in heads:
            part = engine.part(name)
            shape = StepShape(
                context=1, sequences=step.sequences, tokens=step.sequences, logits=step.sequences
            )
            found.append((part, msgspec.structs.replace(part.plan.kv, pages=1), shape))
    for part, _, _ in found:
        check_supports(backend, part.program, part.plan.tensors)
    trees = way == "medusa" and not kv.per_channel
    longest = NODES[-1] if trees else DRAFT_LENGTH
    return Guessing(way, length or longest, tuple(found), trees)
