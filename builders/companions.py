"""What an engine carries beside its language part, as the planner sees it, and the plan of each.

A draft shares the target's page tables, so it has the same pages, sequences and chunks; it proposes one token
a sequence and step. A Medusa head sees one hidden row a sequence and step and has no cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from edge_runtime.engine.manifest import DRAFT, MEDUSA
from edge_runtime.engine.plan import DRAFT_LENGTH, MAX_DRAFT_LENGTH, KvPlan, StepShape
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig

# Nodes of a Medusa tree: each is a row of every product of the step, so the least likely ones cost more than
# they win. Four heads with 3, 2, 1 and 1 choices make 3 + 6 + 6 + 6 = 21.
TREE_NODES = 32


@dataclass(frozen=True, slots=True)
class Companions:
    """Programs beside the language part's, and the adapters by their ranks: tensor -> rank."""

    draft: Program | None = None
    heads: tuple[Program, ...] = ()
    adapters: tuple[Mapping[str, int], ...] = ()

    def programs(self) -> dict[str, Program]:
        """By part name, in file order."""
        named = {} if self.draft is None else {DRAFT: self.draft}
        return named | {f"{MEDUSA}{k}": head for k, head in enumerate(self.heads, 1)}

    def draft_length(self, asked: int | None) -> int:
        """Tokens that are verified at once beyond the next one; 0 where nothing proposes any."""
        speculates = self.draft is not None or self.heads
        length = (DRAFT_LENGTH if speculates else 0) if asked is None else asked
        if not 0 <= length <= MAX_DRAFT_LENGTH:
            raise BadConfig(f"--draft-length is {length}, expected 0 to {MAX_DRAFT_LENGTH}")
        return length

    def logits(self, length: int, sequences: int, tokens: int) -> int:
        """Rows of logits of one step of at most `tokens`: every proposed token of every sequence is verified,
        and the next one comes on top. The nodes of a Medusa tree are as many rows."""
        rows = length + 1
        if self.heads and length:
            rows = max(rows, TREE_NODES)
        return min(tokens, sequences * rows)


ALONE = Companions()


def companion_shapes(
    name: str, kv: KvPlan, step: StepShape, draft_kv: tuple[str, str]
) -> tuple[KvPlan, StepShape]:
    """KV and step of the companion of that name beside a target with those sizes."""
    if name == DRAFT:
        cache = KvPlan(k=draft_kv[0], v=draft_kv[1], page_tokens=kv.page_tokens, pages=kv.pages)
        tokens = step.tokens
    else:
        cache = KvPlan(k=kv.k, v=kv.v, page_tokens=kv.page_tokens, pages=0)
        tokens = step.sequences
    shape = StepShape(context=step.context, sequences=step.sequences, tokens=tokens, logits=step.sequences)
    return cache, shape


def check_companions(target: Program, beside: Companions, context: int) -> None:
    """Raises BadConfig where a companion's vocabulary, width or longest context is not the target's."""
    for name, program in beside.programs().items():
        if program.vocab_size != target.vocab_size:
            raise BadConfig(
                f"the {name} has a vocabulary of {program.vocab_size} tokens, the model {target.vocab_size}; "
                "both must have the same"
            )
        if program.input_width not in (None, target.hidden_width):
            raise BadConfig(
                f"the {name} was trained on another model: it takes rows of {program.input_width} values, "
                f"this one's have {target.hidden_width}"
            )
        if program.max_context < context:
            raise BadConfig(
                f"the {name} reaches {program.max_context} tokens, {context} are planned; "
                f"use --context {program.max_context}, or another draft"
            )
