"""Phase 2 of a build: calibrate the model and its draft, and measure what each format costs each tensor.

A calibration lies in a folder beside the engine until the build is done, so that one that was interrupted
goes on where it stopped; with a folder of the user's it stays, for other builds of the same model. One build
at a time has the folder, from before its text is made; nobody else changes anything there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

import numpy as np

from builders.calibration_folder import LOCK, FolderLock, forget, refuse_other
from builders.corpus import Corpus, CorpusOptions, corpus_name, make_corpus
from builders.equalize import ScaledWeights
from builders.journal import Journal
from builders.kept_corpus import OWN_TEXT
from builders.parts import Contents, Part
from builders.quantize import get_algorithm
from builders.sensitivity import Sensitivity
from builders.statistics import InputStatistics
from builders.watcher import Watcher
from edge_runtime.engine.formats import Array, get_format
from edge_runtime.engine.formats.trellis import trellis_of
from edge_runtime.engine.manifest import DRAFT, LANGUAGE, CalibrationRecord
from edge_runtime.errors import BadConfig, Unsupported

if TYPE_CHECKING:
    from builders.calibrate import CalibrationOptions
    from builders.calibration import Calibration
    from builders.weights import Model


# rows * cols^2 of all matrices in all formats, up to which losses are measured with the build's algorithm:
# a minute or two of GPTQ. On llama2xs a plan of 4 bits then has 44% less KL than one by rtn's losses.
OWN_WORK = 20_000_000_000
JOURNAL, TRIALS = "sensitivity-journal.jsonl", "sensitivity-trials.jsonl"  # in the calibration's folder
# A text that gives so many times fewer windows than were asked for is told of
FAR_FEWER = 4


@dataclass(frozen=True, slots=True)
class CalibrationRequest:
    """source: a file, a folder, "self", "builtin" or None (see corpus.default_source). folder None: beside
    the engine, gone when the build is done. memory: bytes of activations that may lie in memory."""

    source: str | None = None
    corpus: CorpusOptions = field(default_factory=CorpusOptions)
    device: str = "auto"
    memory: int = 256 << 20
    folder: Path | None = None
    sensitivity: Literal["kl", "hessian"] | None = None


class Calibrations:
    """The calibrations of a build by part; empty where none was asked for.

    Left by an exception that ends the build, its own folder goes too; by an interruption it stays.
    """

    def __init__(self) -> None:
        self._parts: dict[str, Calibration] = {}
        self._stack = ExitStack()
        self._corpus: Corpus | None = None
        self._own: Path | None = None  # once it is locked
        self._weights: dict[str, Model] = {}
        self._importance: dict[str, Mapping[str, Array]] = {}
        self._request = CalibrationRequest()
        self.device = "cpu"

    def statistics(self, part: str, tensor: str) -> InputStatistics | None:
        """Of the inputs of a tensor of a part; None where nothing is known of them."""
        found = self._parts.get(part)
        return None if found is None else found.statistics(tensor)

    @property
    def made(self) -> bool:
        return LANGUAGE in self._parts

    def covers(self, part: str) -> bool:
        return part in self._parts

    def folder(self, part: str) -> Path:
        """Of a calibrated part's calibration."""
        return self._parts[part].folder

    @property
    def seed(self) -> int:
        return self._request.corpus.seed

    def windows(self, part: Part) -> Array:
        """Token ids (windows, length) of the text, as long as the part can read them."""
        assert self._corpus is not None  # run() made it
        return np.asarray(self._corpus.windows[:, : part.program.max_context])

    def row_importance(self, part: Part, formats: Iterable[str]) -> Mapping[str, Array]:
        """Tensor -> f32 (rows,), how much each row of a calibrated part matters, by the first windows of the
        text; empty where none of the formats asks. Found once, and kept in the calibration's folder."""
        if not any(trellis_of(get_format(name)) for name in formats):
            return {}
        if part.name not in self._importance:
            from builders.row_importance import kept_row_importance

            self._importance[part.name] = kept_row_importance(
                self._weights[part.name], self.windows(part), self.folder(part.name), self.device, self.seed
            )
        found = self._importance[part.name]
        if not isinstance(part.weights, ScaledWeights):
            return found
        return {name: part.weights.row_importance(name, rows) for name, rows in found.items()}

    def in_order(
        self,
        part: Part,
        choose: Callable[[str, InputStatistics | None], Array],
        known: Callable[[str], InputStatistics | None],
        watcher: Watcher,
        most: int | None = None,
    ) -> None:
        """Call `choose` for the tensors of a calibrated part in its order, see builders/feedback.py; over the
        first `most` windows of the text, or all."""
        from builders.feedback import FeedbackOptions, quantize_in_order

        windows, request = self.windows(part)[:most], self._request
        options = FeedbackOptions(request.corpus.seed, self.device, request.memory // 2)
        folder = self._parts[part.name].folder
        quantize_in_order(part.model, windows, choose, folder, options, watcher, known)

    def record(self) -> CalibrationRecord | None:
        """What the engine says of it."""
        found = self._parts.get(LANGUAGE)
        return None if found is None else CalibrationRecord(found.text, found.tokens, found.sha256)

    def shortage(self) -> str | None:
        """What to say of a text that gives far fewer windows than were asked for."""
        assert self._corpus is not None  # run() made it
        windows, asked = self._corpus.windows, self._request.corpus.samples
        if len(windows) * FAR_FEWER > asked:
            return None
        return (
            f"calibrated on {len(windows)} of {asked} windows of {windows.shape[1]} tokens: "
            f"{self._corpus.name} gives no more (shorter ones: --sample-tokens)"
        )

    def run(
        self, contents: Contents, request: CalibrationRequest, beside: Path, made: str, watcher: Watcher
    ) -> None:
        """Calibrate the language part and the draft. `beside`: the folder where the user gave none; `made`
        says what was done to the language part's weights. Raises as calibrate() and make_corpus(), and
        BuildError where another build has the folder."""
        from builders.calibrate import CalibrationOptions, known_before

        self.device = _device(request.device)
        self._request = request
        folder = request.folder or beside
        target, draft = contents.target, contents.folders.get(DRAFT)
        digests = {LANGUAGE: target.source.sha256()}
        if draft is not None:
            digests[DRAFT] = draft.sha256()  # type: ignore[union-attr]
        changes = {LANGUAGE: made, DRAFT: ""}
        options = CalibrationOptions(seed=request.corpus.seed, device=request.device, memory=request.memory)
        parts = [part for part in contents.parts if part.name in digests]
        if request.folder is not None:  # a text may take minutes, and what it is called is known
            name = corpus_name(target.program, request.source, request.corpus)
            for part in parts:
                known = known_before(part.model, digests[part.name], changes[part.name], options)
                refuse_other(folder / part.name, {"text": name, **known})
        self._stack.callback(FolderLock(folder).close)
        self._own = None if request.folder else beside
        watcher.phase("text", 1)
        self._corpus = make_corpus(target, request.source, request.corpus, request.device, folder / OWN_TEXT)
        watcher.step(f"{self._corpus.name}, {self._corpus.tokens} tokens")
        for part in parts:
            corpus = self._corpus
            if part.name == DRAFT:
                windows = corpus.windows[:, : part.program.max_context]
                corpus = replace(corpus, windows=windows)
            self._weights[part.name] = part.model
            self._parts[part.name] = self._calibrate(
                part.model,
                corpus,
                folder / part.name,
                digests[part.name],
                changes[part.name],
                options,
                watcher,
            )

    def _calibrate(
        self,
        weights: Model,
        corpus: Corpus,
        folder: Path,
        digests: Mapping[str, str],
        made: str,
        options: CalibrationOptions,
        watcher: Watcher,
    ) -> Calibration:
        from builders.calibrate import calibrate

        def run() -> Calibration:
            return calibrate(
                weights, corpus, folder, digests=digests, made=made, options=options, watcher=watcher
            )

        try:
            found = run()
        except BadConfig:
            if self._own is None:
                raise
            forget(folder)  # of a build of something else that was interrupted here
            found = run()
        self._stack.callback(found.close)
        return found

    def sensitivity(
        self,
        part: Part,
        formats: Sequence[str],
        unit: Literal["kl", "hessian"] | None,
        algorithm: str,
        watcher: Watcher,
    ) -> Sensitivity:
        """Losses of the language part's tensors in `formats`, rounded by `algorithm` where that is no long
        work (OWN_WORK), else to nearest. `run` must have come before. Figures stay with the calibration, for
        a build that goes on and for other builds."""
        from builders.measure_sensitivity import SensitivityOptions, measure_sensitivity

        found, corpus = self._parts[LANGUAGE], self._corpus
        assert corpus is not None
        journal = found.folder / JOURNAL
        specs = (s for s in part.model.program.tensors.values() if s.role != "vector")
        work = len(formats) * sum(spec.size * spec.cols for spec in specs)
        own = algorithm if work <= OWN_WORK else "rtn"
        calibrated = get_algorithm(own).CALIBRATED
        options = SensitivityOptions(
            unit=unit,
            algorithm=own,
            row_importance=self.row_importance(part, formats) if calibrated else {},
        )
        return measure_sensitivity(
            part.model, found, corpus, formats, options, journal=journal, watcher=watcher
        )

    def notes(self, subject: object) -> Journal:
        """Where figures of plans are written down, to stay with the calibration. `subject`: what they are of
        beside it."""
        found = self._parts[LANGUAGE]
        return Journal(found.folder / TRIALS, {"calibration": found.sha256, "of": subject})

    def __enter__(self) -> Calibrations:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all; remove the build's own folder, unless it was interrupted and will go on."""
        interrupted = kind is not None and not issubclass(kind, Exception)
        with self._stack:  # which lets the folder go, the last of all
            if self._own is not None and not interrupted:
                for name in (LANGUAGE, DRAFT):
                    forget(self._own / name)
                for name in (OWN_TEXT, f"{OWN_TEXT}.part", LOCK):
                    (self._own / name).unlink(missing_ok=True)
                with suppress(OSError):  # something else is in it
                    self._own.rmdir()
        self._parts = {}


def _device(name: str) -> str:
    """cpu or cuda. Raises Unsupported without torch, or without the device asked for."""
    try:
        from builders.torch_device import resolve_device

        return resolve_device(name)
    except ImportError:
        raise Unsupported(
            "a calibrated build needs torch: pip install 'edge-runtime[calibrate]', or use --algorithm rtn "
            "or hqq with a format for --weights"
        ) from None
