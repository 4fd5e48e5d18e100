"""The vocabulary's matrices cut into blocks of token ids, each a tensor that the planner gives a format.

How often a token comes up falls about as the inverse of its rank (Zipf 1949), and tokenizers give ids about
in that order: bytes and a few control tokens first, then pieces as training merged them, the commonest first.
So the rows of embedding and head matter very unequally, and one format for all of them, in a small model a
third of all weights, spends most of its bits on rows that hardly any answer depends on. Blocks double in
length, for the first pieces differ most.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import groupby

import msgspec
import numpy as np

from builders.architecture import Architecture
from edge_runtime.engine.formats import Array
from edge_runtime.engine.formats.trellis import RUN
from edge_runtime.engine.ops import AnyOp, Embed, Logits
from edge_runtime.engine.program import Program, TensorSpec

UNSEEN = 1 / 32  # of the loss of all rows is shared out as if all mattered alike: a text knows few tokens


def bounds(vocab_size: int) -> list[tuple[int, int]]:
    """(first id, end) of each block: whole circles of the trellis formats, each as long as all before it."""
    starts = [0]
    while (following := max(RUN, 2 * starts[-1])) < vocab_size:
        starts.append(following)
    return list(zip(starts, [*starts[1:], vocab_size], strict=True))


def in_blocks(architecture: Architecture) -> Architecture:
    """The same model with embedding and head in blocks. As it is, where they have columns in another order
    or the head has a bias."""
    program, sources = architecture.program, dict(architecture.sources)
    heads = program.heads
    tables = {op.weight for op in program.ops if isinstance(op, Embed)} | {op.weight for op in heads}
    ordered = any(sources[name].columns is not None for name in tables)
    if ordered or len(heads) > 1 or heads[0].bias is not None or program.vocab_size <= RUN:
        return architecture
    tensors: dict[str, TensorSpec] = {}
    for name, spec in program.tensors.items():
        if name not in tables:
            tensors[name] = spec
            continue
        source = sources.pop(name)
        start = source.rows[0] if source.rows else 0
        for first, end in bounds(spec.rows):
            tensors[_name(name, first)] = TensorSpec(end - first, spec.cols, spec.role)
            sources[_name(name, first)] = replace(source, rows=(start + first, start + end))
    ops = tuple(block for op in program.ops for block in _blocks(op, program.vocab_size))
    made = msgspec.structs.replace(program, ops=ops, tensors=tensors)
    made.check()
    return Architecture(made, sources)


def _name(tensor: str, first: int) -> str:
    return f"{tensor}.{first}"


def _joined_name(block: str) -> str:
    return block.rpartition(".")[0]


def _blocks(op: AnyOp, vocab_size: int) -> Iterator[AnyOp]:
    if not isinstance(op, Embed | Logits):
        yield op
        return
    for first, _ in bounds(vocab_size):
        yield msgspec.structs.replace(op, weight=_name(op.weight, first), first=first)


def vocabularies(program: Program) -> list[dict[str, int]]:
    """Of each embedding and head that lies in several blocks: tensor -> its first token id, in order."""
    found: list[dict[str, int]] = []
    vocabulary = (op for op in program.ops if isinstance(op, Embed | Logits))
    for _, ops in groupby(vocabulary, lambda op: (type(op), getattr(op, "out", ""))):
        blocks = {op.weight: op.first for op in ops}
        if len(blocks) > 1 and blocks not in found:
            found.append(blocks)
    return found


def inside(ids: Array, first: int, rows: int) -> Array:
    """Which token ids a block with so many rows from `first` on has."""
    return np.asarray((ids >= first) & (ids < first + rows))


def joined(program: Program) -> Program:
    """The program with each embedding and head in one matrix again."""
    cut = {name for blocks in vocabularies(program) for name in blocks}
    ops = tuple(
        msgspec.structs.replace(op, weight=_joined_name(op.weight))
        if isinstance(op, Embed | Logits) and op.weight in cut
        else op
        for op in program.ops
        if not (isinstance(op, Embed | Logits) and op.first)
    )
    tensors: dict[str, TensorSpec] = {}
    for name, spec in program.tensors.items():
        if name in cut:
            name, spec = _joined_name(name), msgspec.structs.replace(spec, rows=program.vocab_size)
        tensors[name] = spec
    return msgspec.structs.replace(program, ops=ops, tensors=tensors)


def join_rows(rows: Mapping[str, Array], program: Program) -> dict[str, Array]:
    """Values of every row by tensor, those of blocks behind each other."""
    blocks = {name: of for of in vocabularies(program) for name in of}
    found: dict[str, Array] = {}
    for name in rows:
        of = blocks.get(name, {name: 0})
        if name == next(iter(of)):
            whole = _joined_name(name) if name in blocks else name
            found[whole] = np.concatenate([rows[block] for block in of])
    return found


def cut_rows(rows: Mapping[str, Array], program: Program) -> dict[str, Array]:
    """What `join_rows` made, by the tensors of the program."""
    found = dict(rows)
    for of in vocabularies(program):
        whole = found.pop(_joined_name(next(iter(of))))
        found |= {name: whole[first : first + program.tensors[name].rows] for name, first in of.items()}
    return found


def for_program(losses: Mapping[str, Mapping[str, float]], program: Program) -> dict[str, dict[str, float]]:
    """Losses by tensor and format as the program names its tensors, where they were measured with the
    vocabulary in one piece and it has blocks, which then have a share by their rows; or the other way round.
    """
    made = {name: dict(of) for name, of in losses.items()}
    for blocks in vocabularies(program):
        whole = made.pop(_joined_name(next(iter(blocks))), None)
        for name in blocks if whole is not None else ():
            share = program.tensors[name].rows / program.vocab_size
            made[name] = {fmt: share * loss for fmt, loss in whole.items()}
    for name, spec in program.tensors.items():
        of = [block for block in losses if block.rpartition(".")[2].isdigit() and _joined_name(block) == name]
        if spec.role in ("embedding", "head") and name not in losses and of:
            parts = [made.pop(block) for block in of]
            made[name] = {fmt: sum(p[fmt] for p in parts) for fmt in parts[0] if all(fmt in p for p in parts)}
    return made


def levelled(losses: Mapping[str, Mapping[str, float]], program: Program) -> dict[str, dict[str, float]]:
    """Losses by tensor and format in which every row of a vocabulary has UNSEEN of the mean row's loss, so
    that what a calibration text never says is not rounded away."""
    made = {name: dict(of) for name, of in losses.items()}
    for blocks in vocabularies(program):
        known = [name for name in blocks if name in losses]
        size = sum(program.tensors[name].rows for name in known)
        for name in known:
            share = UNSEEN * program.tensors[name].rows / size
            for fmt, loss in losses[name].items():
                whole = sum(losses[other].get(fmt, 0.0) for other in known)
                made[name][fmt] = (1.0 - UNSEEN) * loss + share * whole
    return made
