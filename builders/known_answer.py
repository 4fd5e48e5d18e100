"""The known answer of an engine: a short greedy continuation that every healthy device must repeat."""

from __future__ import annotations

import numpy as np

from builders.device_code import DeviceCode
from builders.runner import REFERENCE, Stored, backend_with, engine_runner, formats_of
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import KnownAnswer
from edge_runtime.engine.plan import Plan
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program

ANSWER_TOKENS = 16
PROMPT_TOKENS = 8
REFERENCE_LIMIT = 200_000_000  # parameters up to which the reference gives it, in some minutes


def known_answer(
    profile: Profile,
    program: Program,
    plan: Plan,
    stored: Stored,
    text: Array,
    code: DeviceCode | None = None,
) -> KnownAnswer | None:
    """Greedy continuation of the text's first tokens, on the profile's backend if it runs here, else on the
    reference; ends of text do not stop it. None when the context is too short, or the model too large for the
    reference to take minutes.
    """
    if plan.step.context <= ANSWER_TOKENS:
        return None
    prompt = np.ascontiguousarray(text[: min(PROMPT_TOKENS, plan.step.context - ANSWER_TOKENS)], np.int32)
    backend = backend_with(profile, code)
    if backend is None or not backend.supports(program, formats_of(plan)).ok:
        if sum(spec.size for spec in program.tensors.values()) > REFERENCE_LIMIT:
            return None
        backend = REFERENCE
    context = len(prompt) + ANSWER_TOKENS
    with engine_runner(backend, program, plan, stored, context=context, code=code) as runner:
        (answer,) = runner.greedy([prompt], [ANSWER_TOKENS], ())
    return KnownAnswer(prompt=tuple(int(t) for t in prompt), answer=tuple(answer), backend=backend.name)
