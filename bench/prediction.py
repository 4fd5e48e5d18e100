"""Speed as the planner predicts it, after `edge-bench --calibrate`, against speed as it is.

    OMP_NUM_THREADS=1 python bench/prediction.py [--threads 1] [--clock cpu] [--rounds 5] [--work build/bench]

Engines of the planner, of stories260K (where the shared data is) and of a random Llama of 0.13 B parameters,
in one integer format of 4 bits, one of 8 and mixed by the integer program. Calibration and measurements take
turns, `--rounds` times, so that both meet the same machine; of each measurement the fastest counts. On a
machine that others use, `--clock cpu` with one thread counts the processor's time alone: a thread that waits
for a core is not slower for it. Writes bench/results/<machine>-<date>-prediction-<threads>.json and .md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine
from random_llama import Shape, write_folder

from edge_runtime import open_engine
from edge_runtime.cli.calibrate import Calibration
from edge_runtime.cli.timer import DECODE, Timer, session_times
from edge_runtime.engine.manifest import LANGUAGE
from edge_runtime.engine.profile import Profile, load_profile
from edge_runtime.engine.roofline import Step, prompt_steps, timer

ROOT = Path(__file__).resolve().parent.parent
SMALL = Shape("llama-0.13b", 1024, 10, 16, 4, 2816, 8000)
CONTEXT = 512  # of every engine; shorter where the model's is
CASES = {
    "int4_g64": ("--weights", "int4_g64"),
    "int8_row": ("--weights", "int8_row"),
    "mixed": ("--bits", "6", "--formats", "int4_g64,int4_g32,int8_row,nf4_g64"),
}
FORMATS = ["f16", "int4_g32", "int4_g64", "int8_row", "nf4_g64"]
LIMIT = 0.15  # of what was measured, that a prediction may be off


def build(folder: Path, name: str, case: str, work: Path) -> Path:
    """An engine of a model folder, kept between runs."""
    engine = work / f"{name}-{case}.edge"
    if not engine.is_file():
        argv = ["--profile", "cpu", *CASES[case], "--no-eval", "--context", str(context_of(folder))]
        command = [sys.executable, "-m", "builders.cli", *argv, "-o", str(engine), str(folder)]
        subprocess.run(command, check=True, cwd=ROOT)
    return engine


def context_of(folder: Path) -> int:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return min(CONTEXT, int(config["max_position_embeddings"]))


def measure(engine: Path, clock: Timer) -> tuple[float, float, float]:
    """Seconds to the first token of a prompt of half the context; then of two requests behind it, whose
    difference is DECODE steps."""
    with open_engine(str(engine), backend="cpu", threads=clock.threads, verify=False) as session:
        depth = session.context // 2
        return session_times(session, clock, depth, depth)


def predict(engine: Path, profile: Profile, threads: int) -> tuple[float, float]:
    """The same two, as the planner's model says."""
    with open_engine(str(engine), backend="cpu", threads=threads, verify=False) as session:
        part, plan = session.manifest.parts[LANGUAGE], session.plan
    seconds = timer(part.program, plan.tensors, plan.kv, profile, profile.mode())
    depth = plan.step.context // 2
    found = profile.efficiency.measured
    assert found is not None  # calibrate() has put it there
    first = found.request_us * 1e-6 + seconds(prompt_steps(plan.step, depth))
    return first, seconds([Step(1, depth + DECODE // 2, True)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--limit", type=float, default=1.5, help="seconds for a measurement, all rounds together"
    )
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    args = parser.parse_args()
    if args.clock == "cpu" and args.threads != 1:
        parser.error("--clock cpu needs --threads 1: threads that wait for each other use the processor too")
    args.work.mkdir(parents=True, exist_ok=True)
    folders = {"planner": ROOT / "examples" / "planner" / "model"}
    tiny = ROOT.parent / "shared" / "data" / "models" / "stories260K"
    if tiny.is_dir():
        folders["stories260K"] = tiny
    folders[SMALL.name] = write_folder(SMALL, args.work / SMALL.name)
    engines = {
        (name, case): build(folder, name, case, args.work)
        for name, folder in folders.items()
        for case in CASES
    }
    count = time.process_time if args.clock == "cpu" else time.perf_counter
    limit = args.limit / args.rounds
    clock = Timer(args.threads, limit, count)
    calibration = Calibration(load_profile("cpu"), args.threads, FORMATS, limit, count)
    seen: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for round_ in range(args.rounds):
        print(f"round {round_ + 1} of {args.rounds}", file=sys.stderr, flush=True)
        calibration.round(lambda *_: None)
        for key, engine in engines.items():
            seen.setdefault(key, []).append(measure(engine, clock))
    profile = calibration.result().profile
    rows = [
        row
        for key, engine in engines.items()
        for row in compared(key, engine, profile, seen[key], args.threads)
    ]
    write(rows, profile, vars(args) | {"work": args.work.name})
    return 0 if all(abs(row["error"]) <= LIMIT for row in rows) else 1


def compared(
    key: tuple[str, str], engine: Path, profile: Profile, seen: list[tuple[float, float, float]], threads: int
) -> list[dict[str, Any]]:
    """Two rows of an engine: decoding and the first token."""
    # the fastest of each, not of the differences: of those a disturbed short request gives the least
    first, shortest, longest = (min(each) for each in zip(*seen, strict=True))
    step = (longest - shortest) / DECODE
    first_said, step_said = predict(engine, profile, threads)
    model, case = key
    pairs = (("tokens/s", 1 / step_said, 1 / step), ("first token, ms", 1e3 * first_said, 1e3 * first))
    return [
        {
            "model": model,
            "weights": case,
            "what": what,
            "predicted": said,
            "measured": was,
            "error": said / was - 1,
        }
        for what, said, was in pairs
    ]


def write(rows: list[dict[str, Any]], profile: Profile, options: dict[str, Any]) -> None:
    here = machine()
    today = datetime.date.today().isoformat()
    threads = f"{options['threads']}-thread{'' if options['threads'] == 1 else 's'}"
    stem = ROOT / "bench" / "results" / f"cpu-{today}-prediction-{threads}"
    data = {"machine": here, "options": options, "rows": rows, "profile": profile.as_mapping()}
    stem.with_suffix(".json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"Predicted against measured on {here['processor']}, {options['threads']} thread(s), "
        f"{options['clock']} clock, {options['rounds']} rounds, load {here['load']}.",
        "",
        "| model | weights | what | predicted | measured | error |",
        "|---|---|---|---:|---:|---:|",
        *(
            f"| {r['model']} | {r['weights']} | {r['what']} | {r['predicted']:.4g} | {r['measured']:.4g} "
            f"| {100 * r['error']:+.1f}% |"
            for r in rows
        ),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
