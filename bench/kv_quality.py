"""Quality of the KV cache's formats against its bytes, for every pair of K and V.

    python bench/kv_quality.py [--commands 300] [--tokens 2048] [--work build/bench]

Weights are f16 throughout, so that the cache alone differs. Perplexity and KL against the f32 cache are the
reference backend's, on the models' own kind of text: tests/text/story.txt for the story models, the plans
after their commands for the planner. Plan accuracy is the cpu backend's, by examples/planner/score.py. K per
channel is measured with pages of 16 and of 32 tokens, for its bytes and its unquantized page depend on them.
Prints a Markdown table and writes bench/results/cpu-<date>-kv-quality.json and .png.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from machine import processor

from builders.archs import read_program
from builders.cli import main as edge_build
from builders.comparison import compare, logits
from builders.evaluate import EvaluationText, read_text
from builders.hidden import hidden_states
from builders.sources import open_source, read_vocabulary
from builders.weights import CheckpointWeights
from edge_runtime import Session, open_engine
from edge_runtime.engine.formats import Array
from edge_runtime.engine.kv import CHANNEL_FORMATS, row_nbytes
from edge_runtime.engine.plan import KvPlan
from edge_runtime.engine.program import Program

ROOT = Path(__file__).resolve().parent.parent
PLANNER = ROOT / "examples" / "planner"
SHARED = ROOT.parent / "shared" / "data" / "models"
MODELS = {
    "planner": PLANNER / "model",
    "stories260K": SHARED / "stories260K",
    "llama2xs": SHARED / "llama2xs",
}
V_NAMES = ("f16", "int8", "fp8", "int4")
K_NAMES = ("f16", "int8", "int8c", "fp8", "int4", "int4c")
CASES = [(k, v, 16) for k in K_NAMES for v in V_NAMES] + [
    (k, v, 32) for k in CHANNEL_FORMATS for v in V_NAMES
]

sys.path.insert(0, str(PLANNER))  # the example's scripts import one another by plain names
import score  # noqa: E402
from cases import Example, read_cases  # noqa: E402


class HalfWeights:
    """A checkpoint's weights rounded to f16, as an engine of f16 has them; vectors stay f32."""

    def __init__(self, weights: CheckpointWeights) -> None:
        self.program: Program = weights.program
        self._weights = weights

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        values = self._weights.block(name, start, stop)
        return values if self.program.tensors[name].role == "vector" else _half(values)

    def rows(self, name: str, ids: Array) -> Array:
        return _half(self._weights.rows(name, ids))


def _half(values: Array) -> Array:
    return values.astype(np.float16).astype(np.float32)


def token_nbytes(program: Program, k: str, v: str, page_tokens: int) -> float:
    """Bytes of one token's keys and values in all layers, its share of scales included."""
    return sum(
        slot.kv_heads
        * (row_nbytes(k, slot.head_dim, page_tokens) + row_nbytes(v, slot.head_dim, page_tokens))
        for slot in program.cache
    )


@dataclass(frozen=True)
class Measured:
    """A text, and which of its predicted tokens count: all, or those that the model was trained to give."""

    text: EvaluationText
    counted: Array  # bool (text.predicted,)


def measure_text(folder: Path, chosen: Measured | None, tokens: int) -> dict[str, Any]:
    """Figures of a model for each of CASES against its f32 cache; `chosen` None is the story."""
    found: dict[str, Any] = {"cases": []}
    with open_source(folder) as source:
        weights = HalfWeights(CheckpointWeights(read_program(source.config), source))
        program = weights.program
        if chosen is None:
            vocabulary = read_vocabulary(source, program.vocab_size)
            story = ROOT / "tests" / "text" / "story.txt"
            text = read_text(source, vocabulary, story, limit=tokens, window=program.max_context)
            chosen = Measured(text, np.ones(text.predicted, bool))
        text, rows = chosen.text, np.flatnonzero(chosen.counted)
        targets = np.concatenate([w[1:] for w in text.windows])[rows]
        exact = _logits(weights, KvPlan(k="f32", v="f32", page_tokens=16, pages=1), text)[rows]
        for k, v, page_tokens in CASES:
            kv = KvPlan(k=k, v=v, page_tokens=page_tokens, pages=1)
            c = compare(iter([(0, exact, _logits(weights, kv, text)[rows])]), targets)
            found["perplexity_f32"] = c.perplexity_f32
            found["cases"].append(
                {
                    "k": k, "v": v, "page_tokens": page_tokens,
                    "bytes_per_token": token_nbytes(program, k, v, page_tokens), "perplexity": c.perplexity,
                    "kl_mean": c.kl_mean, "kl_p99": c.kl_p99, "top1_agreement": c.top1_agreement,
                }
            )  # fmt: skip
    lengths = [len(w) for w in text.windows]
    return found | {"text": text.name, "tokens": len(rows), "windows": len(lengths), "window": max(lengths)}


def _logits(weights: HalfWeights, kv: KvPlan, text: EvaluationText) -> Array:
    """Logits of every predicted token, f32 (tokens, vocab): the models here have small vocabularies."""
    op = weights.program.heads[0]
    return logits(op, hidden_states(weights, kv, text.windows), weights(op.weight), None)


