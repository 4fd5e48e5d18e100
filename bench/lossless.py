"""Greedy speculation on = off: every token, over prompts, ways to guess, draft lengths and KV formats.

    python bench/lossless.py [--prompts 200] [--tokens 64] [--threads 0] [--work build/bench]

The planner with its draft and its Medusa heads on held-out commands; stories260K (where the shared models
are) on pieces of a story, with llama2xs as its draft and heads trained here on its own stories. Guesses are
made at every step, whether they pay or not; eight requests are in flight at once. Answers go on past their
end, so that all have --tokens tokens. Prints a table, writes bench/results/cpu-<date>-lossless.json, and
fails when one token differs.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

from machine import processor
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from builders.cli import main as edge_build
from builders.medusa import main as train_heads
from edge_runtime import Request, Session, open_engine

ROOT = Path(__file__).resolve().parent.parent
PLANNER = ROOT / "examples" / "planner"
SHARED = ROOT.parent / "shared" / "data" / "models"
STORY = ROOT / "tests" / "text" / "story.txt"
KV = ("f16", "int8", "int4")
WAYS = ("draft", "lookup", "medusa")
LENGTHS = range(1, 9)
TOGETHER = 8


def build(name: str, work: Path, model: Path, *beside: str) -> Path:
    engine = work / f"lossless-{name}.edge"
    words = ["--profile", "cpu", "--weights", "int4_g64", "--kv", "f16", "--no-eval", "--context", "256"]
    words += ["--sequences", str(TOGETHER), "--kv-tokens", str(TOGETHER * 256), "--force", *beside]
    if edge_build([*words, "-o", str(engine), str(model)]) != 0:
        raise SystemExit(f"{engine} could not be built")
    return engine


def story_heads(work: Path) -> Path:
    """Medusa heads for stories260K, trained on what the model itself goes on with from pieces of a story."""
    folder, texts = work / "stories260K-heads", work / "stories260K-answers.jsonl"
    if not (folder / "model.safetensors").is_file():
        with open_engine(build("bare", work, SHARED / "stories260K"), speculate="off") as session:
            prompts = pieces(session, 300)
            told = answers(session, prompts, 128, lambda: None)
            lines = (session.tokenizer.decode([*p, *t]) for p, t in zip(prompts, told, strict=True))
            texts.write_text("".join(json.dumps({"text": x}) + "\n" for x in lines), encoding="utf-8")
        words = [str(SHARED / "stories260K"), "--jsonl", str(texts), "--heads", "3", "--steps", "300"]
        if train_heads([*words, "--batch-tokens", "1024", "--rate", "0.003", "-o", str(folder)]) != 0:
            raise SystemExit("the heads of stories260K could not be trained")
    return folder


def commands(session: Session, count: int) -> list[list[int]]:
    lines = (PLANNER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    return [session.chat_prompt([{"role": "user", "content": json.loads(x)["prompt"]}]) for x in lines]


def pieces(session: Session, count: int) -> list[list[int]]:
    """Of 8 to 47 tokens, each from another place."""
    ids = session.tokenizer.encode(STORY.read_text(encoding="utf-8"), start=False)
    start = session.tokenizer.vocabulary.bos
    assert start is not None
    found = []
    for i in range(count):
        at, length = i * 17 % (len(ids) - 48), 7 + i % 40
        found.append([start, *ids[at : at + length]])
    return found


def answers(
    session: Session, prompts: list[list[int]], tokens: int, done: Callable[[], None]
) -> list[list[int]]:
    """The tokens of every answer; `done` is called for each."""
    found: dict[int, list[int]] = {}
    numbers = []
    left = list(reversed(prompts))
    while left or session.in_flight:
        while left and session.in_flight < TOGETHER:
            numbers.append(session.submit(Request(prompt=left.pop(), max_tokens=tokens, ignore_eos=True)))
            found[numbers[-1]] = []
        for event in session.step():
            if event.token is not None:
                found[event.request].append(event.token)
            if event.finish_reason is not None:
                if event.finish_reason != "length":
                    raise SystemExit(f"a request ended with {event.finish_reason}: {event.error}")
                done()
    return [found[number] for number in numbers]


def measure(name: str, engine: Path, options: argparse.Namespace, bar: Progress) -> list[dict[str, Any]]:
    """One row for each KV format and way; lists are by draft length."""
    make = commands if name == "planner" else pieces
    task = bar.add_task(name, total=len(KV) * (1 + len(WAYS) * len(LENGTHS)) * options.prompts, note="")

    def done() -> None:
        bar.advance(task)

    rows = []
    for kv in KV:
        with open_engine(engine, kv=kv, speculate="off", threads=options.threads) as session:
            bar.update(task, note=f"{kv} plain")
            prompts = make(session, options.prompts)
            want = answers(session, prompts, options.tokens, done)
        for way in WAYS:
            row: dict[str, Any] = {"model": name, "kv": kv, "way": way}
            row |= {key: [] for key in ("tokens", "different", "drafted", "accepted")}
            for n in LENGTHS:
                bar.update(task, note=f"{kv} {way} {n}")
                with open_engine(
                    engine, kv=kv, speculate=way, draft_length=n, gated=False, threads=options.threads
                ) as session:
                    got = answers(session, prompts, options.tokens, done)
                    seen = session.metrics.snapshot()
                row["tokens"].append(sum(map(len, got)))
                row["different"].append(sum(g != w for g, w in zip(got, want, strict=True)))
                row["drafted"].append(seen["drafted"])
                row["accepted"].append(seen["accepted"])
            rows.append(row)
    return rows


def show(rows: list[dict[str, Any]], prompts: int) -> Table:
    """Share of the guesses that stood, by draft length, and how many answers are the same."""
    table = Table("model", "kv", "guesses by", *(str(n) for n in LENGTHS), "identical answers")
    for row in rows:
        shares = [f"{a / d:.0%}" if d else "-" for a, d in zip(row["accepted"], row["drafted"], strict=True)]
        count = prompts * len(LENGTHS)
        same = count - sum(row["different"])
        table.add_row(row["model"], row["kv"], row["way"], *shares, f"{same} of {count}")
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    planner = ("--draft", str(PLANNER / "draft"), "--medusa", str(PLANNER / "medusa"))
    engines = {"planner": build("planner", options.work, PLANNER / "model", *planner)}
    if (SHARED / "stories260K" / "model.safetensors").is_file():
        stories = ("--draft", str(SHARED / "llama2xs"), "--medusa", str(story_heads(options.work)))
        engines["stories260K"] = build("stories", options.work, SHARED / "stories260K", *stories)
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
    )
    began = perf_counter()
    rows = []
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        for name, engine in engines.items():
            rows += measure(name, engine, options, bar)
    Console(width=120).print(show(rows, options.prompts))
    different = sum(sum(row["different"]) for row in rows)
    tokens = sum(sum(row["tokens"]) for row in rows)
    record = {
        "machine": processor(),
        "threads": options.threads or len(os.sched_getaffinity(0)),
        "prompts": options.prompts,
        "tokens_each": options.tokens,
        "in_flight": TOGETHER,
        "seconds": round(perf_counter() - began),
        "tokens_compared": tokens,
        "answers_different": different,
        "draft_lengths": list(LENGTHS),
        "runs": "ROWS",
    }
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)  # one a line
    text = json.dumps(record, indent=1).replace('"ROWS"', f"[\n{lines}\n ]")
    target = ROOT / "bench" / "results" / f"cpu-{datetime.date.today().isoformat()}-lossless.json"
    target.write_text(text + "\n", encoding="utf-8")
    print(f"{tokens} tokens compared, {different} answers differ; written: {target.relative_to(ROOT)}")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main())
