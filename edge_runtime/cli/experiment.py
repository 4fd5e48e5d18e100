"""What `edge-bench --calibrate` times: steps of programs of known work, and requests to small engines."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from edge_runtime.backends.protocol import Executor, Part, StepBatch
from edge_runtime.cli import synthetic
from edge_runtime.cli.timer import DECODE, Timer, session_times
from edge_runtime.engine.kv import K_FORMATS, kv_pair
from edge_runtime.engine.packing import PANEL, cpu_packing, packed_nbytes
from edge_runtime.engine.plan import KvPlan, StepShape, TensorPlan
from edge_runtime.engine.program import Program
from edge_runtime.engine.roofline import Step
from edge_runtime.serving.device import get_backend
from edge_runtime.serving.open import open_engine
from edge_runtime.serving.session import Session

CHUNK = 128  # tokens of a step of a prompt, as plans have it
BASE = "int8_row"  # of what is not about formats
WIDTH = 1024  # columns of the matrices that rates are timed with
_HIDDEN = 2816  # of decoders whose weights come from memory
_SHORT = 64  # columns where what a row costs beside them shows
_CHUNK_ROWS = 4096  # of the matrices that chunks are timed with
_CHAINED = (40, 200)  # small products in a row that stages are timed with
_WHOLE = 2.0  # weight of whole decoders, which are what is to be told; of parts it is 1
_NO_PAGES = np.full((1, 1), -1, np.int32)


@dataclass(frozen=True, slots=True)
class Decoder:
    """A whole decoder to be timed: see synthetic.decoder."""

    width: int
    hidden: int
    layers: int
    heads: int
    vocab: int = 512

    def program(self) -> Program:
        return synthetic.decoder(
            self.vocab,
            width=self.width,
            hidden=self.hidden,
            layers=self.layers,
            heads=self.heads,
            context=2 * CHUNK + 2 * DECODE,
        )

    def __str__(self) -> str:
        return f"decoder {self.width}x{self.hidden}x{self.layers}, {self.heads} heads"


# From 0.15 to 9 MB of weights, a byte each: where a last cache ends, time says little of anything else
NARROW = Decoder(48, 144, 4, 6)
SMALL = Decoder(64, 192, 6, 4)
MIDDLE = Decoder(128, 352, 5, 4)
WIDE = Decoder(384, 1024, 4, 6)
LARGE = Decoder(512, 1408, 3, 8)
DECODERS = (NARROW, SMALL, MIDDLE, WIDE, LARGE)


@dataclass(frozen=True, slots=True)
class Seen:
    """Steps of a program and the seconds they took: one equation of the fit. hosted: within a session, whose
    own work is part of it; begun: a request, which had to be taken in. weight: of its relative error."""

    name: str
    program: Program
    tensors: dict[str, TensorPlan]
    kv: KvPlan
    steps: tuple[Step, ...]
    seconds: float
    weight: float
    hosted: bool = False
    begun: bool = False


@dataclass(frozen=True, slots=True)
class Experiment:
    """One step of a program on the backend alone. patient: see Timer."""

    name: str
    program: Program
    fmt: str
    step: Step
    kv: str = "int8"
    weight: float = 1.0
    patient: bool = False

    def run(self, clock: Timer) -> list[float]:
        executor, kv = load(self.program, self.fmt, clock.threads, self.kv)
        for at in range(0, self.step.before, CHUNK):  # keys to read
            executor.forward(_batch(kv, min(CHUNK, self.step.before - at), at))
        batch = _batch(kv, self.step.tokens, self.step.before)
        executor.forward(batch)  # warms up, and checks the batch
        # As many in a row as where decoding is timed: luck, and threads that hand over, are alike in both
        times = DECODE if self.step.tokens == 1 else 1
        seconds = clock.fastest(lambda: executor.forward(batch), times, patient=self.patient)
        executor.close()  # never two at once: threads of one wait on cores that the other needs
        return [seconds]

    def seen(self, fastest: Sequence[float]) -> list[Seen]:
        kv = synthetic.cache_of(self.program, *kv_pair(self.kv), _shape(self.program))
        plans = synthetic.plans_of(self.program, self.fmt)
        return [Seen(self.name, self.program, plans, kv, (self.step,), fastest[0], self.weight)]


@dataclass(frozen=True, slots=True)
class Served:
    """Requests to a session: one for the first token of a prompt, and steps behind half the context."""

    name: str
    program: Program
    fmt: str
    prompt: int
    weight: float = _WHOLE
    patient: ClassVar[bool] = False  # its weights stay in a cache

    def run(self, clock: Timer) -> list[float]:
        with _session(self.program, self.fmt, clock.threads) as session:
            return list(session_times(session, clock, self.prompt, CHUNK))

    def seen(self, fastest: Sequence[float]) -> list[Seen]:
        first, shortest, longest = fastest
        plans = synthetic.plans_of(self.program, self.fmt)
        kv = synthetic.cache_of(self.program, "int8", "int8", _shape(self.program))
        prompt = (Step(self.prompt, 0, True),)
        step = (Step(1, CHUNK + DECODE // 2, True),)
        decode = (longest - shortest) / DECODE
        return [
            Seen(f"{self.name}, request", self.program, plans, kv, prompt, first, self.weight, True, True),
            Seen(f"{self.name}, decoding", self.program, plans, kv, step, decode, self.weight, True),
        ]


def experiments(formats: Sequence[str], kept: int, stream: int) -> list[Experiment | Served]:
    """All of a round. kept: bytes of weights that the last cache keeps beyond what the cores' own do;
    stream: that no cache keeps."""
    found: list[Experiment | Served] = []
    for count in _CHAINED:
        program = synthetic.products(_SHORT, count)
        found.append(Experiment(f"{count} small products", program, BASE, Step(1, 0, True)))
    for fmt in formats:
        found += _products(fmt, kept, stream)
    found += _attention()
    for decoder in DECODERS:
        program = decoder.program()
        for step in (Step(CHUNK, 0, True), Step(CHUNK, CHUNK, True), Step(1, CHUNK, True)):
            name = f"{decoder}, {BASE}, {step.tokens} behind {step.before}"
            found.append(Experiment(name, program, BASE, step, weight=_WHOLE))
        found += [Served(f"{decoder}, prompt {n}", program, BASE, n) for n in (DECODE, CHUNK)]
    many = Decoder(64, 128, 1, 4, vocab=32768)
    found.append(Served("decoder of 32,768 tokens", many.program(), BASE, CHUNK))
    return found


def _products(fmt: str, kept: int, stream: int) -> Iterator[Experiment]:
    """Of one format: wide and short rows at one token and at a chunk, rows from memory, whole decoders."""
    for cols in (WIDTH, _SHORT):
        rows = {1: kept // row_bytes(fmt, cols) // PANEL * PANEL, CHUNK: _CHUNK_ROWS}
        for tokens in (1, CHUNK):
            program = synthetic.product(rows[tokens], cols)
            yield Experiment(f"{fmt}, rows of {cols}, {tokens} tokens", program, fmt, Step(tokens, 0, True))
    layer = 3 * WIDTH * row_bytes(fmt, WIDTH) + 3 * WIDTH * row_bytes(fmt, _HIDDEN)
    deep = Decoder(WIDTH, _HIDDEN, max(1, -(-stream // layer)), WIDTH // 64).program()
    step = Step(1, CHUNK, True)
    yield Experiment(f"decoder from memory, {fmt}", deep, fmt, step, weight=_WHOLE, patient=True)
    if fmt != BASE:
        for decoder in (SMALL, WIDE):
            for tokens in (1, CHUNK):
                step = Step(tokens, CHUNK, True)
                name = f"{decoder}, {fmt}, {tokens} behind {CHUNK}"
                yield Experiment(name, decoder.program(), fmt, step, weight=_WHOLE)


def streamed(fmt: str, nbytes: int) -> Program:
    """Products one after the other of about so many bytes of weights."""
    return synthetic.products(WIDTH, max(2, nbytes // (row_bytes(fmt, WIDTH) * WIDTH)))


def _attention() -> Iterator[Experiment]:
    """Queries of few and many heads, narrow and wide, alone and in a chunk; keys of every cache format."""
    layers, context = 4, 512
    before = context - CHUNK

    def attending(heads: int, head_dim: int, tokens: int, kv: str) -> Experiment:
        program = synthetic.attending(heads, 4, head_dim, layers, context)
        name = f"attention, {heads} heads of {head_dim}, {kv}, {tokens} tokens"
        return Experiment(name, program, BASE, Step(tokens, before, True), kv)

    for tokens in (1, CHUNK):
        for head_dim in (8, 16, 64):
            for heads in (4, 32):
                yield attending(heads, head_dim, tokens, "int8")
    for kv in K_FORMATS:
        if kv != "int8":
            yield attending(16, 64, 1, kv)


def row_bytes(fmt: str, cols: int) -> int:
    """Bytes of a row as the cpu backend stores it."""
    return packed_nbytes(fmt, cpu_packing(fmt), PANEL, cols) // PANEL


def load(program: Program, fmt: str, threads: int, kv_name: str = "int8") -> tuple[Executor, KvPlan]:
    """The program on the cpu backend, with weights of that format."""
    step = _shape(program)
    kv = synthetic.cache_of(program, *kv_pair(kv_name), step)
    weights = synthetic.weights_of(program, synthetic.plans_of(program, fmt))
    return get_backend("cpu").load(Part(program, weights, kv, step), threads=threads), kv


def _shape(program: Program) -> StepShape:
    return StepShape(context=program.max_context, sequences=1, tokens=CHUNK, logits=1)


def _batch(kv: KvPlan, tokens: int, before: int) -> StepBatch:
    """A step of `tokens` tokens after `before`."""
    return StepBatch(
        tokens=np.arange(tokens, dtype=np.int32) % synthetic.VOCAB,
        positions=np.arange(before, before + tokens, dtype=np.int32),
        sequence=np.zeros(tokens, np.int32),
        page_tables=np.arange(max(1, kv.pages), dtype=np.int32)[None, :] if kv.pages else _NO_PAGES,
        logit_rows=np.array([tokens - 1], np.int32),
    )


@contextmanager
def _session(program: Program, fmt: str, threads: int) -> Iterator[Session]:
    """A session on an engine of that program."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.edge"
        synthetic.write_engine(path, program, fmt)
        with open_engine(str(path), backend="cpu", threads=threads, verify=False) as session:
            yield session
