"""A Program is proved by shape before anything runs; each broken rule is named."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from edge_runtime.engine.layout import lay_out
from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
)
from edge_runtime.engine.plan import StepShape
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec
from edge_runtime.errors import BadConfig

TENSORS = {
    "embedding": TensorSpec(100, 32, "embedding"),
    "norm": TensorSpec(1, 32, "vector"),
    "square": TensorSpec(32, 32, "matrix"),
    "frequencies": TensorSpec(1, 4, "vector"),
}
OPS: tuple[AnyOp, ...] = (
    Embed(out="hidden", weight="embedding"),
    Norm(x="hidden", out="normed", weight="norm", eps=1e-5),
    Linear(x="normed", out="q", weight="square"),
    Linear(x="normed", out="k", weight="square"),
    Linear(x="normed", out="v", weight="square"),
    Rope(x="q", inv_freq="frequencies", head_dim=8),
    KvAppend(k="k", v="v", layer=0),
    Attention(q="q", out="mixed", layer=0, heads=4, kv_heads=4, head_dim=8, scale=0.3),
    Add(a="hidden", b="mixed", out="hidden"),
    Logits(x="hidden", weight="embedding"),
)


def program(ops: tuple[AnyOp, ...] = OPS, **changes: object) -> Program:
    base: dict[str, object] = {
        "tensors": TENSORS,
        "buffers": dict.fromkeys(("hidden", "normed", "q", "k", "v", "mixed"), 32),
        "cache": (CacheSlot(4, 8),),
        "vocab_size": 100,
        "max_context": 64,
    }
    return Program(ops=ops, **{**base, **changes})  # type: ignore[arg-type]


def replaced(index: int, op: AnyOp) -> tuple[AnyOp, ...]:
    return (*OPS[:index], op, *OPS[index + 1 :])


def test_a_good_program_passes_and_survives_json() -> None:
    good = program()
    good.check()
    assert msgspec.json.decode(msgspec.json.encode(good), type=Program) == good


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (OPS[:-1], "at the end, and only there"),
        (OPS[1:], "reads buffer 'hidden' before"),
        (replaced(2, Linear(x="normed", out="q", weight="nothing")), "names tensor 'nothing'"),
        (replaced(2, Linear(x="normed", out="normed", weight="square")), "must be different buffers"),
        (replaced(2, Linear(x="normed", out="q", weight="embedding")), "expected 32x32"),
        (replaced(2, Linear(x="normed", out="q", weight="norm")), "expected 32x32"),
        (replaced(1, Norm(x="hidden", out="normed", weight="norm", eps=1e-5, group=7)), "does not divide"),
        (replaced(5, Rope(x="q", inv_freq="frequencies", head_dim=6)), "not whole heads"),
        (replaced(6, KvAppend(k="k", v="v", layer=1)), "cache slot 1 does not exist"),
        ((*OPS[:6], *OPS[7:]), "read before it is written"),
        (
            replaced(7, Attention(q="q", out="mixed", layer=0, heads=3, kv_heads=4, head_dim=8, scale=1.0)),
            "3 heads over 4",
        ),
        (
            replaced(
                7,
                Attention(q="q", out="mixed", layer=0, heads=4, kv_heads=4, head_dim=8, scale=1.0, window=3),
            ),
            "differ from the cache slot's",
        ),
        (replaced(8, Activation(x="hidden", out="absent", kind="silu")), "'absent', which the program"),
        (replaced(9, Logits(x="hidden", weight="embedding", softcap=-1.0)), "softcap"),
    ],
)
def test_a_broken_rule_is_named(broken: tuple[AnyOp, ...], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        program(broken).check()


BLOCKS = {"low": TensorSpec(30, 32, "head"), "high": TensorSpec(70, 32, "head"), **TENSORS}
LOW, HIGH = Embed(out="hidden", weight="low"), Embed(out="hidden", weight="high", first=30)
LAST = (Logits(x="hidden", weight="low"), Logits(x="hidden", weight="high", first=30))


def test_a_vocabulary_may_lie_in_blocks() -> None:
    good = program((LOW, HIGH, *OPS[1:-1], *LAST), tensors=BLOCKS)
    good.check()
    assert msgspec.json.decode(msgspec.json.encode(good), type=Program) == good
    assert (good.body, good.heads) == (good.ops[:-2], LAST)
    assert (program().body, program().heads) == (OPS[:-1], OPS[-1:])
    # A second embedding, of another buffer, begins anew
    program((LOW, HIGH, Embed(out="k", weight="embedding"), *OPS[1:-1], *LAST), tensors=BLOCKS).check()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((LOW, *OPS[1:]), "op 1 .norm.: expected a block like op 0 with the ids from 30 on"),
        ((HIGH, *OPS[1:]), "reads buffer 'hidden' before"),
        ((LOW, LOW, *OPS[1:]), "op 1 .embed.: begins with the id 0, expected 30"),
        ((LOW, HIGH, HIGH, *OPS[1:]), "op 2 .embed.: begins with the id 30, expected 0"),
        ((LOW, replace(HIGH, first=40), *OPS[1:]), "begins with the id 40, expected 30"),
        ((LOW, replace(HIGH, weight="embedding"), *OPS[1:]), "rows up to id 129 of a vocabulary of 100"),
        ((LOW, replace(HIGH, scale=2.0), *OPS[1:]), "expected a block like op 0"),
        ((Embed(out="k", weight="embedding"), LOW, replace(HIGH, out="k"), *OPS[1:]), "a block like op 1"),
        ((*OPS[:-1], LAST[0]), "logits of the ids from 30 on are missing"),
        ((*OPS[:-1], *LAST, *LAST), "op 11 .logits.: begins with the id 0"),
        ((*OPS[:-1], OPS[-1], OPS[-1]), "op 10 .logits.: begins with the id 0"),
        ((*OPS[:-1], LAST[0], replace(LAST[1], softcap=3.0)), "expected a block like op 9"),
        ((*OPS[:-1], LAST[0], replace(LAST[1], first=-30)), "begins with the id -30, expected 30"),
        ((*OPS[:-1], LAST[0], OPS[8], LAST[1]), "at the end, and only there"),
    ],
)
def test_a_broken_block_is_named(broken: tuple[AnyOp, ...], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        program(broken, tensors=BLOCKS).check()


HEAD = (
    Input(out="hidden"),
    Linear(x="hidden", out="q", weight="square"),
    Add(a="hidden", b="q", out="hidden"),
    Logits(x="hidden", weight="embedding"),
)


def test_a_program_may_begin_with_its_inputs() -> None:
    head = program(HEAD, cache=())
    head.check()
    assert msgspec.json.decode(msgspec.json.encode(head), type=Program) == head
    assert (head.input_width, head.hidden_width, program().input_width) == (32, 32, None)
    sizes = lay_out(head, StepShape(context=64, sequences=2, tokens=4, logits=4)).offsets
    assert set(sizes) == {"hidden", "q"}


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ((*HEAD[:1], Embed(out="k", weight="embedding"), *HEAD[1:]), "no embedding"),
        ((*HEAD[:1], *HEAD), "no second input"),
        ((OPS[0], *HEAD), "must be the first"),
        ((Input(out="absent"), *HEAD[1:]), "'absent', which the program does not declare"),
    ],
)
def test_a_misplaced_input_is_named(broken: tuple[AnyOp, ...], message: str) -> None:
    with pytest.raises(BadConfig, match=message):
        program(broken, cache=()).check()


@pytest.mark.parametrize("value", [0, -1, 1 << 31, 1 << 63])
def test_absurd_sizes_are_refused(value: int) -> None:
    with pytest.raises(BadConfig, match="expected 1 to"):
        program(max_context=value).check()
    with pytest.raises(BadConfig, match="expected 1 to"):
        program(tensors={**TENSORS, "norm": TensorSpec(1, value, "vector")}).check()
    with pytest.raises(BadConfig, match="expected 1 to"):
        program(buffers={**program().buffers, "q": value}).check()


def test_unknown_keys_and_ops_are_refused() -> None:
    text = msgspec.json.encode(program())
    for wrong in (text.replace(b'"eps"', b'"epsilon"'), text.replace(b'"op":"norm"', b'"op":"nrom"')):
        with pytest.raises(msgspec.ValidationError):
            msgspec.json.decode(wrong, type=Program)
