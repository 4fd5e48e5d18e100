"""Whether GPTQ and AWQ beat round-to-nearest in KL whatever the seed: ten of them, four models, two widths.

    python bench/seeds.py [--models planner] [--seeds 10] [--work build/bench/seeds]

The seed draws the calibration text (the model's own, 32 windows of 128 tokens); of the structured random
model (tests/builders/structured_model.py) it draws the weights too. KL is to the f32 model, with f32
activations and an f16 cache: on tests/text/story.txt for the story models, on held-out chats for the planner,
on the built-in text for the random one. Writes bench/results/cpu-<date>-seeds.json.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import sys
from pathlib import Path
from typing import Any

from machine import machine
from quality_texts import ROOT, STORY, chats, present

from builders.cli import main as edge_build

sys.path.insert(0, str(ROOT / "tests" / "builders"))
from structured_model import write_structured

FORMATS = ("int4_g64", "int3_g64")
ALGORITHMS = ("rtn", "awq", "gptq")
RANDOM = "structured"


def kl(work: Path, model: Path, words: list[str]) -> float:
    out, err = io.StringIO(), io.StringIO()
    common = ["--profile", "cpu", "--kv", "f16", "--context", "256", "--eval-tokens", "1024", "--json"]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = edge_build([*common, *words, "-o", str(work / "engine.edge"), str(model)])
    if code != 0:
        raise SystemExit(err.getvalue())
    return float(json.loads(out.getvalue())["quality"]["kl_mean"])


def measure(name: str, folder: Path | None, seed: int, work: Path) -> dict[str, dict[str, float]]:
    """format -> algorithm -> KL of one model and seed."""
    model = folder or write_structured(work / f"structured-{seed}", seed)
    words = ["--seed", str(seed), "--samples", "32", "--sample-tokens", "128"]
    words += ["--calibration-folder", str(work / f"{name}-{seed}")]
    if name == "planner":
        words += ["--eval", str(chats(work, 60, held_out=True))]
    elif name != RANDOM:
        words += ["--eval", str(STORY)]
    return {
        fmt: {a: kl(work, model, [*words, "--weights", fmt, "--algorithm", a]) for a in ALGORITHMS}
        for fmt in FORMATS
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench" / "seeds")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models: dict[str, Path | None] = {**present(), RANDOM: None}
    results: dict[str, Any] = {}
    for name, folder in models.items():
        if args.models and name not in args.models:
            continue
        runs = [measure(name, folder, seed, args.work) for seed in range(1, args.seeds + 1)]
        for fmt in FORMATS:
            wins = {a: sum(r[fmt][a] < r[fmt]["rtn"] for r in runs) for a in ALGORITHMS[1:]}
            middle = {a: sorted(r[fmt][a] for r in runs)[len(runs) // 2] for a in ALGORITHMS}
            found = {"wins": wins, "median_kl": middle, "runs": [r[fmt] for r in runs]}
            results.setdefault(name, {})[fmt] = found
            print(f"{name} {fmt}: better than rtn in {wins} of {len(runs)}; median KL {middle}", flush=True)
    target = ROOT / "bench" / "results" / f"cpu-{datetime.date.today().isoformat()}-seeds.json"
    record = {"machine": machine(), "seeds": args.seeds, "models": results}
    target.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written: {target.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
