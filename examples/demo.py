"""`make demo`: build the robot command planner and its draft for this machine and ask for three plans."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from edge_runtime import Grammar, open_engine

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
COMMANDS = (
    "bring me the red mug from the kitchen",
    "go to the pantry then find a sponge and put it on the kitchen table",
    "please follow Anna to the garage",
)


def run(*options: str) -> None:
    """edge-build, shown as it would be typed."""
    print(f"$ edge-build {' '.join(options)}", flush=True)
    done = subprocess.run([sys.executable, "-m", "builders.cli", *options], cwd=ROOT, check=False)
    if done.returncode != 0:
        sys.exit(done.returncode)
    print(flush=True)


def build(target: Path) -> None:
    """The plan first, then the engine, measured on plans: the only language that this model speaks."""
    plans = target.with_name("planner-plans.txt")
    with (HERE / "planner" / "heldout.jsonl").open(encoding="utf-8") as lines:
        plans.write_text("\n".join(json.loads(next(lines))["expected"] for _ in range(40)), encoding="utf-8")
    what = ["--profile", "auto", "--weights", "int4_g64", "--kv", "int8", "--draft", "examples/planner/draft"]
    model = "examples/planner/model"
    run("--dry-run", *what, model)
    run(*what, "--eval", str(plans.relative_to(ROOT)), "-o", str(target.relative_to(ROOT)), model)


def ask(target: Path) -> bool:
    """Print each plan; True when every answer is a JSON list of skill calls.

    The schema makes every plan valid by construction, the draft guesses ahead without changing it, and the
    deadline bounds the wait.
    """
    good = True
    schema = Grammar.json_schema((HERE / "planner" / "plan.schema.json").read_text(encoding="utf-8"))
    with open_engine(target) as session:
        for command in COMMANDS:
            answer = session.chat([{"role": "user", "content": command}], grammar=schema, deadline=5.0)
            print(f"\n> {command}")
            try:
                plan = json.loads(answer.text)
            except json.JSONDecodeError:
                print(f"  not JSON: {answer.text!r}")
                good = False
                continue
            for step in plan:
                arguments = ", ".join(f"{k}={v!r}" for k, v in step.items() if k != "skill")
                print(f"  {step['skill']}({arguments})")
            timing, usage = answer.timing, answer.usage
            guesses = f", {usage.accepted} of {usage.drafted} guesses stood" if usage.drafted else ""
            print(
                f"  [{len(answer.tokens)} tokens, first after {timing.ttft_ms:.1f} ms, "
                f"{timing.tokens_per_s:.0f} tokens/s{guesses}]"
            )
    return good


def main() -> int:
    target = ROOT / "build" / "planner-demo.edge"
    target.parent.mkdir(exist_ok=True)
    build(target)
    return 0 if ask(target) else 1


if __name__ == "__main__":
    sys.exit(main())
