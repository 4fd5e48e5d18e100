"""End-to-end tuning: after an algorithm has chosen all values, they learn the f32 model's answers together.

Algorithms make every matrix's outputs right; here codes, scales and vectors of the whole model descend on the
divergence of its answers from the f32 model's, over the calibration text: EfficientQAT's second phase (Chen
et al. 2024, arXiv 2407.11062), which trains scales, with codes learning too, straight through their rounding
(as in LLM-QAT, Liu et al. 2023, arXiv 2305.17888), from where the algorithm left them. Scales take the values
that their format can hold after SETTLED of the steps, and codes and vectors make up for what that changed.
Codes of trellis formats are searched in every step, up to SEARCHED weights in all.

Some windows of the text are kept for judging: of the states of the model at the ends of eighths of the run,
that of least divergence on them is taken, or, where none is better, the model stays as it was. The text is
cut into pieces of fixed size, so that results do not depend on the cores. The model is in memory whole,
several times over (`memory_needed`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from builders.segment_runner import load
from builders.serial_weights import SerialWeights
from builders.torch_device import MAX_WORKERS, Workers, repeatable
from builders.torch_program import TorchProgram
from builders.training import SAVE_SECONDS, Run, learning_rate, restore_state, save_state
from builders.tuned_tensor import TunedMatrix, TunedTensor, tuned_tensor
from builders.tuned_trellis import TunedTrellis
from builders.watcher import Watcher
from builders.weights import Model
from edge_runtime.engine.formats import Array, Format, Planes
from edge_runtime.engine.formats.trellis import trellis_of
from edge_runtime.engine.probe import available_memory
from edge_runtime.engine.program import Program
from edge_runtime.errors import BadConfig, BuildError, NumericError

STATE = "tuning.safetensors"  # in the calibration's folder; an interrupted build goes on from it
LATENT_RATE = 0.03  # peak, in units of a latent number a step
LATENT_PATH = 5.0  # units that one could move at the peak rate all along: longer runs go in smaller steps
FACTOR_RATE = 0.003  # peak, of the scales, and of vectors in units of their own size
SETTLED = 0.75  # of the steps: scales are then what the format can hold
STEP_TOKENS = 2048
PIECE_TOKENS = 512  # that one worker takes through the model at once
JUDGED = 8  # of so many windows one is kept for judging, at least one
JUDGEMENTS = 8  # in a run: a short text is soon learned by heart
# Weights of trellis formats times steps; a search takes 3 to 5 us of a core each. Beyond, scales learn alone
SEARCHED = 4_000_000_000
# Of all weights in f32: teacher, values, latents, their gradients, two moments, and levels of a trellis
_COPIES = 7


@dataclass(frozen=True, slots=True)
class TuneOptions:
    """steps: of the optimizer. seed: order of the windows. device: cpu, cuda. cores: 0 for all."""

    steps: int
    seed: int = 1
    device: str = "cpu"
    cores: int = 0


@dataclass(frozen=True, slots=True)
class Tuned:
    """tensor -> its codec planes, of those that changed; KL in nats on the judging windows. Where it did not
    fall, nothing changed."""

    planes: dict[str, dict[str, Array]]
    before: float
    after: float


def memory_needed(program: Program, device: str) -> int:
    """Bytes for a model's weights in training, beside its activations."""
    workers = MAX_WORKERS if device == "cpu" else 1
    workers = min(workers, torch.get_num_threads())
    return 4 * (_COPIES + workers) * sum(spec.size for spec in program.tensors.values())


def require_memory(program: Program, device: str) -> None:
    """Raises BuildError where the weights cannot be in memory as often as tuning needs them."""
    need = memory_needed(program, device)
    if device == "cpu":
        free, source = available_memory()
    else:
        free, source = torch.cuda.mem_get_info(device)[0], f"free on {device}"
    if need > free:
        raise BuildError(
            f"--tune needs {need / 2**30:.1f} GiB for the weights in training, and {free / 2**30:.1f} GiB "
            f"are there ({source}); tune on a machine or GPU with more, or build without --tune"
        )


