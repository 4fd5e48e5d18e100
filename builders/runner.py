"""Running an engine that is not finished yet, or its f32 checkpoint, on a backend that is here.

A runner has `places`, each of which holds one sequence at a time with KV pages of its own: tokens in, rows of
logits out. It is what known answers, tasks and native quality figures are measured with.
"""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec
import numpy as np

from builders.device_code import DeviceCode
from builders.weights import Weights
from edge_runtime.backends.numpy_weights import DecodedWeights
from edge_runtime.backends.protocol import Backend, Executor, PackedTensor, Part, StepBatch
from edge_runtime.backends.protocol import DeviceCode as StoredCode
from edge_runtime.backends.reference import BACKEND as REFERENCE
from edge_runtime.backends.reference import ReferenceExecutor
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.packing import pack
from edge_runtime.engine.plan import Plan, StepShape
from edge_runtime.engine.profile import Profile
from edge_runtime.engine.program import Program
from edge_runtime.errors import EdgeError

LOGITS = 1 << 22  # of one step, f32: 16 MiB
KEEP = 256 << 20  # bytes of decoded weights that the reference keeps; a build is to need little memory
Stored = Callable[[str], Mapping[str, Array]]  # tensor -> its packed planes


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens int32 (n,) that the sequence at `place` takes from position `start` on; the last `rows` of them
    give logits.
    """

    place: int
    start: int
    tokens: Array
    rows: int


class Runner:
    """An executor of `part` on `backend`; use it as a context manager."""

    def __init__(self, backend: Backend, part: Part) -> None:
        self.backend = backend.name
        self.places = part.step.sequences
        self._step = part.step
        self._width = -(-part.step.context // part.kv.page_tokens)  # pages of a place
        if backend is REFERENCE:
            weights = DecodedWeights(part.weights, KEEP)
            self._executor: Executor = ReferenceExecutor(part.program, weights, part.kv, part.step)
        else:
            self._executor = backend.load(part)

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.close()

    def forward(self, pieces: Sequence[Piece]) -> Array:
        """One step. Logits f32 (sum of rows, vocab), a view that the next step overwrites."""
        counts = [len(piece.tokens) for piece in pieces]
        ends = np.cumsum(counts)
        places = np.array([piece.place for piece in pieces], np.int32)
        rows = [np.arange(end - piece.rows, end) for piece, end in zip(pieces, ends, strict=True)]
        return self._executor.forward(
            StepBatch(
                tokens=np.concatenate([piece.tokens for piece in pieces]).astype(np.int32),
                positions=np.concatenate(
                    [
                        np.arange(p.start, p.start + n, dtype=np.int32)
                        for p, n in zip(pieces, counts, strict=True)
                    ]
                ),
                sequence=np.repeat(np.arange(len(pieces), dtype=np.int32), counts),
                page_tables=places[:, None] * np.int32(self._width) + np.arange(self._width, dtype=np.int32),
                logit_rows=np.concatenate(rows).astype(np.int32),
                slots=places,
            )
        )

    def read(self, place: int, tokens: Array, rows: int) -> Iterator[Array]:
        """Begin a sequence anew with these tokens; logits of the last `rows` of them, in blocks (n, vocab).

        Each block is a view that the next one overwrites.
        """
        at = 0
        while at < len(tokens):
            silent = len(tokens) - rows - at  # tokens before the first whose logits are wanted
            count = min(self._step.tokens, len(tokens) - at)
            if silent < count:
                count = min(count, max(silent, 0) + self._step.logits)
            wanted = count - min(count, max(silent, 0))
            logits = self.forward([Piece(place, at, tokens[at : at + count], wanted)])
            if wanted:
                yield logits
            at += count

    def greedy(
        self,
        prompts: Sequence[Array],
        limits: Sequence[int],
        stop: Collection[int],
        ended: Callable[[int], None] = lambda index: None,
    ) -> list[list[int]]:
        """The likeliest continuation of each prompt, as many at once as there are places.

        limits: most tokens of each; a token of `stop` ends an answer and is no part of it. `ended` hears the
        index of every answer that is complete.
        """
        answers: list[list[int]] = [[] for _ in prompts]
        waiting, free = deque(range(len(prompts))), list(range(self.places))
        running: dict[int, int] = {}  # place -> prompt

        def take(place: int, row: Array) -> None:
            index, token = running[place], int(row.argmax())
            if token not in stop:
                answers[index].append(token)
            if token in stop or len(answers[index]) == limits[index]:
                free.append(place)
                del running[place]
                ended(index)

        while waiting or running:
            while waiting and free:
                place, index = free.pop(), waiting.popleft()
                running[place] = index
                for logits in self.read(place, prompts[index], 1):
                    take(place, logits[-1])
            pieces = [
                Piece(place, len(prompts[i]) + len(answers[i]) - 1, np.array(answers[i][-1:], np.int32), 1)
                for place, i in running.items()
            ]
            if pieces:
                for piece, row in zip(pieces, self.forward(pieces), strict=True):
                    take(piece.place, row)
        return answers


def native_backend(profile: Profile) -> Backend | None:
    """The profile's backend (a file of that name) when it can run here."""
    return _backend(profile.backend)


