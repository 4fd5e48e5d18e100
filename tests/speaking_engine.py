"""A toy engine that can be talked to: random weights, but a real tokenizer and a chat template."""

from __future__ import annotations

import functools
from pathlib import Path

import msgspec
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from toy_engine import toy_manifest, toy_plan, toy_planes, toy_program

from edge_runtime.engine.manifest import Fingerprint, KnownAnswer, Manifest, PartEntry, Vocabulary
from edge_runtime.engine.writer import EngineWriter

TEXT = (
    "Once upon a time there was a robot. It went to the kitchen, grüßte and fetched a red mug. " * 4
).split(".")
SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@functools.cache
def tokenizer_json() -> bytes:
    """A byte-level BPE tokenizer with special tokens and a start token, as Llama 3 has one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIAL])
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer.to_str().encode()


def vocabulary() -> Vocabulary:
    size = Tokenizer.from_buffer(tokenizer_json()).get_vocab_size()
    return Vocabulary(bos=1, eos=(2,), pad=0, size=size)


def write_speaking(
    path: Path,
    *,
    context: int = 64,
    sequences: int = 2,
    template: str | None = TEMPLATE,
    fingerprint: Fingerprint | None = None,
    known_answer: KnownAnswer | None = None,
) -> Manifest:
    """Write the engine; returns its manifest. It is for the cpu profile unless a fingerprint is given."""
    names = vocabulary()
    program = toy_program(vocab=names.size, context=context)
    plan = toy_plan(program, "int8_g32", sequences=sequences)
    planes = {f"language/{name}": array for name, array in toy_planes(program, plan).items()}
    blobs = {"tokenizer.json": tokenizer_json()}
    if template is not None:
        blobs["chat_template"] = template.encode()
    planes |= {f"blob/{name}": np.frombuffer(data, np.uint8) for name, data in blobs.items()}
    manifest = toy_manifest({"language": PartEntry(program=program, plan=plan)}, "speaking")
    manifest = msgspec.structs.replace(
        manifest,
        vocabulary=names,
        blobs={name: len(data) for name, data in blobs.items()},
        fingerprint=fingerprint or manifest.fingerprint,
        known_answer=known_answer,
    )
    with EngineWriter(str(path), 256 * 1024) as writer:
        for name, array in planes.items():
            writer.add(name, array)
        return writer.finish(manifest)
