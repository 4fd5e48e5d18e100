"""Exact-match plan accuracy of an engine: the figure that every format, cache and backend is judged by.

    python examples/planner/score.py planner.edge                  # heldout.jsonl on the engine's backend
    python examples/planner/score.py planner.edge --backend reference --limit 100
    python examples/planner/score.py planner.edge --heldout ward_heldout.jsonl --lora ward=build/runs/ward

Needs no torch: it is the session a robot would use, with as many commands in flight as the engine allows.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from pathlib import Path

from cases import Example, is_right, read_cases

from edge_runtime import Sampling, Session, open_engine

HERE = Path(__file__).resolve().parent
MOST_NEW_TOKENS = 200


def answers(session: Session, prompts: list[str], adapter: str | None = None) -> list[str]:
    """The greedy answer to each prompt, in order, through a loaded adapter if one is named."""
    texts = [""] * len(prompts)
    waiting, owner = deque(enumerate(prompts)), {}
    while waiting or owner:
        while waiting and len(owner) < session.step_shape.sequences:
            index, prompt = waiting.popleft()
            request = session.chat_request(
                [{"role": "user", "content": prompt}],
                Sampling(temperature=0.0),
                max_tokens=MOST_NEW_TOKENS,
                adapter=adapter,
            )
            owner[session.submit(request)] = index
        for event in session.step():
            texts[owner[event.request]] += event.text
            if event.finish_reason is not None:
                del owner[event.request]
    return texts


def score(session: Session, cases: list[Example], adapter: str | None = None) -> float:
    """Share of cases whose plan is exactly right."""
    found = answers(session, [prompt for prompt, _ in cases], adapter)
    return sum(is_right(a, expected) for a, (_, expected) in zip(found, cases, strict=True)) / len(cases)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--lora", metavar="NAME[=FOLDER]", help="an adapter of the engine, or a PEFT folder")
    options = parser.parse_args()
    name, _, folder = (options.lora or "").partition("=")
    cases = read_cases(options.heldout, options.limit)
    beside = {name: folder} if folder else None
    with open_engine(options.engine, backend=options.backend, adapters=beside) as session:
        began = time.monotonic()
        share = score(session, cases, name or None)
        seconds = time.monotonic() - began
        print(f"exact match {share:.2%} of {len(cases)} commands on {session.backend} in {seconds:.0f} s")


if __name__ == "__main__":
    main()
