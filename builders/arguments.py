"""The options of edge-build."""

from __future__ import annotations

from pathlib import Path

from builders import planner
from builders.observers import OBSERVERS
from builders.quality import EVAL_BACKENDS
from builders.quantize import algorithms
from edge_runtime.cli.output import Parser
from edge_runtime.engine.formats import FORMATS
from edge_runtime.engine.kv import K_FORMATS
from edge_runtime.engine.plan import DRAFT_LENGTH

_EXAMPLES = (
    "edge-build --profile orin-nano-8gb --weights int4_g64 --kv int8 path/to/model",
    "edge-build --profile auto --weights auto -o planner.edge path/to/model",
    "edge-build --profile orin --algorithm gptq --calibration chats.jsonl --max-kl 0.05 path/to/model",
    "edge-build --profile orin --draft path/to/small --lora tidy=path/to/peft path/to/model",
    "edge-build --dry-run --profile orin-nano-8gb --context 8192 path/to/config.json",
    "edge-build --profile orin-nano-8gb --max-memory 3GiB --min-tokens-per-second 20 path/to/model",
    "edge-build --profile orin-agx-64gb --power-mode 30W --eval notes.txt --json path/to/model",
    "edge-build --profile orin --task cases.jsonl --min-accuracy 0.95 --max-kl 0.05 path/to/model",
    "edge-build --matrix fleet.yaml --jobs 2",
    "edge-build --profiles",
)


