"""Interface packages as Python modules: `std_msgs.msg`, `std_srvs.srv`, `edge_interfaces.action`."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from layer_interfaces import definitions, messages

MAKERS = {"msg": messages.message_class, "srv": messages.service_class, "action": messages.action_class}


class _Interfaces(ModuleType):
    """One `package.kind`; classes are made when they are first asked for."""

    def __init__(self, package: str, kind: str) -> None:
        super().__init__(f"{package}.{kind}", f"The {kind} of {package}.")
        self._package, self._kind = package, kind

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        try:
            made = MAKERS[self._kind](f"{self._package}/{self._kind}/{name}")
        except LookupError as error:
            raise AttributeError(f"module {self.__name__} has no {name}: {error}") from None
        setattr(self, name, made)
        return made


def install(package: str) -> None:
    """Make `package.msg`, `package.srv` and `package.action` importable, as far as there are such."""
    for kind in MAKERS:
        folders = any((folder / package / kind).is_dir() for folder in definitions.FOLDERS)
        stored = kind == "msg" and any(
            name.startswith(f"{package}/") for name in definitions.store().fielddefs
        )
        if folders or stored:
            module = _Interfaces(package, kind)
            sys.modules[module.__name__] = module
            setattr(sys.modules[package], kind, module)
