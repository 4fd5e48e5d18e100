"""Quality at equal bytes beside llama.cpp and GPTQModel, on the planner, against its f32 logits.

    python bench/peers_quality.py --chats CHATS.jsonl [--gptqmodel NAME=FOLDER ...] [--work build/bench/peers]

llama.cpp quantizes the same f32 checkpoint itself (llama-cpp-python, no importance matrix); its values are
read back by the gguf package. A folder that GPTQModel wrote is imported value-exact by edge-build. Ours are
built to the same bytes or fewer: `--weights auto --bits B` with GPTQ and feedback against llama.cpp's files,
and the same format with the same embedding (f16) against GPTQModel's. KL is the mean over all tokens of
held-out chats, with f32 activations and cache on all sides, so that the weights alone differ. CHATS are what
ours is calibrated on; give GPTQModel the same. Writes bench/results/cpu-<date>-peers-<names>.json.
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

import gguf_peer
from machine import machine
from quality_texts import MODELS, ROOT, chats

from builders.archs import read_program
from builders.cli import main as edge_build
from builders.evaluate import EvaluationText, compare_models, read_text
from builders.parts import Extras, open_contents
from builders.sources import open_source, read_vocabulary
from builders.weights import CheckpointWeights, Weights
from edge_runtime.engine.plan import KvPlan

KINDS = ("Q5_K_M", "Q4_K_M", "Q3_K_M", "Q2_K")
EXACT = KvPlan(k="f32", v="f32", page_tokens=16, pages=1)
MODEL = MODELS["planner"]


def engine(work: Path, model: Path, words: list[str]) -> dict[str, Any]:
    """edge-build's JSON of an engine with an f32 cache."""
    out = io.StringIO()
    common = ["--profile", "cpu", "--kv", "f32", "--context", "256", "--eval-tokens", "4096", "--json"]
    with contextlib.redirect_stdout(out):
        code = edge_build([*common, *words, "-o", str(work / "engine.edge"), str(model)])
    if code != 0:
        raise SystemExit(f"edge-build {' '.join(words)} failed")
    data: dict[str, Any] = json.loads(out.getvalue())
    return (data["quality"] or {}) | {"bytes": data["plan"]["memory"]["weights"]}  # as stored


def of_peer(exact: Weights, theirs: Weights, text: EvaluationText) -> float:
    return compare_models(exact, theirs, EXACT, text).kl_mean


def ours(work: Path, words: list[str], most: float, parameters: int) -> dict[str, Any]:
    """The best plan of at most `most` bytes: bits are lowered until what is stored, padding and all, is."""
    bits = 8.0 * most / parameters
    while True:
        found = engine(work, MODEL, [*words, "--weights", "auto", "--bits", f"{bits:.4f}"])
        if found["bytes"] <= most:
            return found | {"asked_bits": bits}
        bits *= 0.999 * most / found["bytes"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--chats", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", default=KINDS, help="of llama.cpp's quantizations")
    parser.add_argument("--gptqmodel", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench" / "peers")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    held = chats(args.work, 100, held_out=True)
    common = ["--algorithm", "gptq", "--feedback", "--calibration", str(args.chats), "--eval", str(held)]
    common += ["--sample-tokens", "128", "--calibration-folder", str(args.work / "calibration")]
    rows: list[dict[str, Any]] = []
    with open_source(MODEL) as source:
        config = source.config
        exact = CheckpointWeights(read_program(config), source)
        vocabulary = read_vocabulary(source, exact.program.vocab_size)
        text = read_text(source, vocabulary, held, limit=4096, window=256)
        parameters = sum(s.size for s in exact.program.tensors.values() if s.role != "vector")
        full = gguf_peer.write_f32(MODEL, args.work / "planner-f32.gguf")
        for kind in args.kinds:
            path = gguf_peer.quantize(full, args.work / f"planner-{kind}.gguf", kind)
            heads = (config["num_attention_heads"], config["num_key_value_heads"])
            theirs = gguf_peer.read_quantized(path, exact, *heads)
            row = {"peer": f"llama.cpp {kind}", "bytes": theirs.nbytes, "kinds": theirs.kinds}
            row["kl"] = of_peer(exact, theirs, text)
            mine = ours(args.work, common, theirs.nbytes, parameters)
            rows.append(row | {"ours": mine["kl_mean"], "ours_bytes": mine["bytes"]})
            print(_line(rows[-1]), flush=True)
        for name, _, folder in (word.partition("=") for word in args.gptqmodel):
            with open_contents(Path(folder), Extras(), 256) as contents:
                theirs_kl = of_peer(exact, contents.target.weights, text)
            words = ["--weights", "keep", "--head-weights", "f16", "--no-eval"]
            nbytes = engine(args.work, Path(folder), words)["bytes"]
            bits = json.loads((Path(folder) / "config.json").read_text())["quantization_config"]["bits"]
            for fmt in (f"int{bits}_g64", f"int{bits}_g64_zp"):
                mine = engine(args.work, MODEL, [*common, "--weights", fmt, "--head-weights", "f16"])
                row = {"peer": f"GPTQModel {name}", "bytes": nbytes, "kl": theirs_kl, "format": fmt}
                rows.append(row | {"ours": mine["kl_mean"], "ours_bytes": mine["bytes"]})
                print(_line(rows[-1]), flush=True)
    peers = "-".join([*(["llama.cpp"] if args.kinds else []), *(["gptqmodel"] if args.gptqmodel else [])])
    target = ROOT / "bench" / "results" / f"cpu-{datetime.date.today().isoformat()}-peers-{peers}.json"
    target.write_text(
        json.dumps({"machine": machine(), "tokens": text.predicted, "rows": rows}, indent=1) + "\n"
    )
    print(f"written: {target.relative_to(ROOT)}")
    return 0


def _line(row: dict[str, Any]) -> str:
    less = 100 * (1 - row["ours"] / row["kl"])
    return (
        f"{row['peer']}: {row['bytes']} bytes, KL {row['kl']:.5f}; ours {row.get('format', 'mixed')} "
        f"{row['ours_bytes']} bytes, KL {row['ours']:.5f} ({less:.0f}% less)"
    )


if __name__ == "__main__":
    sys.exit(main())
