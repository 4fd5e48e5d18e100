"""Typed reading of a foreign config.json: every key is read by name and type, or known to mean nothing here.

A key that nobody reads may change what the model computes, so `finish` refuses it instead of dropping it.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, overload

from edge_runtime.engine.program import MAX_DIM
from edge_runtime.errors import BadConfig, Unsupported, nearest

T = TypeVar("T")

# Keys of Hugging Face configs that change no logit: training, bookkeeping, generation defaults, id tables.
# fmt: off
IGNORED = frozenset({
    "_attn_implementation", "_attn_implementation_autoset", "_commit_hash", "_flash_attn_2_enabled",
    "_name_or_path", "architectures", "attention_dropout", "attn_implementation", "auto_map",
    "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "embd_pdrop", "encoder_no_repeat_ngram_size", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id", "forced_eos_token_id",
    "gradient_checkpointing", "id2label", "initializer_range", "is_decoder", "is_llama_config",
    "keys_to_ignore_at_inference", "label2id", "length_penalty", "max_length", "max_sequence_length",
    "min_length", "model_max_length", "model_type", "neftune_noise_alpha", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type",
    "remove_invalid_values", "repetition_penalty", "resid_pdrop", "return_dict", "return_dict_in_generate",
    "sep_token_id", "suppress_tokens", "task_specific_params", "temperature", "tie_last_hidden_states",
    "tokenizer_class", "tokenizer_model_max_length", "tokenizer_padding_side", "top_k", "top_p",
    "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache", "use_return_dict",
})
# fmt: on
# Keys that mean nothing at one value and another model at any other: (accepted values, what others mean).
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "add_cross_attention": ((False,), "cross-attention is not supported"),
    "cross_attention_hidden_size": ((None,), "cross-attention is not supported"),
    "full_attn_mod": ((1,), "layers that skip attention are not supported"),
    "interpolate_factor": ((1,), "interpolated positions are not supported"),
    "is_encoder_decoder": ((False,), "encoder-decoder models are not supported"),
    "lm_head_bias": ((False,), "a bias on the head is not supported"),
    "mlp_bias": ((False,), "this architecture has no such bias"),
    "attention_bias": ((False,), "this architecture has no such bias"),
    "per_layer_config": ((None, {}), "layers of different kinds are not supported"),
    "pruned_heads": ((None, {}), "pruned heads are not supported"),
    "quantization_config": ((None,), "build from the unquantized checkpoint"),
    "rope_interleaved": ((False,), "the checkpoint must be in half-split rotary order"),
    "text_config": ((None,), "build from the text model's own folder"),
    "tie_encoder_decoder": ((False,), "encoder-decoder models are not supported"),
    "use_mrope": ((False,), "multimodal rotary positions are not supported"),
    "vision_config": ((None,), "vision models are not supported"),
}
SMALLEST, LARGEST = 1e-30, 1e30
_REQUIRED: Any = object()


class ModelConfig:
    """A config.json (or a dictionary inside it, `path` says which) and the keys read from it so far."""

    def __init__(self, values: Mapping[str, Any], path: str = "config.json") -> None:
        if not isinstance(values, Mapping):
            raise BadConfig(f"{path} is {_typed(values)}, expected an object")
        self.values = values
        self.path = path
        self.known: set[str] = set()

    @overload
    def read(self, kind: type[T], key: str) -> T: ...
    @overload
    def read(self, kind: type[T], key: str, default: T) -> T: ...
    def read(self, kind: type[T], key: str, default: Any = _REQUIRED) -> T:
        """The value of `key`, which must be of `kind` (an int passes as float). Raises BadConfig by name."""
        value = self.read_or_null(kind, key, default)
        if value is None:
            raise BadConfig(f"{self.path}: {key!r} is null, expected {kind.__name__}")
        return value  # type: ignore[no-any-return]

    def read_or_null(self, kind: type[T], key: str, default: T | None = _REQUIRED) -> T | None:
        """As `read`, but null is a value (None) of its own: an absent key means `default`."""
        self.known.add(key)
        if key not in self.values:
            if default is _REQUIRED:
                raise BadConfig(f"{self.path} has no {key!r} ({kind.__name__}){self._similar(key)}")
            return default
        value = self.values[key]
        if value is None:
            return None
        if kind is float and type(value) is int and abs(value) < 1 << 63:
            return float(value)  # type: ignore[return-value]
        if type(value) is not kind:
            raise BadConfig(f"{self.path}: {key!r} is {_typed(value)}, expected {kind.__name__}")
        return value

    def size(self, key: str, default: int | None = _REQUIRED) -> int:
        """A count, width or length: an int of 1 to MAX_DIM. Null or absent means `default`, where given."""
        value = self.read_or_null(int, key, default)
        if value is None and default is not _REQUIRED:
            value = default
        if value is None:
            raise BadConfig(f"{self.path}: {key!r} is null, expected int")
        if not 1 <= value <= MAX_DIM:
            raise BadConfig(f"{self.path}: {key!r} is {value}, expected 1 to {MAX_DIM}")
        return value

    def positive(self, key: str, default: float = _REQUIRED) -> float:
        """A float from SMALLEST to LARGEST, so that no product or logarithm of a few of them overflows."""
        value = self.read(float, key, default)
        if not SMALLEST <= value <= LARGEST:
            raise BadConfig(f"{self.path}: {key!r} is {value}, expected a positive number")
        return value

    def positive_or_null(self, key: str, default: float | None = None) -> float | None:
        value = self.read_or_null(float, key, default)
        return None if value is None else self.positive(key, value)

    def numbers(self, key: str, length: int) -> tuple[float, ...]:
        """A list of exactly `length` positive numbers."""
        values = self.read(list, key)
        good = [v for v in values if type(v) in (int, float) and SMALLEST <= v <= LARGEST]
        if len(good) != len(values) or len(values) != length:
            raise BadConfig(f"{self.path}: {key!r} must be a list of {length} positive numbers")
        return tuple(float(v) for v in good)

    def only(self, key: str, *accepted: Any, why: str) -> None:
        """`key` may be absent or one of `accepted`; anything else is Unsupported, because of `why`."""
        self.known.add(key)
        if key in self.values and not _among(self.values[key], accepted):
            raise Unsupported(f"{self.path}: {key!r} is {self.values[key]!r}: {why}")

    def ignore(self, *keys: str) -> None:
        """Keys that this architecture's model never reads."""
        self.known.update(keys)

    def section(self, key: str) -> ModelConfig | None:
        """The object under `key`, or None when it is absent, null or empty."""
        value = self.read_or_null(dict, key, None)
        return ModelConfig(value, f"{self.path}: {key}") if value else None

    def finish(self) -> None:
        """Refuse every key that was not read. Raises BadConfig (unknown) or Unsupported (another model)."""
        for key, (accepted, why) in FIXED.items():
            if key not in self.known:
                self.only(key, *accepted, why=why)
        unknown = sorted(set(self.values) - self.known - IGNORED)
        if unknown:
            key = unknown[0]
            raise BadConfig(
                f"{self.path}: key {key!r} is not known for this architecture and may change the model's "
                f"meaning; {nearest(key, self.known - FIXED.keys())}"
            )

    def _similar(self, key: str) -> str:
        close = difflib.get_close_matches(key, set(self.values) - self.known - IGNORED, n=1, cutoff=0.7)
        return f"; {close[0]!r} looks like it" if close else ""


def _among(value: Any, accepted: tuple[Any, ...]) -> bool:
    # True == 1 in Python, so types are compared as well
    return any(value == a and type(value) is type(a) for a in accepted)


def _typed(value: Any) -> str:
    text = repr(value)
    return f"{text[:60]} ({type(value).__name__})"
