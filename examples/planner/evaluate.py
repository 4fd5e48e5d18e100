"""Exact-match plan accuracy of a planner folder, decoded greedily by transformers.

python examples/planner/evaluate.py                       # model/ on heldout.jsonl
python examples/planner/evaluate.py --agreement draft     # and how often draft/ guesses its next token
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from cases import Example, is_right, read_cases
from tokenizers import Tokenizer
from tokens import ASSISTANT, BOS, EOS, PAD, USER
from transformers import LlamaForCausalLM

HERE = Path(__file__).resolve().parent
MOST_NEW_TOKENS = 160
BATCH = 128


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """What the chat template renders for one user message with a generation prompt."""
    return [BOS, USER, *tokenizer.encode(prompt, add_special_tokens=False).ids, ASSISTANT]


@torch.inference_mode()
def decode(model: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """The greedy continuation of each prompt, without </s>, in order."""
    rows = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))  # equal lengths together: little padding
    answers: list[list[int]] = [[] for _ in rows]
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        wide = max(len(rows[n]) for n in chosen)
        ids = torch.tensor([[PAD] * (wide - len(rows[n])) + rows[n] for n in chosen])
        out = model.generate(
            input_ids=ids, attention_mask=(ids != PAD).long(), do_sample=False,
            max_new_tokens=MOST_NEW_TOKENS, eos_token_id=EOS, pad_token_id=PAD, use_cache=True,
        )  # fmt: skip
        for n, row in zip(chosen, out[:, wide:].tolist(), strict=True):
            answers[n] = row[: row.index(EOS)] if EOS in row else row
    return answers


def misses(
    model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Sequence[Example]
) -> Iterator[tuple[str, str, str]]:
    """The (prompt, expected, answer) of each example that the model gets wrong."""
    answers = decode(model, tokenizer, [prompt for prompt, _ in examples])
    for (prompt, expected), ids in zip(examples, answers, strict=True):
        answer = tokenizer.decode(ids)
        if not is_right(answer, expected):
            yield prompt, expected, answer


def accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, examples: Sequence[Example]) -> float:
    return 1.0 - sum(1 for _ in misses(model, tokenizer, examples)) / len(examples)


@torch.inference_mode()
def agreement(
    model: LlamaForCausalLM, draft: LlamaForCausalLM, tokenizer: Tokenizer, prompts: Sequence[str]
) -> tuple[float, float]:
    """Along the target's own greedy plans: how often the draft's next token is the target's, and the mean
    length of the run of such tokens after each position (what speculation can accept, at most 4)."""
    agreed = total = run_sum = 0
    for prompt, answer in zip(prompts, decode(model, tokenizer, prompts), strict=True):
        head, plan = prompt_ids(tokenizer, prompt), [*answer, EOS]
        logits = draft(input_ids=torch.tensor([head + plan])).logits[0]
        guesses = logits.argmax(-1)[len(head) - 1 : -1].tolist()
        same = [guess == token for guess, token in zip(guesses, plan, strict=True)]
        agreed, total = agreed + sum(same), total + len(same)
        for start in range(len(same)):
            window = same[start : start + 4]
            run_sum += window.index(False) if False in window else len(window)
    return agreed / total, run_sum / total


def load(folder: Path) -> tuple[LlamaForCausalLM, Tokenizer]:
    """A planner folder with its f16 weights widened to f32."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=HERE / "model")
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N wrong answers")
    parser.add_argument("--agreement", type=Path, metavar="DRAFT", help="a draft folder to compare")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, tokenizer = load(options.model)
    examples = read_cases(options.heldout, options.limit)
    began = time.monotonic()
    wrong = list(misses(model, tokenizer, examples))
    seconds = time.monotonic() - began
    right = len(examples) - len(wrong)
    print(f"exact match {right}/{len(examples)} = {right / len(examples):.2%} in {seconds:.0f} s")
    for prompt, expected, answer in wrong[: options.show]:
        print(f"> {prompt}\n  want {expected}\n  got  {answer}")
    if options.agreement is not None:
        draft, _ = load(options.agreement)
        rate, run = agreement(model, draft, tokenizer, [prompt for prompt, _ in examples[:500]])
        print(f"draft agrees on {rate:.2%} of tokens; of each 4 guessed, {run:.2f} would be accepted")


if __name__ == "__main__":
    main()
