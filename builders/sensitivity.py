"""How much each tensor suffers from each format: what the planner spends bytes by.

`losses[tensor][format]` is the predicted rise of the model's loss when only that tensor is stored so, and the
planner adds them up (the errors of layers are nearly independent while they are small: Nagel et al. 2020).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from edge_runtime.engine.folder import MAX_INDEX, read_capped
from edge_runtime.errors import BadCheckpoint, BadConfig

_WEIGHTS = (".safetensors", ".gguf")


class Tried(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A plan that was tried out whole: by what losses it was the best; its KL to the f32 model in nats."""

    plan: str
    kl: float


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """unit "kl": nats of KL to the f32 model a token, measured; "hessian": tr(E H E^T) over tr(W H W^T).

    `algorithm` says how values were chosen; `text` is the calibration text's name, `tokens` how many. With
    unit "kl" only formats in `measured` were run; the others' losses follow by the ratio of errors. tried:
    plans that refine.py tried out, with KL on the same text; the losses are then those of the best of them.
    model_sha256: digest of the checkpoint's weight files; None in files of versions that wrote none.
    """

    unit: Literal["kl", "hessian"]
    algorithm: str
    text: str
    tokens: int
    losses: dict[str, dict[str, float]]
    measured: tuple[str, ...] = ()
    kv_losses: dict[str, float] | None = None  # of cache pairs such as "int8,int4", in the same unit
    tried: tuple[Tried, ...] = ()
    model_sha256: str | None = None

    def of_model(self, digests: Mapping[str, str]) -> Sensitivity:
        """The same, as measured on the checkpoint whose files have these digests, by name."""
        return msgspec.structs.replace(self, model_sha256=weights_digest(digests))

    def check_model(self, digests: Mapping[str, str]) -> None:
        """Raises BadConfig where it was measured on other weights than those of these files."""
        if self.model_sha256 not in (None, weights_digest(digests)):
            raise BadConfig(
                "the sensitivity file was measured on other weights than this model's; measure it again on "
                "this model, or delete model_sha256 from the file to plan by it all the same"
            )

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))


def weights_digest(digests: Mapping[str, str]) -> str:
    """One digest of a checkpoint's weights, from those of its files, whatever their names."""
    weights = sorted(sha for name, sha in digests.items() if name.endswith(_WEIGHTS))
    return hashlib.sha256("\n".join(weights).encode()).hexdigest()


def read_sensitivity(path: Path) -> Sensitivity:
    """Raises BadConfig for a file that is not one, or holds a loss that is negative or not finite."""
    try:
        found = msgspec.json.decode(read_capped(path, MAX_INDEX), type=Sensitivity)
    except (msgspec.MsgspecError, BadCheckpoint) as error:
        raise BadConfig(f"{path} is no sensitivity file of edge-build: {error}") from None
    tried = {plan.plan: plan.kl for plan in found.tried}
    named = [*found.losses.items(), ("the KV cache", found.kv_losses or {}), ("a plan tried", tried)]
    for tensor, losses in named:
        for name, loss in losses.items():
            if not 0.0 <= loss < float("inf"):
                raise BadConfig(
                    f"{path}: loss of {tensor!r} in {name} is {loss}, expected a finite number >= 0"
                )
    return found
