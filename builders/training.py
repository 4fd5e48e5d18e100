"""What every training run here has: named tensors under AdamW, a rate for each step, a state on disk, a bar.

The state is one safetensors file, written whole or not at all: tensors, both moments, what else the run
needs, and which run it is of. A run taken up from it goes on as if it had not stopped, to the bit.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

from edge_runtime.errors import BadConfig, BuildError, Unsupported

if TYPE_CHECKING:
    import torch

STATE = "training.safetensors"  # an interrupted run goes on from it; gone when the run is done
WARM_UP_STEPS = 40
FLOOR = 0.02  # of the peak learning rate, at the end
SAVE_SECONDS = 60.0
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass
class Run:
    """f32 tensors in training by name, the optimizer over them, and how far it has come.

    `kept`: other tensors that the state must hold (grids). `identity`: what makes it this run and no other.
    """

    tensors: dict[str, torch.Tensor]
    optimizer: torch.optim.AdamW
    identity: dict[str, Any]
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    whole: bool = True  # not while a step changes tensors and moments: that is no state to go on from

    @property
    def recent(self) -> float:
        """Mean loss of the last 20 steps, nan before the first."""
        last = self.losses[-20:]
        return sum(last) / len(last) if last else math.nan


def learning_rate(peak: float, step: int, done: float) -> float:
    """Linear warm-up by step, then a cosine over the run (`done` goes from 0 to 1)."""
    cosine = FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * cosine


def save_state(run: Run, path: Path) -> None:
    """Raises BuildError where the disk does not take it; an earlier state is then what it was."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors = {name: tensor.detach() for name, tensor in run.tensors.items()}
    tensors |= {f"kept:{name}": tensor for name, tensor in run.kept.items()}
    for name, tensor in run.tensors.items():
        moments = run.optimizer.state.get(tensor, {})
        tensors |= {f"{kind}:{name}": moments[kind] for kind in _MOMENTS if kind in moments}
    said = {"step": str(run.step), "seconds": repr(run.seconds), "run": _text(run.identity)}
    part = path.with_suffix(".part")
    try:
        save_file({n: t.contiguous() for n, t in tensors.items()}, part, metadata=said)
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise BuildError(f"{path}: the state of the run could not be saved: {error}") from None


def state_nbytes(run: Run) -> int:
    """Bytes of its state, once the optimizer has taken a step."""
    kept = sum(tensor.nbytes for tensor in run.kept.values())
    return (1 + len(_MOMENTS)) * sum(tensor.nbytes for tensor in run.tensors.values()) + kept


def restore_state(run: Run, path: Path) -> None:
    """Go on from a state; `run.tensors` keep their identity, `run.kept` is replaced.

    Raises BadConfig where the state is of another run, or cannot be read.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
            if said.get("run") != _text(run.identity):
                raise BadConfig(f"{path} is of a run with other options; repeat them, or give --fresh")
            run.step, run.seconds = int(said["step"]), float(said["seconds"])
            names = set(file.keys())
            kept = sorted(name for name in names if name.startswith("kept:"))
            run.kept = {name.removeprefix("kept:"): file.get_tensor(name) for name in kept}
            with torch.no_grad():
                for name, tensor in run.tensors.items():
                    tensor.copy_(file.get_tensor(name))
                    found = {k: file.get_tensor(f"{k}:{name}") for k in _MOMENTS if f"{k}:{name}" in names}
                    if found:
                        run.optimizer.state[tensor] = {"step": torch.tensor(float(run.step)), **found}
    except (SafetensorError, KeyError, ValueError) as error:
        raise BadConfig(f"{path} is damaged ({error}); begin again with --fresh") from None


def take_step(run: Run, peak: float, done: float, loss: Callable[[], torch.Tensor]) -> None:
    """One step of the optimizer on `loss()`, its gradient clipped to norm 1. A group's `share` of the rate is
    its own. Raises BadConfig where the loss is not finite."""
    import torch

    began = monotonic()
    rate = learning_rate(peak, run.step, done)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group.get("share", 1.0)
    run.optimizer.zero_grad(set_to_none=True)
    value = loss()
    if not math.isfinite(float(value.detach())):
        raise BadConfig(
            f"the loss of step {run.step + 1} is {float(value):g}; use a lower --rate than {peak:g}"
        )
    value.backward()
    torch.nn.utils.clip_grad_norm_(run.tensors.values(), 1.0)
    run.whole = False
    run.optimizer.step()
    run.losses.append(float(value.detach()))
    run.step += 1
    run.whole = True
    run.seconds += monotonic() - began


def watch(run: Run, steps: Iterator[float], save: Callable[[], None]) -> None:
    """Take the steps (each yields how much of the run is done), with a bar on stderr, or a line now and then
    where that is a log; `save` is called once a minute. A state that cannot be saved is said and no reason to
    stop: the next one, or the end, may come sooner than room."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("train"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn())
    saved = logged = monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("train", total=1.0, note="")
        for done in steps:
            note = f"step {run.step} loss {run.recent:.4f}"
            bar.update(task, completed=done, note=note)
            now = monotonic()
            if not console.is_terminal and now - logged > SAVE_SECONDS / 4:
                print(f"{note} {run.seconds:.0f} s", file=sys.stderr, flush=True)
                logged = now
            if now - saved > SAVE_SECONDS:
                _saved(save)
                saved = now


def _saved(save: Callable[[], None]) -> None:
    try:
        save()
    except BuildError as error:
        print(f"note: {error}", file=sys.stderr, flush=True)


def carry_out(
    run: Run,
    steps: Iterator[float],
    state: Path,
    *,
    fresh: bool,
    restored: Callable[[], None] = lambda: None,
    saving: Callable[[], None] = lambda: None,
) -> None:
    """Take all steps, from the state on where there is one and not `fresh`; an interruption leaves a new one,
    or the last where it cut a step in two.

    `steps` must not have begun. restored: called when a state was read; saving: before one is written.
    """
    state.parent.mkdir(parents=True, exist_ok=True)
    if state.exists() and not fresh:
        restore_state(run, state)
        restored()

    def save() -> None:
        saving()
        save_state(run, state)

    try:
        watch(run, steps, save)
    except KeyboardInterrupt:
        if run.whole:
            _saved(save)
        raise


def need_torch() -> None:
    """Raises Unsupported where torch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise Unsupported("training needs torch: pip install 'edge-runtime[train]'")


def check_limits(limits: Mapping[str, tuple[float, float, float]]) -> None:
    """option -> (value, least, most). Raises BadConfig naming the option."""
    for option, (value, least, most) in limits.items():
        if not least <= value <= most:
            raise BadConfig(f"{option} is {value:g}, expected {least:g} to {most:g}")


def _text(identity: Mapping[str, Any]) -> str:
    return json.dumps(identity, sort_keys=True)
