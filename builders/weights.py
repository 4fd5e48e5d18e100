"""The two sides of a build: f32 weights as the checkpoint has them, and as an engine's planes decode.

Both give a whole tensor or a block of its rows, so that nothing larger than a block need lie in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, runtime_checkable

import numpy as np

from builders.architecture import Architecture
from builders.sources import Source
from builders.sources.matrix import Matrix, Stored
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.packing import plane_items, unpack
from edge_runtime.engine.plan import Plan, TensorPlan
from edge_runtime.engine.program import Program
from edge_runtime.engine.proof import plane_name
from edge_runtime.engine.writer import EngineWriter
from edge_runtime.errors import BadCheckpoint

# Tables that are computed from the config, and a head that is tied to the embedding
_NEVER_USED = (".rotary_emb.inv_freq", "lm_head.weight")
_BLOCK_ITEMS = 1 << 20  # f32 values of one block of rows


class Weights(Protocol):
    """A provider for the reference executor, which calls it for whole tensors and `rows` for embeddings."""

    program: Program

    def __call__(self, name: str) -> Array:
        """f32 (rows, cols) of a tensor of the program."""
        ...

    def block(self, name: str, start: int, stop: int) -> Array:
        """f32 rows [start, stop) of it."""
        ...

    def rows(self, name: str, ids: Array) -> Array:
        """f32 rows of it by number: (len(ids), cols)."""
        ...


class Blocks(Protocol):
    """f32 weights by rows, so that nothing larger than a block need lie in memory; `stored`: the planes of a
    tensor that the checkpoint already holds in that format."""

    def block(self, name: str, start: int, stop: int) -> Array: ...

    def stored(self, name: str, fmt: str) -> Stored | None: ...


@runtime_checkable
class Model(Weights, Blocks, Protocol):
    """Weights that can be asked for in every way, and for planes that the checkpoint already has."""


def row_blocks(rows: int, cols: int, items: int = _BLOCK_ITEMS, run: int = 1) -> list[tuple[int, int]]:
    """(start, stop) of blocks of whole rows, and whole runs of them, of about `items` values."""
    step = max(1, items // (cols * run)) * run
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


class CheckpointWeights:
    """Weights of a checkpoint in the program's names: row slices, norm offsets and constants applied."""

    def __init__(self, architecture: Architecture, source: Source) -> None:
        self.program = architecture.program
        self._sources = architecture.sources
        self._source = source
        self._check()

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        spec, made = self.program.tensors[name], self._sources[name]
        if made.constant is not None:
            return np.asarray(made.constant, np.float32).reshape(spec.rows, spec.cols)[start:stop]
        if spec.role == "vector":  # stored as (n,), or as a slice of a fused bias
            values = self._source.tensor(made.key, made.rows).reshape(1, spec.cols)
        else:
            first = made.rows[0] if made.rows else 0
            values = self._source.tensor(made.key, (first + start, first + stop))
        if made.columns is not None:
            values = values[:, made.columns]
        return values + np.float32(made.offset) if made.offset else values

    def stored(self, name: str, fmt: str) -> Stored | None:
        """The planes of a tensor that the checkpoint already holds in that format, as they are; else None."""
        matrix = self._kept_as_it_is(name)
        made = self._sources[name]
        if matrix is None or self._source.home(made.key).format != fmt:
            return None
        stored = self._source.stored(made.key)
        return stored if stored is None or made.rows is None else stored.rows(*made.rows)

    def kept(self) -> tuple[dict[str, str], list[str]]:
        """The format that holds each matrix as the checkpoint has it, and notices of what has no exact home.

        Tensors that are already quantized, and the matrices beside them in their own float type; not an
        embedding, head or vector that is not quantized.
        """
        formats: dict[str, str] = {}
        moved: dict[str, list[tuple[float, str]]] = {}
        for name, spec in self.program.tensors.items():
            matrix, made = self._kept_as_it_is(name), self._sources[name]
            if matrix is not None:
                home = self._source.home(made.key)
                formats[name] = home.format
                if home.error:
                    moved.setdefault(f"{home.why}: {home.format}", []).append((home.error, made.key))
            elif spec.role == "matrix" and made.key not in self._source.matrices:
                formats[name] = self._source.float_format(made.key)
        notices = []
        for what, tensors in moved.items():
            error, key = max(tensors)
            notices.append(
                f"{len(tensors)} tensors have no exact format here ({what} is the nearest; greatest error "
                f"{error:.2g} of a group's greatest value, in {key!r})"
            )
        return formats, notices

    def _kept_as_it_is(self, name: str) -> Matrix | None:
        """The quantized matrix of a tensor that takes its values unchanged, columns in its own order."""
        made = self._sources[name]
        matrix = self._source.matrices.get(made.key)
        if matrix is None or made.offset or made.constant is not None:
            return None
        same = matrix.order is made.columns or (
            matrix.order is not None
            and made.columns is not None
            and np.array_equal(matrix.order, made.columns)
        )
        return matrix if same else None

    def rows(self, name: str, ids: Array) -> Array:
        unique, places = np.unique(ids, return_inverse=True)
        if not len(unique):
            return self.block(name, 0, 0)
        return np.concatenate([self.block(name, int(i), int(i) + 1) for i in unique])[places]

    def _check(self) -> None:
        """Every tensor exists with the shape that the config promises, and none is left over."""
        used = {made.key for made in self._sources.values() if made.constant is None}
        surplus = [k for k in self._source.shapes() if k not in used and not self._means_nothing(k)]
        if surplus:
            raise BadCheckpoint(
                f"the checkpoint holds {len(surplus)} tensors that its config does not speak of, such as "
                f"{', '.join(map(repr, surplus[:3]))}; without them the model may mean something else: "
                "is this the right config.json, and a plain model without adapters?"
            )
        for name, made in self._sources.items():
            if made.constant is not None:
                continue
            spec = self.program.tensors[name]
            shape = self._source.shape(made.key)
            if made.rows is not None and shape:
                start, stop = made.rows
                shape = (stop - start if stop <= shape[0] else -1, *shape[1:])
            want = (spec.rows, spec.cols)
            if shape != want and not (spec.role == "vector" and shape == want[1:]):
                found = self._source.shape(made.key)
                raise BadCheckpoint(
                    f"{made.key!r} has shape {found}, the config promises {want} for {name!r}"
                )

    def _means_nothing(self, key: str) -> bool:
        """A table that is computed anew, or a bias of zeros (quantizers write one for every linear)."""
        return key.endswith(_NEVER_USED) or (key.endswith(".bias") and not self._source.tensor(key).any())