def chats(session: Session, cases: list[Example], tokens: int) -> Measured:
    """Commands with their plans as the planner meets them, one window each, about `tokens` tokens in all; the
    plans count, for nobody ever taught it to guess commands.
    """
    windows: list[Array] = []
    counted: list[Array] = []
    for prompt, expected in cases:
        if sum(len(w) for w in windows) >= tokens:
            break
        asked = session.chat_prompt([{"role": "user", "content": prompt}])
        ids = [*asked, *session.tokenizer.encode(expected, start=False)]
        windows.append(np.array(ids, np.int32))
        counted.append(np.arange(1, len(ids)) >= len(asked))
    return Measured(EvaluationText("plans of heldout.jsonl", tuple(windows)), np.concatenate(counted))


def build_planner(work: Path, page_tokens: int) -> Path:
    engine = work / f"planner-f16-{page_tokens}.edge"
    if not engine.is_file():
        words = ["--profile", "cpu", "--weights", "f16", "--kv", "f16", "--context", "320", "--no-eval"]
        words += ["--sequences", "16", "--kv-tokens", str(16 * 320), "--page-tokens", str(page_tokens)]
        if edge_build([*words, "-o", str(engine), str(MODELS["planner"])]) != 0:
            raise SystemExit(f"{engine} could not be built")
    return engine


def plan_accuracy(engines: dict[int, Path], cases: list[Example]) -> list[float]:
    """Share of exactly right plans on the cpu backend, for each of CASES."""
    found = []
    for k, v, page_tokens in CASES:
        with open_engine(engines[page_tokens], backend="cpu", kv=f"{k},{v}", speculate="off") as session:
            found.append(score.score(session, cases))
        print(f"planner {k},{v} pages of {page_tokens}: {found[-1]:.2%}", flush=True)
    return found


def table(results: dict[str, Any]) -> str:
    """One row for each case, in Markdown; cells are perplexity change, KL, bytes a token."""
    names = list(results)
    lines = [
        "| K, V (page) | " + " | ".join(f"{n}: bytes, perplexity, KL" for n in names) + " | exact plans |",
        "|---" * (len(names) + 2) + "|",
    ]
    for i, (k, v, page_tokens) in enumerate(CASES):
        cells = []
        for name in names:
            case = results[name]["cases"][i]
            rise = 100 * (case["perplexity"] / results[name]["perplexity_f32"] - 1)
            cells.append(f"{case['bytes_per_token']:.0f}, {rise:+.2f}%, {case['kl_mean']:.5f}")
        plans = results["planner"]["cases"][i]["exact_plans"]
        page = f" ({page_tokens})" if k in CHANNEL_FORMATS else ""
        lines.append(f"| {k}, {v}{page} | " + " | ".join(cells) + f" | {plans:.1%} |")
    return "\n".join(lines)


def draw(results: dict[str, Any], title: str, target: Path) -> None:
    """KL over bytes a token, one panel for each model: colour is K, shape is V."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colours = dict(
        zip(K_NAMES, ("tab:gray", "tab:blue", "tab:cyan", "tab:green", "tab:red", "tab:orange"), strict=True)
    )
    shapes = dict(zip(V_NAMES, "osD^", strict=True))
    figure, panels = pyplot.subplots(1, len(results), figsize=(13, 4.6), squeeze=False)
    for panel, (name, found) in zip(panels[0], results.items(), strict=True):
        for case in found["cases"]:
            filled = colours[case["k"]] if case["page_tokens"] == 16 else "none"
            panel.scatter(
                case["bytes_per_token"], max(case["kl_mean"], 1e-8), s=42, marker=shapes[case["v"]],
                edgecolors=colours[case["k"]], facecolors=filled,
            )  # fmt: skip
        panel.set(title=name, xlabel="bytes a token", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean KL to the f32 cache, nats")
    marks = [
        pyplot.Line2D([], [], marker="o", ls="", color=colour, label=f"K {k}")
        for k, colour in colours.items()
    ]
    marks += [
        pyplot.Line2D([], [], marker=s, ls="", color="black", mfc="none", label=f"V {v}")
        for v, s in shapes.items()
    ]
    marks.append(
        pyplot.Line2D([], [], marker="o", ls="", color="tab:orange", mfc="none", label="pages of 32")
    )
    figure.legend(handles=marks, loc="center right", frameon=False)
    figure.suptitle(title)
    figure.tight_layout(rect=(0, 0, 0.9, 1))
    figure.savefig(target, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--commands", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    engines = {size: build_planner(args.work, size) for size in (16, 32)}
    cases = read_cases(PLANNER / "heldout.jsonl", args.commands)
    with open_engine(engines[16], backend="cpu") as session:
        text = chats(session, cases, args.tokens)
    results: dict[str, Any] = {}
    for name, folder in MODELS.items():
        if not (folder / "model.safetensors").is_file():
            print(f"{name} is not at {folder}: left out")
            continue
        results[name] = measure_text(folder, text if name == "planner" else None, args.tokens)
        print(f"{name}: {results[name]['tokens']} tokens measured", flush=True)
    for case, share in zip(results["planner"]["cases"], plan_accuracy(engines, cases), strict=True):
        case["exact_plans"] = share
    print(table(results))
    today = datetime.date.today().isoformat()
    target = ROOT / "bench" / "results" / f"cpu-{today}-kv-quality.json"
    cores = len(os.sched_getaffinity(0))
    record = {
        "machine": processor(),
        "threads": cores,
        "weights": "f16",
        "commands": len(cases),
        "models": results,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    draw(results, f"KV cache, weights f16 ({processor()})", target.with_suffix(".png"))
    print(f"written: {target.relative_to(ROOT)} and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
