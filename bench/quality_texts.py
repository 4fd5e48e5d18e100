"""What quality is measured on: the models, and the planner's chats and task as files for edge-build."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from builders.cli import main as edge_build
from edge_runtime import Sampling, open_engine

ROOT = Path(__file__).resolve().parent.parent
PLANNER = ROOT / "examples" / "planner"
SHARED = ROOT.parent / "shared" / "data" / "models"
STORY = ROOT / "tests" / "text" / "story.txt"
MODELS = {
    "planner": PLANNER / "model",
    "stories260K": SHARED / "stories260K",
    "llama2xs": SHARED / "llama2xs",
}


def present() -> dict[str, Path]:
    """The models that are on this machine."""
    return {name: folder for name, folder in MODELS.items() if (folder / "model.safetensors").is_file()}


def chats(work: Path, count: int, *, held_out: bool) -> Path:
    """Commands of the planner's grammar with their plans, as JSONL chats: training or held-out ones."""
    target = work / f"{'heldout' if held_out else 'chats'}-{count}.jsonl"
    if not target.is_file():
        split = ["--split", "heldout"] if held_out else []
        command = [sys.executable, "grammar.py", "--chats", str(target.resolve()), "--count", str(count)]
        subprocess.run([*command, *split], cwd=PLANNER, check=True, stdout=subprocess.DEVNULL)
    return target


def task(work: Path, commands: int) -> Path:
    """The first held-out commands as a task file: the answer must be the same JSON."""
    target = work / f"plans-{commands}.jsonl"
    command = [sys.executable, "task.py", "-o", str(target.resolve()), "--limit", str(commands)]
    subprocess.run(command, cwd=PLANNER, check=True)
    return target


def own_text(work: Path, name: str) -> Path:
    """About 15,000 tokens that a story model writes itself at temperature 1, kept between runs."""
    target = work / f"{name}-own.txt"
    if not target.is_file():
        engine = work / f"{name}-f16.edge"
        words = ["--profile", "cpu", "--weights", "f16", "--head-weights", "f16", "--no-eval"]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            assert edge_build([*words, "-o", str(engine), str(present()[name])]) == 0
        told = []
        with open_engine(str(engine), backend="cpu") as session:
            for seed in range(70):
                start = ("Once upon a time", "One day")[seed % 2]
                events = session.generate(start, Sampling(temperature=1.0, seed=5000 + seed), max_tokens=240)
                told.append(" ".join((start + "".join(e.text for e in events)).split()))
        target.write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return target
