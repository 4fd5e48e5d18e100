"""How much each tensor suffers from each format, measured: the file that the planner spends bytes by.

"hessian": tr(E H E^T) / tr(W H W^T), the relative square error at the tensor's output, from the statistics
alone. "kl": what the model's answers lose, by running it with that one tensor rounded. KL to the model is
quadratic in a small change of its weights (its gradient is zero where nothing is changed), and tr(E H E^T) is
quadratic in E too. So where a model is too large to run every format, some are measured, and the others are
that figure times the ratio of the traces.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from builders.calibration import Calibration
from builders.corpus import Corpus
from builders.journal import Journal
from builders.lanes import Lane, LaneRunner, lane_bytes
from builders.quantize import AlgorithmOptions, get_algorithm
from builders.rounding_error import SAMPLED_TOKENS, Rounder, occurrences, sampled, weighted_square
from builders.segments import cut
from builders.sensitivity import Sensitivity
from builders.serial_weights import SerialWeights
from builders.torch_device import Workers, repeatable, resolve_device
from builders.vocabulary_blocks import inside, levelled, vocabularies
from builders.watcher import Watcher
from builders.weights import Model
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.ops import Embed
from edge_runtime.engine.ops import weights as names_of
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, Unsupported, ValueOutOfRange

KL_FLOPS = 3e12  # of running lanes: about two minutes of two cores; a fixed figure, so that builds repeat
LEAST_TOKENS = 256  # that a KL is measured on


@dataclass(frozen=True, slots=True)
class SensitivityOptions:
    """unit None: kl where LEAST_TOKENS tokens of it cost no more than KL_FLOPS, else hessian.

    row_importance: see AlgorithmOptions. tokens: most tokens that a KL is the mean of. memory: bytes of lanes
    that are under way at once; a run that was killed measures those anew.
    """

    unit: Literal["kl", "hessian"] | None = None
    algorithm: str = "rtn"
    row_importance: Mapping[str, Array] = field(default_factory=dict)
    tokens: int = 2048
    device: str = "auto"
    memory: int = 128 << 20
    cores: int = 0


def measure_sensitivity(
    weights: Model,
    calibration: Calibration,
    corpus: Corpus,
    formats: Sequence[str],
    options: SensitivityOptions = SensitivityOptions(),
    *,
    journal: Path | None = None,
    watcher: Watcher | None = None,
) -> Sensitivity:
    """Losses of every tensor that is no vector, in every format that can hold it.

    Figures stay in `journal`: a run that was killed goes on with them, and another asks for none of them
    again. Raises BadConfig, Unsupported.
    """
    if not formats:
        raise BadConfig("no formats to measure; name at least one")
    for name in formats:
        get_format(name)
    if options.unit not in (None, "kl", "hessian"):
        raise BadConfig(f"--sensitivity {options.unit!r}: expected kl or hessian")
    device = resolve_device(options.device)
    subject = {
        "calibration": calibration.sha256,
        "text": corpus.sha256,
        "algorithm": options.algorithm,
        "tokens": options.tokens,
        "device": device.partition(":")[0],
        "rows": bool(options.row_importance),
    }
    notes = Journal(journal, subject)
    with repeatable(device, options.cores) as workers:
        search = _Search(
            SerialWeights(weights), calibration, corpus, formats, options, device, workers, notes
        )
        try:
            return search.run(watcher or Watcher())
        finally:
            notes.close()


def lane_flops(program: Program) -> dict[str, float]:
    """Floating-point operations a token of a lane of each tensor that is no vector: all from its segment on,
    and the logits of the model and its own."""
    segments = cut(program)
    costs = [
        sum(
            2.0 * program.tensors[n].size
            for op in s.ops(program)
            if not isinstance(op, Embed)
            for n in names_of(op)
        )
        for s in segments
    ]
    heads = [op.weight for op in program.heads]
    costs.append(4.0 * sum(program.tensors[n].size for n in heads))
    first = dict.fromkeys(heads, len(segments))
    for i in reversed(range(len(segments))):
        first.update({n: i for op in segments[i].ops(program) for n in names_of(op)})
    return {n: sum(costs[i:]) for n, i in first.items() if program.tensors[n].role != "vector"}


@dataclass(frozen=True, slots=True)
class _Search:
    weights: Model
    calibration: Calibration
    corpus: Corpus
    formats: Sequence[str]
    options: SensitivityOptions
    device: str
    workers: Workers
    notes: Journal

    def run(self, watcher: Watcher) -> Sensitivity:
        program = self.weights.program
        names = [n for n, spec in program.tensors.items() if spec.role != "vector"]
        flops = sum(lane_flops(program).values())
        unit = self.options.unit or ("kl" if flops * LEAST_TOKENS <= KL_FLOPS else "hessian")
        watcher.phase("sensitivity", len(names) * (1 if unit == "hessian" else 2))
        errors = self._errors(names, watcher)
        measured: tuple[str, ...] = ()
        if unit == "hessian":
            tokens, losses = self.calibration.tokens, self._by_use(errors)
        else:
            windows = self._windows(flops)
            tokens = int(windows.size)
            many = max(1, int(KL_FLOPS / (flops * tokens)))
            measured = tuple(spread(errors, self.formats, many))
            losses = self._scaled(errors, self._kl(names, errors, measured, windows, watcher))
        return Sensitivity(
            unit=unit,
            algorithm=self.options.algorithm,
            text=self.corpus.name,
            tokens=tokens,
            losses=levelled(losses, program),
            measured=measured,
        )

    def _by_use(self, errors: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
        """Errors of blocks of a vocabulary, each times the share of the text's tokens that are in it: all
        blocks together then count as one tensor."""
        found = dict(errors)
        for blocks in vocabularies(self.weights.program):
            for name, first in blocks.items():
                rows = self.weights.program.tensors[name].rows
                used = float(inside(self.corpus.windows, first, rows).mean())
                found[name] = {fmt: share * used for fmt, share in errors[name].items()}
        return found

    def _rounder(self) -> Rounder:
        return Rounder(
            self.weights,
            get_algorithm(self.options.algorithm),
            AlgorithmOptions(device=self.device, row_importance=self.options.row_importance),
        )

    def _errors(self, names: Sequence[str], watcher: Watcher) -> dict[str, dict[str, float]]:
        """tr(E H E^T) / tr(W H W^T) of each tensor and format; a format that cannot hold it is left out."""
        ids, counts = np.unique(self.corpus.windows, return_counts=True)
        some = sampled(len(ids), SAMPLED_TOKENS)
        ids, counts = ids[some], counts[some]
        program = self.weights.program
        firsts = {op.weight: op.first for op in program.ops if isinstance(op, Embed)}
        found: dict[str, dict[str, float]] = {}
        for name in names:
            found[name] = {}
            wanted = [f for f in self.formats if self.notes.get("error", name, f) is None]
            looked_up = None
            if name in firsts:
                here = inside(ids, firsts[name], program.tensors[name].rows)
                looked_up = ids[here] - firsts[name], counts[here]
            shares = self._shares(name, wanted, looked_up)
            for fmt in self.formats:
                share = shares.get(fmt, self.notes.get("error", name, fmt))
                if share is not None and share >= 0.0:
                    found[name][fmt] = share
            watcher.step(f"error {name}")
        return found

    def _shares(
        self, name: str, formats: Sequence[str], looked_up: tuple[Array, Array] | None
    ) -> dict[str, float]:
        """Of one tensor, written down; -1 for a format that cannot hold it. A tensor that is both embedding
        and head suffers in both places. looked_up: rows of an embedding, and how often."""
        if not formats:
            return {}
        inputs = self.calibration.statistics(name)
        if inputs is None and looked_up is None:
            raise Unsupported(f"tensor {name!r} has no statistics; calibrate this program again")
        rounder, found = self._rounder(), {}
        rows = sampled(self.weights.program.tensors[name].rows)
        w = hessian = None
        if inputs is not None:
            w = self.weights.rows(name, rows)
            hessian = torch.from_numpy(inputs.hessian).to(self.device, copy=True)
        ids, counts = looked_up or (np.empty(0, np.int64), np.empty(0, np.int64))
        table = self.weights.rows(name, ids) if len(ids) else None
        whole = [
            1.0 if w is None or hessian is None else weighted_square(w, hessian),
            1.0 if table is None else occurrences(table, counts),
        ]
        for fmt in formats:
            share = 0.0
            try:
                if w is not None and hessian is not None:
                    e = rounder.rounded(name, get_format(fmt), inputs, rows) - w
                    share += weighted_square(e, hessian) / (whole[0] or 1.0)
                if table is not None:
                    e = rounder.rounded(name, get_format(fmt), inputs, ids) - table
                    share += occurrences(e, counts) / (whole[1] or 1.0)
            except ValueOutOfRange:
                share = -1.0
            found[fmt] = self.notes.put(share, "error", name, fmt)
        return found

    def _windows(self, flops: float) -> Array:
        """The first windows of the corpus, as many as the budget allows for at least two formats."""
        length = self.corpus.windows.shape[1]
        tokens = min(self.options.tokens, max(int(KL_FLOPS / (2 * flops)), LEAST_TOKENS))
        return np.asarray(self.corpus.windows[: max(1, tokens // length)][:, :tokens])

    def _kl(
        self,
        names: Sequence[str],
        errors: dict[str, dict[str, float]],
        measured: Sequence[str],
        windows: Array,
        watcher: Watcher,
    ) -> dict[str, dict[str, float]]:
        """KL of each tensor in each measured format, nats a token."""
        rounder = self._rounder()

        def lane(name: str, fmt: str) -> Lane:
            def make(ids: Array | None) -> Array:
                inputs = self.calibration.statistics(name) if rounder.algorithm.CALIBRATED else None
                return rounder.rounded(name, get_format(fmt), inputs, ids)

            return Lane(name, fmt, make)

        found: dict[str, dict[str, float]] = {name: {} for name in names}
        lanes = []
        for name in names:
            for fmt in measured:
                known = self.notes.get("kl", name, fmt)
                if known is not None:
                    found[name][fmt] = known
                elif fmt in errors[name]:
                    lanes.append(lane(name, fmt))
        room = self.options.memory // lane_bytes(self.weights, int(windows.size))
        runner = LaneRunner(self.weights, windows, self.device, self.workers, room)
        left = {name: sum(x.tensor == name for x in lanes) for name in names}
        for done, kl in runner.measure(lanes):
            found[done.tensor][done.label] = self.notes.put(kl, "kl", done.tensor, done.label)
            left[done.tensor] -= 1
            if not left[done.tensor]:
                watcher.step(f"KL {done.tensor}")
        return found

    def _scaled(
        self, errors: dict[str, dict[str, float]], measured: dict[str, dict[str, float]]
    ) -> dict[str, dict[str, float]]:
        """Losses of all formats: those measured, and of others the nearest measured one's by their errors."""
        return {
            name: {fmt: measured[name].get(fmt, scaled(fmt, shares, measured[name])) for fmt in shares}
            for name, shares in errors.items()
        }