class EngineWeights:
    """Weights as the planes of an engine decode; `planes(tensor)` gives its packed planes."""

    def __init__(
        self,
        program: Program,
        tensors: Mapping[str, TensorPlan],
        planes: Callable[[str], Mapping[str, Array]],
    ) -> None:
        self.program = program
        self._tensors = tensors
        self._planes = planes
        self._last: tuple[str, dict[str, Array]] | None = None

    def __call__(self, name: str) -> Array:
        return self.block(name, 0, self.program.tensors[name].rows)

    def block(self, name: str, start: int, stop: int) -> Array:
        fmt, spec = get_format(self._tensors[name].format), self.program.tensors[name]
        first, end = start // fmt.run * fmt.run, min(-(-stop // fmt.run) * fmt.run, spec.rows)
        cut = Stored(fmt.name, self._unpacked(name)).rows(first, end).planes
        return fmt.decode(cut, end - first, spec.cols)[start - first : stop - first]

    def rows(self, name: str, ids: Array) -> Array:
        spec = self.program.tensors[name]
        return get_format(self._tensors[name].format).decode_ids(
            self._unpacked(name), spec.rows, spec.cols, ids
        )

    def _unpacked(self, name: str) -> dict[str, Array]:
        """Codec planes of a tensor; the last one is kept, for it is asked for block by block."""
        if self._last is None or self._last[0] != name:
            self._last = None
            spec, plan = self.program.tensors[name], self._tensors[name]
            items = plane_items(plan.format, plan.packing, spec.rows, spec.cols)
            stored = self._planes(name)
            packed = {key: stored[key].view(dtype)[:n] for key, (n, dtype) in items.items()}
            self._last = name, unpack(plan.format, plan.packing, packed, spec.rows, spec.cols)
        return self._last[1]


class StoredPlanes:
    """A part's packed planes as they lie in the unfinished file; each call maps anew: none stay in memory."""

    def __init__(self, part: str, program: Program, plan: Plan, writer: EngineWriter) -> None:
        self._part, self._program, self._plan, self._writer = part, program, plan, writer

    def of(self, tensor: str) -> dict[str, Array]:
        """plane -> 1-D array of its packed items."""
        spec, chosen = self._program.tensors[tensor], self._plan.tensors[tensor]
        stored = self._writer.planes()
        items = plane_items(chosen.format, chosen.packing, spec.rows, spec.cols)
        names = {plane: plane_name(self._part, tensor, plane) for plane in items}
        return {plane: stored[names[plane]].view(dtype) for plane, (_, dtype) in items.items()}

    def true_nbytes(self, tensor: str) -> int:
        """Bytes of a tensor's numbers, without the padding of its packing."""
        spec = self._program.tensors[tensor]
        return get_format(self._plan.tensors[tensor].format).nbytes(spec.rows, spec.cols)