def make_parser() -> Parser:
    parser = Parser(
        "edge-build",
        "Turn a model folder or a GGUF file into one engine file for one device.",
        _EXAMPLES,
    )
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="Hugging Face folder or .gguf; with --dry-run a config.json too",
    )
    add(
        "--profile", metavar="NAME", help="device: a name of --profiles, a .yaml file, or auto (this machine)"
    )
    add("--profiles", action="store_true", help="list the devices and stop")
    add("--dry-run", action="store_true", help="plan from config.json alone, without weights, and stop")
    add("--plot", type=Path, metavar="FILE", help="draw the plan (.svg or .png)")
    add("-o", "--output", type=Path, metavar="FILE", help="engine to write [MODEL-PROFILE(-WEIGHTS).edge]")
    add(
        "--force",
        action="store_true",
        help="replace a file there that is no engine; write an engine that breaks a quality limit",
    )
    add(
        "--no-device-code",
        action="store_true",
        help="compile no kernels into an engine for a GPU; no cuda device runs it then",
    )
    many = parser.add_argument_group("many engines")
    add = many.add_argument
    add(
        "--matrix",
        type=Path,
        metavar="FILE",
        help="YAML: output, models, profiles, options, variants; models x profiles x variants are built",
    )
    add("--jobs", type=int, metavar="N", help="engines built at once [a quarter of the cores; Ray: its room]")
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="build on the machines of a Ray cluster; they see the same files under the same paths",
    )
    plan = parser.add_argument_group("plan")
    add = plan.add_argument
    add(
        "--weights",
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)}, keep, or auto: a format for each tensor, by the budgets "
        f"[auto with a budget, else the algorithm's own or {planner.DEFAULT_WEIGHTS}]",
    )
    add(
        "--head-weights",
        metavar="FORMAT",
        help="embedding and head [as --weights if float or int8, else int8_row]",
    )
    add(
        "--kv",
        default="int8",
        metavar="FORMAT",
        help=f"{', '.join(K_FORMATS)} (c: K per channel), K,V such as int8,int4, or auto: by the budgets "
        "[int8]",
    )
    add("--context", type=int, metavar="N", help="longest sequence, tokens [the model's, at most 4096]")
    add("--sequences", type=int, default=4, metavar="N", help="sequences served at once [4]")
    add(
        "--kv-tokens",
        type=int,
        metavar="N",
        help="tokens that the KV cache holds for all of them [--context]",
    )
    add(
        "--step-tokens",
        type=int,
        default=128,
        metavar="N",
        help="tokens of one step; sizes the buffers [128]",
    )
    add("--page-tokens", type=int, default=16, metavar="N", help="tokens of a KV page, 16 or 32 [16]")
    add("--power-mode", metavar="MODE", help="power mode of the profile to predict for [its default]")
    budgets = parser.add_argument_group("budgets: each tensor gets the format that serves them best")
    add = budgets.add_argument
    add("--max-memory", metavar="SIZE", help="all that the engine needs at run time: 3GiB, 900MiB, 2.5GB")
    add("--min-tokens-per-second", type=float, metavar="N", help="predicted decode speed of one sequence")
    add("--max-first-token-ms", type=float, metavar="MS", help="predicted, of a prompt of 512 tokens")
    add("--bits", type=float, metavar="N", help="bits a weight on average, scales included")
    add("--formats", metavar="FORMAT,FORMAT", help="formats to choose from [all that the device runs]")
    add(
        "--sensitivity-file",
        type=Path,
        metavar="FILE",
        help="losses of each tensor and format, measured by a build [modelled]",
    )
    beside = parser.add_argument_group("speculation and adapters")
    add = beside.add_argument
    add(
        "--draft",
        type=Path,
        metavar="FOLDER",
        help="smaller model with the same vocabulary; config.json will do for --dry-run",
    )
    add("--draft-weights", metavar="FORMAT", help="its weights [--weights]")
    add("--draft-kv", metavar="FORMAT", help="its KV cache, one format or K,V [--kv]")
    add(
        "--draft-length",
        type=int,
        metavar="N",
        help=f"tokens proposed at once; sizes the logits [{DRAFT_LENGTH} with --draft or --medusa, else 0]",
    )
    add("--medusa", type=Path, metavar="FOLDER", help="heads that builders.medusa trained on the model")
    add(
        "--lora",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="PEFT folder that requests choose by name; may be repeated",
    )
    add(
        "--prefix",
        type=Path,
        metavar="FILE",
        help="text, or .json with chat messages, whose KV pages go into ENGINE.prefix",
    )
    values = parser.add_argument_group("values and calibration")
    add = values.add_argument
    add(
        "--algorithm",
        default="rtn",
        metavar="NAME",
        help=f"how values are chosen: {', '.join(algorithms())}, or two such as awq+gptq [rtn]",
    )
    add("--observer", metavar="NAME", help=f"how ranges are chosen: {', '.join(OBSERVERS)} [the algorithm's]")
    add(
        "--feedback",
        action="store_true",
        help="calibrate every tensor on what those before it have become: slower, and errors add up less",
    )
    add(
        "--tune",
        type=int,
        metavar="STEPS",
        help="then train all values together on the f32 model's answers to the calibration text [no]",
    )
    add(
        "--activations",
        choices=("int8", "fp8_e4m3"),
        help="round what linears read, as a device with 8-bit products does [as the backend does]",
    )
    add(
        "--activation-scales",
        choices=("dynamic", "static"),
        default="dynamic",
        help="dynamic: one a token; static: one for all, from the calibration [dynamic]",
    )
    add(
        "--rotate",
        type=int,
        nargs="?",
        const=0,
        metavar="SEED",
        help="turn the residual stream by a random Hadamard matrix first: outliers are spread [no]",
    )
    add(
        "--calibration",
        metavar="PATH",
        help="text file, folder, JSONL of chats, builtin, or self: the model's own text [self if small]",
    )
    add("--samples", type=int, default=128, metavar="N", help="windows of it [128]")
    add("--sample-tokens", type=int, metavar="N", help="tokens of a window [512, or the context]")
    add("--seed", type=int, default=1, metavar="N", help="of whatever is drawn by lot [1]")
    add("--calibration-folder", type=Path, metavar="FOLDER", help="keep it there, for other builds too")
    add("--calibration-memory", metavar="SIZE", help="activations in memory, the rest on disk [256MiB]")
    add("--device", default="auto", metavar="NAME", help="cpu, cuda or auto: where to calibrate [auto]")
    add(
        "--sensitivity",
        choices=("kl", "hessian"),
        help="measure each tensor's loss in each format so [kl if small, when formats are chosen]",
    )
    quality = parser.add_argument_group("quality")
    add = quality.add_argument
    add(
        "--eval",
        type=Path,
        metavar="PATH",
        help="text, folder of texts or JSONL of chats to measure perplexity and KL on [built-in]",
    )
    add("--eval-tokens", type=int, default=512, metavar="N", help="tokens of it [512]")
    add(
        "--eval-backend",
        choices=EVAL_BACKENDS,
        default=EVAL_BACKENDS[0],
        help="reference: activations f32; native: as this machine's backend computes [reference]",
    )
    add("--task", type=Path, metavar="FILE", help="JSONL of prompts and right answers to measure accuracy on")
    add("--task-f32", action="store_true", help="the f32 checkpoint's accuracy too [where it is small]")
    add("--max-kl", type=float, metavar="NATS", help="write nothing if mean KL is more (exit code 3)")
    add(
        "--max-ppl-increase",
        type=float,
        metavar="PERCENT",
        help="write nothing if perplexity rises more (exit code 3)",
    )
    add(
        "--min-accuracy",
        type=float,
        metavar="SHARE",
        help="write nothing if less of the task, 0 to 1, is right (exit code 3)",
    )
    add("--no-eval", action="store_true", help="do not measure quality")
    add("--keep-json", type=Path, metavar="FOLDER", help="leave one JSON of every phase there")
    return parser
