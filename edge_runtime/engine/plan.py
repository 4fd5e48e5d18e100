"""Plan: what was chosen for one (model, profile, budgets), and the memory it takes to the byte."""

from __future__ import annotations

import msgspec

from edge_runtime.engine.kv import per_channel

DRAFT_LENGTH = 8  # tokens proposed to the target at once, unless asked otherwise
MAX_DRAFT_LENGTH = 64


class TensorPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Format (numbers) and packing (byte order) of one tensor."""

    format: str
    packing: str


class KvPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """KV cache: formats of keys and values by cache name (f16, int8, …), tokens a page, pages in all."""

    k: str
    v: str
    page_tokens: int
    pages: int

    @property
    def per_channel(self) -> bool:
        """Whether keys have scales per channel and page (KIVI), so that a page counts as a whole."""
        return per_channel(self.k)


class StepShape(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The largest step a session may ask for; every buffer is sized by it once.

    context: tokens of one sequence; sequences: rows of page tables; tokens: tokens of one step;
    logits: rows of logits of one step.
    """

    context: int
    sequences: int
    tokens: int
    logits: int


class MemoryPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes, each figure one row of the table that `edge-build --dry-run` prints."""

    weights: int
    kv: int
    buffers: int
    draft: int  # draft part and Medusa heads: weights, KV cache and buffers of each
    adapters: int  # those that the engine carries, as a backend holds them
    device_code: int
    context: int  # what the device's driver takes for itself (CUDA context)
    reserve: int  # kept free for the rest of the robot
    total: int  # bytes the device has in all, as the profile or the probe says

    @property
    def need(self) -> int:
        model = self.weights + self.kv + self.buffers + self.draft + self.adapters
        return model + self.device_code + self.context

    @property
    def have(self) -> int:
        return self.total - self.reserve


class Prediction(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Roofline figures for the power mode: decode at half the context, first token of `prompt_tokens`."""

    decode_tokens_per_s: float
    first_token_ms: float
    prompt_tokens: int


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The choice for one part of an engine."""

    profile: str
    power_mode: str
    tensors: dict[str, TensorPlan]
    kv: KvPlan
    step: StepShape
    memory: MemoryPlan
    predicted: Prediction