def tune(
    teacher: Model,
    program: Program,
    planes: Mapping[str, Planes],
    formats: Mapping[str, Format],
    windows: Array,
    folder: Path,
    options: TuneOptions,
    watcher: Watcher | None = None,
) -> Tuned:
    """Train the quantized model for `options.steps` steps.

    teacher: the f32 model. program: that of the quantized one, the same function in f32 (it may round
    activations, or be rotated). planes: of every tensor of it, in its format. windows: token ids (windows,
    length), two at least. folder: for the state of an interrupted run. Raises BadConfig for one window,
    NumericError where an answer is not finite.
    """
    if len(windows) < 2:
        raise BadConfig("tuning keeps some windows of the calibration text for judging, and it has only one")
    watcher = watcher or Watcher()
    subject = {"windows": _digest([("", windows)]), "planes": _digest_of(planes)}
    every = np.arange(len(windows)) % min(JUDGED, len(windows)) == 0
    judged, learned = windows[every], windows[~every]
    with repeatable(options.device, options.cores) as workers, torch.no_grad():

        def begin() -> tuple[_Models, Run]:
            models = _Models(teacher, program, planes, formats, options, workers)
            return models, models.run(options, subject)

        models, run = begin()
        before = models.judge(judged)
        best, state = _Best(run, before), folder / STATE
        if state.exists() and not _restored(models, run, state):
            del models, run, best  # before there are others: the model would be in memory twice as often
            models, run = begin()
            best = _Best(run, before)
        _train(models, run, best, learned, judged, options, state, watcher)
        state.unlink(missing_ok=True)
        return Tuned(best.planes(), before, best.kl)


def _restored(models: _Models, run: Run, state: Path) -> bool:
    """Whether the run goes on from the state. If not, it was of another build with this calibration, or cut
    short, and what was read of it is in the models."""
    try:
        restore_state(run, state)
        models.use(run.kept)
    except BadConfig:
        return False
    return True


