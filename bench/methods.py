"""Every method at every width: bytes, KL, perplexity, plan accuracy and build time, by edge-build itself.

    python bench/methods.py [--models planner] [--commands 200] [--tokens 2048] [--work build/bench/methods]

Perplexity and KL are against the f32 checkpoint, with an f16 KV cache and f32 activations: the values alone
differ. The story models are measured on tests/text/story.txt, the planner on held-out chats; plan accuracy is
that of the engine as it runs here. All builds of a model share one calibration on text that the model wrote
itself. The mixed plan has the same bits on average as the uniform format beside it, its head included.
Writes bench/results/cpu-<date>-methods.json, .md and .png; a cell that is already in the work folder is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

from machine import machine
from quality_texts import ROOT, STORY, chats, present, task

from builders.cli import main as edge_build

UNIFORM = {bits: f"int{bits}_g64" for bits in (8, 6, 5, 4, 3, 2)}
ANYWHERE = ("rtn", "hqq", "gptq", "awq", "awq+gptq")
# (bits, method, --weights, --algorithm, more words)
SPECIAL = (
    (8, "smoothquant int8_row", "int8_row", "smoothquant", ()),
    (8, "int8_outlier int8_row_o128", "int8_row_o128", "int8_outlier", ()),
    (8, "fp8 fp8_e4m3_row", "fp8_e4m3_row", "fp8", ()),
    (4, "nf4 nf4_g64", "nf4_g64", "nf4", ()),
    (4, "nf4 nf4_g64_dq", "nf4_g64_dq", "nf4", ()),
    (4, "gptq nf4_g64_dq", "nf4_g64_dq", "gptq", ()),
    (4, "gptq q4_k", "q4_k", "gptq", ()),
    (4, "gptq mxfp4_g32", "mxfp4_g32", "gptq", ()),
    (4, "gptq nvfp4_g16", "nvfp4_g16", "gptq", ()),
    (3, "gptq q3_k", "q3_k", "gptq", ()),
    *((bits, f"{a} tcq{bits}_g64", f"tcq{bits}_g64", a, ()) for bits in (4, 3, 2) for a in ("rtn", "gptq")),
    *(
        (bits, f"gptq, feedback tcq{bits}_g64", f"tcq{bits}_g64", "gptq", ("--feedback",))
        for bits in (4, 3, 2)
    ),
    *(
        (bits, f"gptq, feedback {UNIFORM[bits]}", UNIFORM[bits], "gptq", ("--feedback",))
        for bits in (4, 3, 2)
    ),
    *((bits, f"rotated gptq {UNIFORM[bits]}", UNIFORM[bits], "gptq", ("--rotate",)) for bits in (4, 3, 2)),
    *(
        (bits, "gptq, feedback, mixed plan", "auto", "gptq", ("--bits", f"{bits}.0", "--feedback"))
        for bits in (6, 5, 4, 3)
    ),
)
KEYS = ("bytes", "bits_per_weight", "perplexity", "perplexity_f32", "kl_mean", "kl_p99", "top1_agreement")


def cells() -> list[tuple[int, str, str, str, tuple[str, ...]]]:
    found = [(b, f"{a} {fmt}", fmt, a, ()) for b, fmt in UNIFORM.items() for a in ANYWHERE]
    return sorted([*found, *SPECIAL], key=lambda cell: -cell[0])


def build(model: Path, words: list[str], engine: Path) -> dict[str, Any]:
    """One edge-build; its JSON, or what it refused."""
    out, err = io.StringIO(), io.StringIO()
    began = time.monotonic()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = edge_build([*words, "--json", "-o", str(engine), str(model)])
    if code != 0:
        return {"refused": err.getvalue().strip().splitlines()[-1]}
    data: dict[str, Any] = json.loads(out.getvalue())
    quality = data["quality"]
    row = {key: quality[key] for key in KEYS} | {"seconds": time.monotonic() - began}
    row |= {"phases": data["seconds"], "need": data["plan"]["memory"]["need"]}
    if quality.get("task"):
        row["accuracy"] = quality["task"]["accuracy"]
    return row


def measure(name: str, model: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    common = ["--profile", "cpu", "--kv", "f16", "--eval-tokens", str(args.tokens), "--context", "256"]
    common += ["--sample-tokens", "256", "--samples", str(args.samples)]
    if name == "planner":
        held = chats(args.work, 60, held_out=True)
        common += ["--eval", str(held), "--task", str(task(args.work, args.commands))]
    else:
        common += ["--eval", str(STORY)]
    rows = []
    for bits, method, weights, algorithm, more in cells():
        kept = work / f"{method.replace(' ', '-').replace(',', '')}-{bits}.json"
        if not kept.is_file() and args.bits and bits not in args.bits:
            continue
        if args.only and args.only not in method:
            continue
        if not kept.is_file():
            folder = work / ("rotated" if "--rotate" in more else "calibration")
            words = [*common, "--weights", weights, "--algorithm", algorithm, *more]
            words += ["--calibration-folder", str(folder)]
            row = build(model, words, work / "engine.edge")
            kept.write_text(json.dumps({"bits": bits, "method": method} | row))
        rows.append(json.loads(kept.read_text()))
        print(f"{name} {bits} {method}: {_cell(rows[-1])}", flush=True)
    return rows


def _cell(row: dict[str, Any]) -> str:
    if "refused" in row:
        return str(row["refused"])
    rise = 100 * (row["perplexity"] / row["perplexity_f32"] - 1)
    text = f"{row['bits_per_weight']:.2f} bits, KL {row['kl_mean']:.4f}, perplexity {rise:+.1f}%"
    if "accuracy" in row:
        text += f", plans {row['accuracy']:.1%}"
    return f"{text}, {row['seconds']:.0f} s"


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table for each model."""
    lines = []
    for name, rows in results.items():
        plans = any("accuracy" in row for row in rows)
        lines += [f"### {name}", "", "| bits | method | KiB | bits a weight | KL | perplexity | "]
        lines[-1] += ("exact plans | " if plans else "") + "build |"
        lines.append("|---" * (8 if plans else 7) + "|")
        for row in rows:
            if "refused" in row:
                lines.append(f"| {row['bits']} | {row['method']} | {row['refused']} |" + " |" * (5 + plans))
                continue
            rise = 100 * (row["perplexity"] / row["perplexity_f32"] - 1)
            line = f"| {row['bits']} | {row['method']} | {row['bytes'] / 1024:.0f}"
            line += f" | {row['bits_per_weight']:.2f} | {row['kl_mean']:.5f} | {rise:+.2f}% |"
            line += f" {row['accuracy']:.1%} |" if plans else ""
            lines.append(line + f" {row['seconds']:.0f} s |")
        lines.append("")
    return "\n".join(lines)


