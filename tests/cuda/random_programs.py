"""Small random programs for hypothesis: every op, over buffers that are used again and again."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from edge_runtime.engine.ops import (
    Activation,
    Add,
    AnyOp,
    Attention,
    Embed,
    Gather,
    Input,
    KvAppend,
    Linear,
    Logits,
    Norm,
    Rope,
    Round,
)
from edge_runtime.engine.program import CacheSlot, Program, TensorSpec

HEAD, VOCAB = 8, 11
# Several of each width, so that ops find others to work on; layout.py lets them share bytes where it can
BUFFERS = {"a": 16, "b": 16, "c": 16, "d": 8, "e": 8, "f": 24, "g": 24}
KINDS = ("silu", "gelu", "gelu_tanh", "relu")


class Drawing:
    """A program as it grows; `formats` of its tensors."""

    def __init__(self, draw: Any, formats: tuple[str, ...]) -> None:
        self.draw, self.choices = draw, formats
        self.ops: list[AnyOp] = []
        self.tensors: dict[str, TensorSpec] = {}
        self.formats: dict[str, str] = {}
        self.written: list[str] = []
        self.cache: list[CacheSlot] = []

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def source(self, width: int | None = None) -> str | None:
        """A buffer that was written."""
        found = sorted({n for n in self.written if width in (None, BUFFERS[n])})
        return self.pick(*found) if found else None

    def target(self, width: int | None = None, apart: str = "") -> str:
        return str(self.pick(*(n for n, w in BUFFERS.items() if width in (None, w) and n != apart)))

    def vector(self, n: int, name: str | None = None) -> str:
        return self._tensor(name or f"t{len(self.tensors)}", TensorSpec(1, n, "vector"), "f32")

    def matrix(self, rows: int, cols: int, role: Any = "matrix") -> str:
        fmt = self.pick(*self.choices)
        return self._tensor(f"t{len(self.tensors)}", TensorSpec(rows, cols, role), fmt)

    def _tensor(self, name: str, spec: TensorSpec, fmt: str) -> str:
        self.tensors[name], self.formats[name] = spec, fmt
        return name

    def add(self, op: AnyOp, out: str | None) -> None:
        self.ops.append(op)
        if out is not None:
            self.written.append(out)

    # --- phrases ---

    def begin(self) -> None:
        out = self.target()
        if self.pick(False, True):
            self.add(Input(out=out), out)
        else:
            self.embed(out)
            self.embed(self.target())

    def embed(self, out: str) -> None:
        scale = self.pick(1.0, 2.0)
        for first, rows in self.blocks():
            weight = self.matrix(rows, BUFFERS[out], "embedding")
            self.add(Embed(out=out, weight=weight, scale=scale, first=first), out)

    def blocks(self) -> list[tuple[int, int]]:
        """(first id, rows) of the matrices that a vocabulary lies in."""
        ends = self.pick((VOCAB,), (VOCAB,), (4, VOCAB), (1, 3, 6, 7, 10, VOCAB))
        return [(first, end - first) for first, end in zip((0, *ends), ends, strict=False)]

    def norm(self, x: str) -> str:
        out, group = self.target(BUFFERS[x]), self.pick(0, 0, 8, BUFFERS[x])
        weight = self.vector(group or BUFFERS[x])
        bias = self.vector(group or BUFFERS[x]) if self.pick(False, True) else None
        kind = self.pick("rms", "layer")
        self.add(Norm(x=x, out=out, weight=weight, bias=bias, eps=1e-3, kind=kind, group=group), out)
        return out

    def activation(self, x: str) -> str:
        out = self.target(BUFFERS[x])
        up = self.source(BUFFERS[x]) if self.pick(False, True) else None
        self.add(Activation(x=x, out=out, kind=self.pick(*KINDS), up=up), out)
        return out

    def linear(self, x: str) -> str:
        out = self.target(apart=x)
        bias = self.vector(BUFFERS[out]) if self.pick(False, True) else None
        weight = self.matrix(BUFFERS[out], BUFFERS[x])
        self.add(Linear(x=x, out=out, weight=weight, bias=bias), out)
        return out

    def sum(self, one: str) -> str:
        """With a buffer of its width, on either side."""
        sides = [one, self.source(BUFFERS[one]) or one]
        a, b = sides if self.pick(False, True) else sides[::-1]
        out = self.target(BUFFERS[one])
        self.add(Add(a=a, b=b, out=out, scale=self.pick(1.0, 0.5)), out)
        return out

    def other(self, x: str) -> None:
        if self.pick(False, True):
            out = self.target(BUFFERS[x])
            self.add(Round(x=x, out=out, format=self.pick("int8", "fp8_e4m3")), out)
        else:
            out = self.target(apart=x)
            self.add(Gather(x=x, out=out, order=self.vector(BUFFERS[out], f"order{len(self.ops)}_{x}")), out)

    def rope(self, x: str) -> None:
        name = self.pick("freqs3", "freqs4")
        if name not in self.tensors:
            self.vector(int(name[-1]), name)
        self.add(Rope(x=x, inv_freq=name, head_dim=HEAD, scale=self.pick(1.0, 1.5)), x)

    def attend(self) -> None:
        """Rotations, a store and attention, with what may come between."""
        q, k, v = self.source(16), self.source(8), self.source(8)
        if q is None or k is None or v is None:
            return
        for x in self.pick((q, k), (k, q), (q,), (k,), (), (v,), (k, v), (q, q), (k, k)):
            self.rope(x)
        if self.pick(False, False, True):
            self.sum(self.pick(q, k))
        layer = len(self.cache)
        self.cache.append(CacheSlot(1, HEAD))
        self.add(KvAppend(k=k, v=v, layer=layer), None)
        out = self.target(16, apart=q)
        op = Attention(q=q, out=out, layer=layer, heads=2, kv_heads=1, head_dim=HEAD, scale=0.3)
        self.add(op, out)

    def phrase(self) -> None:
        x = self.source()
        assert x is not None
        what = self.pick("block", "block", "gated", "attend", "other", "sum", "rope")
        if what == "block":
            made = self.pick(self.norm, self.activation, lambda name: name)(x)
            for _ in range(self.draw(st.integers(1, 6))):
                out = self.linear(made)
                if self.pick(False, False, True):
                    self.sum(out)
                if made == out:
                    break
            if self.pick(False, True):
                self.sum(made)
        elif what == "gated":
            self.activation(x)
        elif what == "attend":
            self.attend()
        elif what == "other":
            self.other(x)
        elif what == "rope":
            self.rope(x)
        else:
            self.sum(x)

    def end(self) -> Program:
        x = self.source()
        assert x is not None
        if self.pick(False, True):
            x = self.norm(x)
        biased, softcap, scale = self.pick(False, True), self.pick(None, 3.0), self.pick(1.0, 0.7)
        for first, rows in self.blocks():
            bias = self.vector(rows) if biased else None
            weight = self.matrix(rows, BUFFERS[x], "head")
            self.add(Logits(x=x, weight=weight, scale=scale, softcap=softcap, bias=bias, first=first), None)
        program = Program(
            ops=tuple(self.ops),
            tensors=self.tensors,
            buffers=BUFFERS,
            cache=tuple(self.cache),
            vocab_size=VOCAB,
            max_context=64,
        )
        program.check()
        return program


@st.composite
def programs(draw: Any, formats: tuple[str, ...], phrases: int = 6) -> tuple[Program, dict[str, str]]:
    """A program that passes `check`, and its tensors' formats: matrices in some of `formats`."""
    drawing = Drawing(draw, formats)
    drawing.begin()
    for _ in range(draw(st.integers(1, phrases))):
        drawing.phrase()
    return drawing.end(), drawing.formats