def _train(
    models: _Models,
    run: Run,
    best: _Best,
    learned: Array,
    judged: Array,
    options: TuneOptions,
    state: Path,
    watcher: Watcher,
) -> None:
    """All steps that are left. An interruption between two of them leaves the state as it is then."""
    settled = int(SETTLED * options.steps)
    points = {-(-k * options.steps // JUDGEMENTS) for k in range(1, JUDGEMENTS + 1)}
    watcher.phase("tune", options.steps)
    for _ in range(run.step):
        watcher.step("done before")
    count = max(1, STEP_TOKENS // learned.shape[1])
    order = _Order(len(learned), options.seed)
    saved, whole = monotonic(), True  # a step that was cut short is no state to go on from
    try:
        while run.step < options.steps:
            whole = False
            if run.step == settled:
                models.settle(run)
            models.step(run, learned[order.batch(run.step, count)], run.step / options.steps)
            if run.step in points:
                planes = models.planes(run)
                models.decode(planes)
                best.offer(models.judge(judged), planes)
            whole = True
            watcher.step(f"KL {run.recent:.4g}, best of the judged {best.kl:.4g}")
            if monotonic() - saved > SAVE_SECONDS:
                save_state(run, state)
                saved = monotonic()
    except KeyboardInterrupt:
        if whole:
            save_state(run, state)
        raise


class _Best:
    """The planes of least KL so far, kept with the state of the run."""

    _KL, _PLANE = "best", "best:"

    def __init__(self, run: Run, before: float) -> None:
        self._run = run
        run.kept[self._KL] = torch.tensor(before, dtype=torch.float64)

    @property
    def kl(self) -> float:
        return float(self._run.kept[self._KL])

    def offer(self, kl: float, planes: Mapping[str, Planes]) -> None:
        if kl < self.kl:
            self._run.kept[self._KL] = torch.tensor(kl, dtype=torch.float64)
            for name, stored in planes.items():
                for plane, data in stored.items():
                    self._run.kept[f"{self._PLANE}{name}#{plane}"] = torch.from_numpy(data.copy())

    def planes(self) -> dict[str, dict[str, Array]]:
        """tensor -> planes; empty where the model was best before."""
        found: dict[str, dict[str, Array]] = {}
        for key, data in self._run.kept.items():
            if key.startswith(self._PLANE):
                name, _, plane = key.removeprefix(self._PLANE).rpartition("#")
                found.setdefault(name, {})[plane] = data.numpy()
        return found


class _Order:
    """Which windows a step learns from: every pass in an order of its own."""

    def __init__(self, windows: int, seed: int) -> None:
        self._windows, self._seed = windows, seed

    def batch(self, step: int, count: int) -> Array:
        places = np.arange(step * count, (step + 1) * count)
        passes, at = places // self._windows, places % self._windows
        orders = {
            p: np.random.default_rng([self._seed, int(p)]).permutation(self._windows) for p in set(passes)
        }
        return np.array([orders[p][i] for p, i in zip(passes, at, strict=True)])


class _Models:
    """The f32 model and the quantized one, whole on the device."""

    def __init__(
        self,
        teacher: Model,
        program: Program,
        planes: Mapping[str, Planes],
        formats: Mapping[str, Format],
        options: TuneOptions,
        workers: Workers,
    ) -> None:
        weights, device = SerialWeights(teacher), options.device
        exact = {name: load(weights, name, device) for name in teacher.program.tensors}
        self._teacher = TorchProgram(teacher.program, exact.__getitem__, checked=True)
        self._program, self._formats = program, formats
        self._device, self._workers = device, workers
        self._values: dict[str, Tensor] = {}
        self.decode(planes)
        self._tuned: dict[str, TunedTensor] = {}
        trellis = sum(values.numel() for name, values in self._values.items() if trellis_of(formats[name]))
        searches = trellis * options.steps <= SEARCHED
        for name, values in self._values.items():
            spec = program.tensors[name]
            made = tuned_tensor(formats[name], spec.role, planes[name], values, searches=searches)
            if made is not None:
                self._tuned[name] = made

    def decode(self, planes: Mapping[str, Planes]) -> None:
        """Take the values of these planes as they will be read from the engine."""
        for name, stored in planes.items():
            spec = self._program.tensors[name]
            decoded = self._formats[name].decode(stored, spec.rows, spec.cols)
            self._values[name] = torch.from_numpy(np.array(decoded)).to(self._device)

    def planes(self, run: Run) -> dict[str, dict[str, Array]]:
        return {name: tensor.planes(_squares(run, tensor)) for name, tensor in self._tuned.items()}

    def run(self, options: TuneOptions, subject: Mapping[str, str]) -> Run:
        """A training run of all parameters, not begun."""
        tensors: dict[str, Tensor] = {}
        groups = []
        latent_rate = min(LATENT_RATE, LATENT_PATH / options.steps)
        for kind, rate in (("latents", latent_rate), ("factors", FACTOR_RATE)):
            own = {f"{kind}:{name}": t for name, made in self._tuned.items() for t in getattr(made, kind)}
            tensors |= own
            groups.append({"params": list(own.values()), "peak": rate})
        # Gradients of single weights in a mean over tokens may be far below Adam's usual epsilon
        optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-15, weight_decay=0.0)
        identity = {"kind": "tune", "steps": options.steps, "seed": options.seed, **subject}
        return Run(tensors, optimizer, identity)

    def settle(self, run: Run) -> None:
        """Scales as they can be held; the run keeps them as `grid:TENSOR#PLANE`."""
        for name, tensor in self._tuned.items():
            tensor.settle()
            if isinstance(tensor, TunedMatrix | TunedTrellis):
                grid = {f"grid:{name}#{p}": torch.from_numpy(d.copy()) for p, d in tensor.grid.items()}
                run.kept |= grid

    def use(self, kept: Mapping[str, Tensor]) -> None:
        """Scales that were settled before an interruption, if they were."""
        for name, tensor in self._tuned.items():
            if (
                isinstance(tensor, TunedMatrix | TunedTrellis)
                and f"grid:{name}#{next(iter(tensor.grid))}" in kept
            ):
                tensor.use({p: kept[f"grid:{name}#{p}"].numpy() for p in tensor.grid})

    def step(self, run: Run, windows: Array, done: float) -> None:
        """One step of the optimizer. Raises NumericError."""
        began = monotonic()
        for name, tensor in self._tuned.items():
            self._values[name] = tensor.values(_squares(run, tensor)).requires_grad_()
        names = list(self._tuned)
        sums: list[Tensor] = []
        total = 0.0
        for loss, gradients in self._workers.map(self._slopes(names, windows.size), _pieces(windows)):
            total += loss
            sums = [a.add_(b) for a, b in zip(sums, gradients, strict=True)] if sums else gradients
        if not np.isfinite(total):
            raise NumericError(
                f"tuning, step {run.step + 1}: the divergence is {total:g}; build without --tune"
            )
        for name, gradient in zip(names, sums, strict=True):
            self._tuned[name].pull(gradient)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(group["peak"], run.step, done)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.losses.append(total)
        run.step += 1
        run.seconds += monotonic() - began

    def judge(self, windows: Array) -> float:
        """Mean KL(f32 || quantized) of the values as they are now, nats."""

        def measure(piece: Array) -> float:
            return float(self._divergence(piece))

        return sum(self._workers.map(measure, _pieces(windows))) / windows.size

    def _slopes(self, names: list[str], tokens: int) -> Callable[[Array], tuple[float, list[Tensor]]]:
        """A piece's share of the mean KL over `tokens`, and its gradients."""
        leaves = [self._values[name] for name in names]

        def work(piece: Array) -> tuple[float, list[Tensor]]:
            with torch.enable_grad():  # each thread has its own switch
                loss = self._divergence(piece) / tokens
                found = torch.autograd.grad(loss, leaves, allow_unused=True)
            each = zip(found, leaves, strict=True)
            return float(loss.detach()), [torch.zeros_like(leaf) if g is None else g for g, leaf in each]

        return work

    def _divergence(self, piece: Array) -> Tensor:
        """Sum over the tokens of a piece (windows, length)."""
        ids = torch.from_numpy(piece.astype(np.int64)).to(self._device)
        with torch.no_grad():
            wanted = F.log_softmax(self._teacher(ids), -1)
        student = TorchProgram(self._program, self._values.__getitem__, checked=True)
        return F.kl_div(F.log_softmax(student(ids), -1), wanted, reduction="sum", log_target=True)


def _squares(run: Run, tensor: TunedTensor) -> Tensor | None:
    """Mean squares of the gradients of a tensor's latents so far."""
    state = run.optimizer.state[tensor.latents[0]] if tensor.latents else {}
    return state.get("exp_avg_sq")


def _pieces(windows: Array) -> list[Array]:
    count = max(1, PIECE_TOKENS // windows.shape[1])
    return [windows[i : i + count] for i in range(0, len(windows), count)]


def _digest_of(planes: Mapping[str, Planes]) -> str:
    return _digest((f"{name}#{p}", data) for name, stored in planes.items() for p, data in stored.items())


def _digest(arrays: Iterable[tuple[str, Array]]) -> str:
    found = hashlib.sha256()
    for name, data in arrays:
        found.update(f"{name} {data.dtype.str} {data.shape}".encode())
        found.update(np.ascontiguousarray(data).data)
    return found.hexdigest()
