"""The known answer: does this device still compute what the builder saw?"""

from __future__ import annotations

import numpy as np

from edge_runtime.backends.protocol import Executor, StepBatch
from edge_runtime.engine.manifest import KnownAnswer
from edge_runtime.engine.plan import StepShape
from edge_runtime.errors import BadRequest, NumericError
from edge_runtime.serving.pages import PagePool


def agreement(executor: Executor, pool: PagePool, step: StepShape, slot: int, known: KnownAnswer) -> int:
    """How many of the known tokens are the greedy choice after those before them. Leaves no page behind.

    All of them agree exactly when greedy decoding repeats the answer. Raises BadRequest when context or free
    pages do not suffice. `slot` must be no running sequence's.
    """
    tokens, prompt = [*known.prompt, *known.answer], len(known.prompt)
    if len(tokens) > step.context:
        raise BadRequest(f"the known answer takes {len(tokens)} tokens, the context is {step.context}")
    pages = pool.open(len(tokens), -(-step.context // pool.page_tokens))
    if pages is None:
        raise BadRequest("the KV cache is in use; verify while no requests are in flight")
    agreed = at = 0
    try:
        while at < len(tokens) - 1:
            # The prompt in chunks, then token by token, as when the answer was made
            count = min(step.tokens, prompt - at) if at < prompt else 1
            pages.extend(count)
            logits = executor.forward(
                StepBatch(
                    tokens=np.array(tokens[at : at + count], np.int32),
                    positions=np.arange(at, at + count, dtype=np.int32),
                    sequence=np.zeros(count, np.int32),
                    page_tables=pages.row[None],
                    logit_rows=np.array([count - 1], np.int32),
                    slots=np.array([slot], np.int32),
                )
            )
            at += count
            agreed += at >= prompt and int(logits[0].argmax()) == tokens[at]
    finally:
        pages.close()
    return agreed


def check_agreement(agreed: int, known: KnownAnswer, backend: str, same_numbers: bool) -> None:
    """Raise NumericError unless enough tokens agree: all with the same numbers, else half of them."""
    total = len(known.answer)
    need = total if same_numbers else -(-total // 2)
    if agreed < need:
        raise NumericError(
            f"the known answer is not repeated: {agreed} of {total} tokens agree, {need} must (made on "
            f"{known.backend}, run on {backend}); do not trust this engine on this device"
        )
