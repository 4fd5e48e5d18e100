"""edge-bench: the first token of a long prompt when nothing of it is known, or its prefix is."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

from edge_runtime.cli.measure import run
from edge_runtime.cli.workload import RandomTokens
from edge_runtime.serving.session import Session

TAIL = 8  # tokens of the prompt after the prefix


@dataclass(slots=True)
class FirstToken:
    """Milliseconds to the first token of each round. computed: nothing was known; cached: the prefix was in
    the cache; loaded: a fresh session had loaded it from a file. loading: what that took.

    cached_tokens: of the prompt, found in the cache. same: every way gave the same token.
    """

    tokens: int
    computed: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)
    loaded: list[float] = field(default_factory=list)
    loading: list[float] = field(default_factory=list)
    cached_tokens: int = 0
    file_bytes: int = 0
    same: bool = True

    def as_dict(self) -> dict[str, Any]:
        def ms(values: list[float]) -> dict[str, float]:
            return {"median_ms": statistics.median(values), "min_ms": min(values), "max_ms": max(values)}

        return {
            "prefix_tokens": self.tokens,
            "prompt_tokens": self.tokens + TAIL,
            "cached_tokens": self.cached_tokens,
            "computed": ms(self.computed),
            "cached": ms(self.cached),
            "loaded": ms(self.loaded),
            "loading": ms(self.loading),
            "file_bytes": self.file_bytes,
            "same_tokens": self.same,
        }


def measure_first_token(
    session: Session, reopen: Callable[[], Session], tokens: int, repeat: int
) -> FirstToken:
    """Prompts of a prefix of `tokens` tokens and a tail of their own. Closes the session, so that the one
    that `reopen` makes finds its memory free.
    """
    draw = RandomTokens(session)
    prefix, tails = draw(tokens), [draw(TAIL) for _ in range(repeat)]
    found = FirstToken(tokens)
    firsts = []
    run(session, draw(tokens), 1)  # warm
    with tempfile.TemporaryDirectory(prefix="edge-bench-") as folder:
        file = Path(folder) / "prefix"
        for tail in tails:
            session.forget_prefixes()
            done = run(session, prefix + tail, 1)
            firsts.append(done.tokens)
            found.computed.append(done.timing.ttft_ms)
            session.forget_prefixes()
            run(session, prefix, 1)
            done = run(session, prefix + tail, 1)
            found.same &= done.tokens == firsts[-1]
            found.cached.append(done.timing.ttft_ms)
            found.cached_tokens = done.usage.cached_tokens
        session.save_prefix(prefix, file)
        found.file_bytes = file.stat().st_size
        session.close()
        with reopen() as fresh:
            run(fresh, draw(TAIL), 1)
            for tail, first in zip(tails, firsts, strict=True):
                fresh.forget_prefixes()
                begin = perf_counter()
                fresh.load_prefix(file)
                found.loading.append(1e3 * (perf_counter() - begin))
                done = run(fresh, prefix + tail, 1)
                found.same &= done.tokens == first
                found.loaded.append(done.timing.ttft_ms)
    return found
