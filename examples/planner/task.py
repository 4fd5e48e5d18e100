"""The held-out commands as a task file for edge-build: accuracy is then measured in the build itself.

python examples/planner/task.py -o build/commands.jsonl --limit 200
edge-build --profile auto --task build/commands.jsonl --min-accuracy 0.97 examples/planner/model
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cases import read_cases

HERE = Path(__file__).resolve().parent
MOST_NEW_TOKENS = 200


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--limit", type=int)
    options = parser.parse_args()
    with options.output.open("w", encoding="utf-8") as out:
        for command, plan in read_cases(options.heldout, options.limit):
            messages = [{"role": "user", "content": command}]
            case = {"messages": messages, "expected": plan, "scoring": "json", "max_tokens": MOST_NEW_TOKENS}
            out.write(json.dumps(case) + "\n")


if __name__ == "__main__":
    main()
