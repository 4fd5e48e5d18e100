"""Torch-free runtime: open an engine file and generate text from it.

    from edge_runtime import open_engine, Sampling

    with open_engine("model.edge") as session:
        for token in session.generate("Once upon a time", Sampling(temperature=0.8, seed=1)):
            print(token.text, end="", flush=True)

Names are loaded on first use (PEP 562), so that importing one floor of the runtime costs only that floor.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edge_runtime.engine.strict_yaml import read_yaml
    from edge_runtime.errors import (
        BackendUnavailable,
        BadCheckpoint,
        BadConfig,
        BadEngineFile,
        BadPrefixFile,
        BadRequest,
        BuildError,
        DeviceMismatch,
        DoesNotFit,
        EdgeError,
        GrammarError,
        NumericError,
        QualityLimit,
        QueueFull,
        Unsupported,
        ValueOutOfRange,
        nearest,
    )
    from edge_runtime.serving.grammar import Grammar
    from edge_runtime.serving.open import open_engine
    from edge_runtime.serving.request import Completion, Request, Timing, Token, Usage
    from edge_runtime.serving.sampling import Sampling
    from edge_runtime.serving.session import Session

__version__ = "0.1.0"

_ERRORS = "edge_runtime.errors"
_REQUEST = "edge_runtime.serving.request"
_HOMES = {
    "open_engine": "edge_runtime.serving.open",
    "Session": "edge_runtime.serving.session",
    "Sampling": "edge_runtime.serving.sampling",
    "Completion": _REQUEST,
    "Grammar": "edge_runtime.serving.grammar",
    "Request": _REQUEST,
    "Timing": _REQUEST,
    "Token": _REQUEST,
    "Usage": _REQUEST,
    "BackendUnavailable": _ERRORS,
    "BadCheckpoint": _ERRORS,
    "BadConfig": _ERRORS,
    "BadEngineFile": _ERRORS,
    "BadPrefixFile": _ERRORS,
    "BadRequest": _ERRORS,
    "BuildError": _ERRORS,
    "DeviceMismatch": _ERRORS,
    "DoesNotFit": _ERRORS,
    "EdgeError": _ERRORS,
    "GrammarError": _ERRORS,
    "NumericError": _ERRORS,
    "QualityLimit": _ERRORS,
    "QueueFull": _ERRORS,
    "Unsupported": _ERRORS,
    "ValueOutOfRange": _ERRORS,
    "nearest": _ERRORS,
    "read_yaml": "edge_runtime.engine.strict_yaml",
}

__all__ = [
    "BackendUnavailable",
    "BadCheckpoint",
    "BadConfig",
    "BadEngineFile",
    "BadPrefixFile",
    "BadRequest",
    "BuildError",
    "Completion",
    "DeviceMismatch",
    "DoesNotFit",
    "EdgeError",
    "Grammar",
    "GrammarError",
    "NumericError",
    "QualityLimit",
    "QueueFull",
    "Request",
    "Sampling",
    "Session",
    "Timing",
    "Token",
    "Unsupported",
    "Usage",
    "ValueOutOfRange",
    "__version__",
    "nearest",
    "open_engine",
    "read_yaml",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'edge_runtime' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
