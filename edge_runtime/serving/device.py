"""Which backend runs an engine on this machine, and what a user should be told about that."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Mapping

from edge_runtime import backends
from edge_runtime.backends.protocol import Backend
from edge_runtime.engine.manifest import Fingerprint
from edge_runtime.engine.plan import TensorPlan
from edge_runtime.engine.probe import Machine, probe_machine
from edge_runtime.engine.program import Program
from edge_runtime.errors import BackendUnavailable, BadConfig, DeviceMismatch, Unsupported, nearest

AUTO = "auto"


def backend_names() -> list[str]:
    """Every backend of this build: a module of edge_runtime/backends that has BACKEND."""
    names = [m.name for m in pkgutil.iter_modules(backends.__path__)]
    return [name for name in names if hasattr(_module(name), "BACKEND")]


def get_backend(name: str) -> Backend:
    """The backend of that name. Raises BadConfig naming the nearest one."""
    if re.fullmatch(r"[a-z][a-z0-9_]{0,31}", name) and _exists(name):
        backend: Backend | None = getattr(_module(name), "BACKEND", None)
        if backend is not None:
            return backend
    raise BadConfig(f"unknown backend {name!r:.60}; {nearest(name, [AUTO, *backend_names()])}")


def choose_backend(
    fingerprint: Fingerprint, name: str = AUTO, machine: Machine | None = None
) -> tuple[Backend, list[str]]:
    """The backend that runs an engine, and sentences a user should read.

    auto: the engine's own backend, on a device that matches; a named one is taken as asked for. `machine` is
    probed when it matters and is not given. Raises DeviceMismatch naming both devices, BackendUnavailable
    with the reason, BadConfig for an unknown name.
    """
    if name != AUTO:
        backend = get_backend(name)
        _check_available(backend)
        if name == fingerprint.backend or (name == "reference" and fingerprint.backend == "cpu"):
            return backend, []
        return backend, [f"planned for {_target(fingerprint)}, opened on the {name} backend as asked for"]
    if fingerprint.backend != "cpu":
        _check_device(fingerprint, machine if machine is not None else probe_machine(measure=False))
    if not _exists(fingerprint.backend):
        raise BackendUnavailable(
            f"this build has no {fingerprint.backend} backend, which the engine is planned for; "
            f"try --backend cpu (backends: {', '.join(backend_names())})"
        )
    backend = get_backend(fingerprint.backend)
    _check_available(backend)
    return backend, []


def check_supports(backend: Backend, program: Program, tensors: Mapping[str, TensorPlan]) -> None:
    """Raise Unsupported, with the backend's own reason, when it cannot run the program with these formats."""
    answer = backend.supports(program, {name: plan.format for name, plan in tensors.items()})
    if not answer.ok:
        raise Unsupported(f"the {backend.name} backend cannot run this engine: {answer.why}")


def _check_available(backend: Backend) -> None:
    answer = backend.available()
    if not answer.ok:
        raise BackendUnavailable(f"the {backend.name} backend cannot run here: {answer.why}")


def _check_device(fingerprint: Fingerprint, machine: Machine) -> None:
    here = machine.profile
    if (here.backend, here.compute_capability) != (fingerprint.backend, fingerprint.compute_capability):
        this = f"{machine.model} ({_capability(here.backend, here.compute_capability)})"
        raise DeviceMismatch(
            f"the engine is planned for {_target(fingerprint)}, this machine is {this}; build it for this "
            "machine (edge-build --profile auto), or try it here with --backend cpu"
        )


def _target(fingerprint: Fingerprint) -> str:
    return f"{fingerprint.profile} ({_capability(fingerprint.backend, fingerprint.compute_capability)})"


def _capability(backend: str, capability: str | None) -> str:
    return backend if capability is None else f"{backend}, compute capability {capability}"


def _exists(name: str) -> bool:
    return importlib.util.find_spec(f"{backends.__name__}.{name}") is not None


def _module(name: str) -> object:
    return importlib.import_module(f"{backends.__name__}.{name}")
