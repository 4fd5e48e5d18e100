"""placeholder of the seam until the grammar branch lands"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from edge_runtime.engine.formats import Array


@dataclass(frozen=True, slots=True)
class Grammar:
    kind: str
    text: str


class Constraint(Protocol):
    def mask(self) -> Array: ...
    def advance(self, token: int) -> None: ...
    @property
    def is_done(self) -> bool: ...
    def forced(self) -> list[int]: ...
    def fork(self) -> Constraint: ...


class GrammarCompiler:
    def __init__(self, tokenizer_json: bytes, vocabulary: Any) -> None: ...
    def compile(self, grammar: Grammar) -> Constraint: ...
    def close(self) -> None: ...