def scaled(fmt: str, errors: dict[str, float], measured: dict[str, float]) -> float:
    """The loss of a format that was not measured, from the one of nearest error (on a log scale) that was."""
    error = errors[fmt]
    usable = {f: kl for f, kl in measured.items() if errors[f] > 0.0 and kl > 0.0}
    if error <= 0.0 or not usable:
        return 0.0
    near = min(usable, key=lambda f: (abs(math.log(errors[f] / error)), f))
    return usable[near] * error / errors[near]


def spread(errors: dict[str, dict[str, float]], formats: Sequence[str], many: int) -> list[str]:
    """At most `many` of the formats, evenly spaced by their mean log error; one alone is the middle one."""
    if many >= len(formats):
        return list(formats)

    def level(fmt: str) -> float:
        shares = [s[fmt] for s in errors.values() if s.get(fmt, 0.0) > 0.0]
        return sum(map(math.log, shares)) / len(shares) if shares else -math.inf

    levels = {f: level(f) for f in formats if level(f) > -math.inf}
    order = sorted(levels, key=lambda f: (levels[f], f))
    if len(order) <= many:
        return order
    low, high = levels[order[0]], levels[order[-1]]
    marks = [low + (high - low) * (k + 0.5) / many for k in range(many)]
    return sorted({min(order, key=lambda f: (abs(levels[f] - mark), f)) for mark in marks}, key=order.index)
