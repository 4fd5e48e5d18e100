"""What speculation wins: planner and cost-padded planner, by way and by draft length, interleaved in one run.

    python bench/speculation.py [--rounds 9] [--threads 2] [--commands 16] [--work build/bench]

Every side answers the same requests, and must give the same tokens as plain decoding. A round times each side
once, in turn; figures are medians of the rounds' ratios to plain decoding of the same round. `useless` are
prompts of random tokens, which the draft was never trained for. Draws the speed-up over the draft length
beside what the formula says, and writes bench/results/<machine>-<date>-speculation.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from padded_planner import write_padded

from builders.cli import main as edge_build
from edge_runtime import Request, Session, open_engine
from edge_runtime.serving.gate import expected

ROOT = Path(__file__).resolve().parent.parent
PLANNER = ROOT / "examples" / "planner"
LENGTHS = (1, 2, 3, 4, 6, 8)
USELESS_TOKENS = 64


def build(model: Path, work: Path, name: str) -> Path:
    """The engine with a draft, and heads where they suit the model."""
    engine = work / f"{name}.edge"
    if not engine.is_file():
        words = ["--profile", "auto", "--weights", "int4_g64", "--kv", "int8", "--no-eval"]
        words += ["--draft", str(PLANNER / "draft"), "--medusa", str(PLANNER / "medusa")]
        if edge_build([*words, "-o", str(engine), str(model)]) != 0:
            raise SystemExit(f"{engine} could not be built")
    return engine


def requests(session: Session, count: int) -> dict[str, list[Request]]:
    """Commands as the planner knows them, and prompts of random tokens."""
    lines = (PLANNER / "heldout.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    commands = [
        session.chat_request([{"role": "user", "content": json.loads(line)["prompt"]}], max_tokens=160)
        for line in lines
    ]
    rng = np.random.default_rng(3)
    low, high = 5, session.tokenizer.vocabulary.size
    useless = [
        Request(prompt=rng.integers(low, high, 24).tolist(), max_tokens=USELESS_TOKENS, ignore_eos=True)
        for _ in range(count)
    ]
    return {"commands": commands, "useless": useless}


def run(session: Session, asked: list[Request]) -> tuple[list[tuple[int, ...]], float]:
    """Tokens of every answer, and seconds from submitting to the end, all requests one after the other."""
    answers = [session.answer(request) for request in asked]
    return [a.tokens for a in answers], sum(a.timing.total_ms for a in answers) / 1e3


def measure(engine: Path, rounds: int, threads: int, count: int, ways: list[str]) -> dict[str, Any]:
    plain = open_engine(engine, speculate="off", threads=threads)
    sides = {way: open_engine(engine, speculate=way, threads=threads) for way in ways}
    fixed = {
        n: open_engine(engine, speculate="draft", draft_length=n, gated=False, threads=threads)
        for n in LENGTHS
    }
    found: dict[str, Any] = {}
    for kind, asked in requests(plain, count).items():
        all_sides: dict[str, Session] = dict(sides)
        if kind == "commands":
            all_sides |= {f"length {n}": session for n, session in fixed.items()}
        ratios: dict[str, list[float]] = {name: [] for name in all_sides}
        speeds: list[float] = []
        for session in all_sides.values():
            session.metrics.reset()
        for round_ in range(rounds + 1):  # the first round warms up and is not counted
            want, seconds = run(plain, asked)
            for name, session in all_sides.items():
                got, took = run(session, asked)
                if got != want:
                    raise SystemExit(f"{engine.name}, {kind}, {name}: other tokens than plain decoding")
                if round_:
                    ratios[name].append(seconds / took)
            if round_:
                speeds.append(sum(map(len, want)) / seconds)
        found[kind] = {"tokens_per_s": statistics.median(speeds), "sides": {}}
        for name, session in all_sides.items():
            drafted, accepted = session.metrics.drafted, session.metrics.accepted
            found[kind]["sides"][name] = {
                "speedup": statistics.median(ratios[name]),
                "slowest": min(ratios[name]),
                "fastest": max(ratios[name]),
                "drafted": drafted,
                "accepted": accepted,
            }
    found["formula"] = formula(plain, fixed)
    for session in (plain, *sides.values(), *fixed.values()):
        session.close()
    return found


def formula(plain: Session, fixed: dict[int, Session]) -> dict[str, float]:
    """Speed-up of each draft length by Leviathan et al. 2023, from measured step times and acceptance."""
    sessions = fixed.values()
    chance = sum(s.metrics.accepted for s in sessions) / sum(s.metrics.tried for s in sessions)
    one = plain.speculation.step_seconds(0)
    return {str(n): expected(chance, n) * one / s.speculation.step_seconds(n) for n, s in fixed.items()}


def plot(results: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axis, (name, found) in zip(figure.subplots(1, len(results)), results.items(), strict=True):
        sides = found["commands"]["sides"]
        measured = [sides[f"length {n}"]["speedup"] for n in LENGTHS]
        low = [m - sides[f"length {n}"]["slowest"] for n, m in zip(LENGTHS, measured, strict=True)]
        high = [sides[f"length {n}"]["fastest"] - m for n, m in zip(LENGTHS, measured, strict=True)]
        axis.errorbar(
            LENGTHS, measured, yerr=[low, high], marker="o", capsize=3, label="measured, end to end"
        )
        axis.plot(LENGTHS, list(found["formula"].values()), "--", label="formula, decoding alone")
        for way, style in (("draft", "-."), ("medusa", ":")):
            if way in sides:
                axis.axhline(sides[way]["speedup"], color="gray", ls=style, label=f"{way}, gated")
        axis.axhline(1.0, color="black", lw=0.8)
        axis.set(title=name, xlabel="draft length", ylabel="speed-up over plain decoding", ylim=(0, None))
        axis.legend(fontsize=7)
    figure.savefig(path)


def show(results: dict[str, Any]) -> None:
    for name, found in results.items():
        for kind in ("commands", "useless"):
            print(f"\n{name}, {kind}: plain {found[kind]['tokens_per_s']:.1f} tokens/s")
            for side, row in found[kind]["sides"].items():
                share = row["accepted"] / row["drafted"] if row["drafted"] else 0.0
                print(
                    f"  {side:10} {row['speedup']:5.2f}x  ({row['slowest']:.2f} to {row['fastest']:.2f})  "
                    f"{row['accepted']}/{row['drafted']} stood ({share:.0%})"
                )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--commands", type=int, default=16)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--only", choices=("planner", "padded"))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    models = {"planner": PLANNER / "model"}
    if options.only != "planner":
        models["padded"] = write_padded(PLANNER / "model", options.work / "padded-planner")
    if options.only == "padded":
        del models["planner"]
    results = {}
    for name, model in models.items():
        engine = build(model, options.work, f"speculation-{name}")
        ways = ["draft", "lookup", "medusa"]
        results[name] = measure(engine, options.rounds, options.threads, options.commands, ways)
    show(results)
    record = {
        "machine": machine(),
        "rounds": options.rounds,
        "commands": options.commands,
        "results": results,
    }
    stem = f"cpu-{datetime.date.today().isoformat()}-speculation"
    folder = ROOT / "bench" / "results"
    (folder / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if len(results) == 2:
        plot(results, folder / f"{stem}.svg")


if __name__ == "__main__":
    main()