def draw(results: dict[str, list[dict[str, Any]]], target: Path) -> None:
    """KL over bits a weight, one panel for each model, one colour for each method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(results), figsize=(5 * len(results), 4.6), squeeze=False)
    for panel, (name, rows) in zip(panels[0], results.items(), strict=True):
        methods: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if "refused" not in row:
                method, _, last = row["method"].rpartition(" ")
                method += " plan" * (last == "plan") + ", trellis" * last.startswith("tcq")
                methods.setdefault(method, []).append((row["bits_per_weight"], max(row["kl_mean"], 1e-7)))
        for method, points in methods.items():
            panel.plot(*zip(*sorted(points), strict=True), marker="o", ms=4, lw=1, label=method)
        panel.set(title=name, xlabel="bits a weight", yscale="log")
        panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("mean KL to f32, nats")
    panels[0][-1].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(target, dpi=90)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="*")
    parser.add_argument("--bits", nargs="*", type=int, help="widths to measure now; others as they are kept")
    parser.add_argument(
        "--only", metavar="WORD", help="methods with this word in their name, in a file of it"
    )
    parser.add_argument("--commands", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=128, help="windows of 256 tokens to calibrate on")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench" / "methods")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    models = {n: f for n, f in present().items() if not args.models or n in args.models}
    results = {name: measure(name, folder, args) for name, folder in models.items()}
    text = table(results)
    print(text)
    name = "-".join(["methods", *([args.only] if args.only else [])])
    target = ROOT / "bench" / "results" / f"cpu-{datetime.date.today().isoformat()}-{name}.json"
    record = {
        "machine": machine(),
        "commands": args.commands,
        "tokens": args.tokens,
        "samples": args.samples,
        "models": results,
    }
    target.write_text(json.dumps(record, indent=1) + "\n")
    target.with_suffix(".md").write_text(text)
    draw(results, target.with_suffix(".png"))
    print(f"written: {target.relative_to(ROOT)}, .md and .png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