def backend_with(profile: Profile, code: DeviceCode | None) -> Backend | None:
    """The profile's backend when it can run here with this device code, which a GPU's cannot do without."""
    found = native_backend(profile)
    if found is None or profile.backend != "cuda":
        return found
    if code is None:
        return None
    try:
        found.check_code(_stored(code))
    except EdgeError:  # built for another GPU than the one here
        return None
    return found


def backend_here(
    profile: Profile, program: Program, formats: Mapping[str, str], code: DeviceCode | None = None
) -> Backend:
    """The fastest that runs these tensors on this machine: the profile's, cpu, or the reference."""
    for found in (backend_with(profile, code), _backend("cpu")):
        if found is not None and found.supports(program, formats).ok:
            return found
    return REFERENCE


def formats_of(plan: Plan) -> dict[str, str]:
    """tensor -> format."""
    return {name: chosen.format for name, chosen in plan.tensors.items()}


def engine_runner(
    backend: Backend,
    program: Program,
    plan: Plan,
    stored: Stored,
    *,
    context: int,
    places: int = 1,
    code: DeviceCode | None = None,
) -> Runner:
    """The planned engine over its stored planes, with the plan's KV formats, for `places` sequences of at
    most `context` tokens; `code` where the backend is a GPU's.

    Numbers do not depend on the sizes of a step, so only as much is loaded as these need.
    """
    packed = {
        name: PackedTensor(
            program.tensors[name].rows, program.tensors[name].cols, t.format, t.packing, stored(name)
        )
        for name, t in plan.tensors.items()
    }
    part = _part(program, packed, plan, context, places)
    return Runner(backend, part if code is None else replace(part, code=_stored(code)))


def _stored(code: DeviceCode) -> StoredCode:
    return StoredCode(code.entries, lambda name: memoryview(code.blobs[name]))


def checkpoint_runner(
    backend: Backend, weights: Weights, plan: Plan, *, context: int, places: int = 1
) -> Runner:
    """The f32 checkpoint with an f32 cache; all its weights are held in memory."""
    program = weights.program
    packed = {}
    for name, spec in program.tensors.items():
        packing = "rows" if spec.role == "vector" else backend.packing["f32"]
        planes = get_format("f32").encode(weights(name))
        packed[name] = PackedTensor(
            spec.rows, spec.cols, "f32", packing, pack("f32", packing, planes, spec.rows, spec.cols)
        )
    exact = msgspec.structs.replace(plan, kv=msgspec.structs.replace(plan.kv, k="f32", v="f32"))
    return Runner(backend, _part(program, packed, exact, context, places))


def _part(
    program: Program, packed: Mapping[str, PackedTensor], plan: Plan, context: int, places: int
) -> Part:
    tokens = max(plan.step.tokens, places)
    logits = min(tokens, max(places, LOGITS // program.vocab_size))
    kv = msgspec.structs.replace(plan.kv, pages=places * -(-context // plan.kv.page_tokens))
    return Part(
        program, packed, kv, StepShape(context=context, sequences=places, tokens=tokens, logits=logits)
    )


def _backend(name: str) -> Backend | None:
    module = f"edge_runtime.backends.{name}"
    if importlib.util.find_spec(module) is None:
        return None
    backend: Backend = importlib.import_module(module).BACKEND
    return backend if backend.available().ok else None
