"""Whether a mixed plan beats uniform 4-bit formats: all tensors alike, embedding and head included.

    python bench/mixed_plan.py [--models planner] [--samples 128] [--tune 600] [--work build/bench/mixed]

Values by GPTQ with feedback on both sides, one calibration a model; with `--tune` also tuned end to end, on
both sides. The mixed plan has 4.0 bits a weight on average, scales included, and no more bytes as stored,
padding included, than any of them: `--max-memory` is what the smallest needs. "same bits": mixed plans as
large as two of them. KL is to the f32 model, with f32 activations and an f16 cache, on held-out chats of the
planner, and on 16,000 tokens that the story models write themselves, with other seeds than the calibration's.
Writes bench/results/cpu-<date>-mixed-plan.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

from machine import machine
from methods import build
from quality_texts import ROOT, chats, own_text, present

# The last two have far more bytes: how far the mixed plan's reach is
UNIFORM = ("int4_g128", "int4_g64", "nf4_g64_dq", "int4_g32", "nvfp4_g16", "tcq4_g64", "int4_g32_zp", "q4_k")
SAME_BITS = ("int4_g64", "int4_g32")
TUNED = ("kl_mean", "kl_p99", "perplexity", "top1_agreement", "seconds")


def measure(name: str, model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    common = [
        "--profile",
        "cpu",
        "--kv",
        "f16",
        "--eval-tokens",
        "16384",
        "--context",
        "256",
        "--algorithm",
        "gptq",
    ]
    common += ["--feedback", "--samples", str(args.samples), "--sample-tokens", "256"]
    common += ["--calibration-folder", str(work / "calibration")]
    common += [
        "--eval",
        str(chats(args.work, 60, held_out=True) if name == "planner" else own_text(args.work, name)),
    ]
    rows = []

    def add(plan: str, words: list[str]) -> None:
        row = {"plan": plan} | build(model, [*common, *words], work / "engine.edge")
        if args.tune:
            tuned = build(model, [*common, *words, "--tune", str(args.tune)], work / "engine.edge")
            row |= {"steps": args.tune, "tuned": {key: tuned[key] for key in TUNED}}
        rows.append(row)
        said = (row["bits_per_weight"], row["bytes"], row["kl_mean"], row.get("tuned", {}).get("kl_mean"))
        print(name, plan, *said, flush=True)

    for fmt in args.uniform:
        add(fmt, ["--weights", fmt, "--head-weights", fmt])
    uniform = {row["plan"]: row for row in rows}
    plans = {"mixed": (4.0, min(row["need"] for row in rows))}
    plans |= {
        f"mixed, same bits as {fmt}": (uniform[fmt]["bits_per_weight"], uniform[fmt]["need"])
        for fmt in SAME_BITS
        if fmt in uniform
    }
    for plan, (bits, need) in plans.items():
        add(plan, ["--weights", "auto", "--bits", f"{bits:.6f}", "--max-memory", str(need)])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--tune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--uniform", nargs="*", default=UNIFORM, metavar="FORMAT")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench" / "mixed")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models = {n: f for n, f in present().items() if not args.models or n in args.models}
    results = {name: measure(name, folder, args) for name, folder in models.items()}
    kind = "mixed-plan-tuned" if args.tune else "mixed-plan"
    target = ROOT / "bench" / "results" / f"cpu-{datetime.date.today().isoformat()}-{kind}.json"
    target.write_text(json.dumps({"machine": machine(), "models": results}, indent=1) + "\n")
    print(f"written: {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
