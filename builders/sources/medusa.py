"""Folders of trained Medusa heads: medusa_config.json and model.safetensors, as builders.medusa writes them.

Tensors of head K (1 .. heads): `heads.K.proj.weight` (hidden, hidden), `heads.K.proj.bias` (hidden,) and
`heads.K.head.weight` (vocabulary, hidden). Head K: logits = head @ (h + silu(proj @ h + bias)), h being the
input of the target's logits op (Medusa-1, Cai et al. 2024, arXiv 2401.10774).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from edge_runtime.engine.folder import MAX_CONFIG, contained, read_capped, sha256_of
from edge_runtime.engine.formats import Array
from edge_runtime.engine.manifest import MAX_HEADS
from edge_runtime.engine.ops import Activation, Add, Input, Linear, Logits
from edge_runtime.engine.program import MAX_DIM, Program, TensorSpec
from edge_runtime.engine.shard import Shard
from edge_runtime.errors import BadCheckpoint, BadConfig

CONFIG, WEIGHTS = "medusa_config.json", "model.safetensors"
Size = Annotated[int, Meta(ge=1, le=MAX_DIM)]


class MedusaConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the heads were trained on. `base_sha256`: weight files of the frozen base, by name."""

    heads: Annotated[int, Meta(ge=1, le=MAX_HEADS)]
    hidden_size: Size
    vocab_size: Size
    base: str
    base_sha256: dict[str, str]


def tensor_keys(head: int) -> dict[str, str]:
    """Program tensor -> checkpoint tensor of head `head`, counted from 1."""
    names = {"proj": "proj.weight", "proj_bias": "proj.bias", "head": "head.weight"}
    return {tensor: f"heads.{head}.{key}" for tensor, key in names.items()}


def head_program(hidden: int, vocab_size: int, context: int) -> Program:
    """One head on the hidden row (hidden,) of a target with that vocabulary and longest context."""
    program = Program(
        ops=(
            Input(out="h"),
            Linear(x="h", out="u", weight="proj", bias="proj_bias"),
            Activation(x="u", out="u", kind="silu"),
            Add(a="h", b="u", out="h"),
            Logits(x="h", weight="head"),
        ),
        tensors={
            "proj": TensorSpec(hidden, hidden, "matrix"),
            "proj_bias": TensorSpec(1, hidden, "vector"),
            "head": TensorSpec(vocab_size, hidden, "head"),
        },
        buffers={"h": hidden, "u": hidden},
        cache=(),
        vocab_size=vocab_size,
        max_context=context,
    )
    program.check()
    return program


def read_medusa_config(path: Path) -> MedusaConfig:
    """The config of a folder, or the file itself. Raises BadCheckpoint, BadConfig."""
    file = contained(path.resolve(), CONFIG) if path.is_dir() else path
    if not file.exists():
        raise BadCheckpoint(f"{path} has no {CONFIG}; train heads with: python -m builders.medusa MODEL")
    try:
        return msgspec.json.decode(read_capped(file, MAX_CONFIG), type=MedusaConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BadConfig(f"{file.name} of {path.name!r}: {str(error)[:200]}") from None


class MedusaHeads:
    """An open folder of heads; `weights(k)` are those of head k. Close when done."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.resolve().name
        self.config = read_medusa_config(folder)
        self._folder = folder.resolve()
        if not (self._folder / WEIGHTS).exists():
            raise BadCheckpoint(f"{folder} has no {WEIGHTS}; pickles are never read")
        self._shard = Shard(contained(self._folder, WEIGHTS), WEIGHTS)
        try:
            self._check()
        except BaseException:
            self.close()
            raise

    def weights(self, head: int, program: Program) -> HeadWeights:
        return HeadWeights(self._shard, tensor_keys(head), program)

    def sha256(self) -> dict[str, str]:
        """Hex digest of both files, by name."""
        return {name: sha256_of(contained(self._folder, name)) for name in (CONFIG, WEIGHTS)}

    def close(self) -> None:
        self._shard.close()

    def __enter__(self) -> MedusaHeads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(self) -> None:
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        shapes = {"proj": (hidden, hidden), "proj_bias": (hidden,), "head": (vocab, hidden)}
        wanted = {
            key: shapes[tensor]
            for k in range(self.config.heads)
            for tensor, key in tensor_keys(k + 1).items()
        }
        found = {key: entry.shape for key, entry in self._shard.entries.items()}
        for key, shape in wanted.items():
            if key not in found:
                raise BadCheckpoint(f"{self.name!r} lacks tensor {key!r}; {CONFIG} promises it")
            if found[key] != shape:
                raise BadCheckpoint(f"{key!r} has shape {found[key]}, {CONFIG} promises {shape}")
        if surplus := sorted(set(found) - set(wanted)):
            raise BadCheckpoint(f"{self.name!r} holds {surplus[0]!r}, of which {CONFIG} does not speak")


class HeadWeights:
    """f32 blocks of one head's tensors, by the program's names."""

    def __init__(self, shard: Shard, keys: dict[str, str], program: Program) -> None:
        self.program = program
        self._shard = shard
        self._keys = keys

    def block(self, name: str, start: int, stop: int) -> Array:
        """f32 rows [start, stop) of a tensor of the program."""
        spec = self.program.tensors[name]
        if spec.role == "vector":
            return self._shard.read(self._keys[name]).reshape(1, spec.cols)[start:stop]
        return self._shard.read(self._keys[name], (start, stop))

    def stored(self, name: str, fmt: str) -> None:
        """Heads are trained in f32: none is quantized."""
