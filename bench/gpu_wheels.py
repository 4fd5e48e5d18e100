"""Packages that gpu-check needs, from a folder of wheels where this Python lacks them: no network, no pip.

A wheel is a zip file (PEP 427); what is missing is unpacked into a folder of its own for PYTHONPATH.
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
import shutil
import sys
import zipfile
from pathlib import Path

NEEDED = {  # module: what it is for; the first ones nothing works without
    "numpy": "everything",
    "msgspec": "everything",
    "yaml": "profiles",
    "safetensors": "engines and checkpoints",
    "tokenizers": "engines",
    "cuda.bindings.driver": "the driver (or pycuda)",
}
OPTIONAL = {
    "pytest": "the kernels' conformance tests",
    "xdist": "their processes beside each other",
    "torch": "the bf16 matrix rate and the peers",
    "triton": "torch.compile",
    "matplotlib": "the chart",
    "scipy": "edge-build's planner",
}


def missing(modules: dict[str, str]) -> list[str]:
    """Those that this Python does not find."""
    return [name for name in modules if not found(name)]


def unpack_missing(folder: Path, site: Path) -> list[str]:
    """Unpack the wheels of `folder` that fit here and whose package is not there. Returns their names.

    Raises FileNotFoundError where the folder is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder of wheels {folder} does not exist")
    shutil.rmtree(site, ignore_errors=True)
    made = []
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as packed:
            if not fits(wheel.name) or not _lacking(packed):
                continue
            packed.extractall(site)
        for data in site.glob("*.data"):  # parts that an installer would move
            for kind in ("purelib", "platlib"):
                if (data / kind).is_dir():
                    shutil.copytree(data / kind, site, dirs_exist_ok=True)
        made.append(wheel.name)
    importlib.invalidate_caches()
    return made


def fits(name: str) -> bool:
    """Whether a wheel of that name is for this Python and machine, by its last three tags."""
    python, abi, system = name.removesuffix(".whl").split("-")[-3:]
    here = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    wanted = any(
        tag in (here, "py3", f"py{sys.version_info[0]}{sys.version_info[1]}")
        or (abi == "abi3" and tag.startswith("cp3") and int(tag[3:]) <= sys.version_info[1])
        for tag in python.split(".")
    )
    return wanted and (system == "any" or (sys.platform == "linux" and platform.machine() in system))


def _lacking(packed: zipfile.ZipFile) -> bool:
    """Whether something that a wheel brings is not there: its modules, or of namespaces the next ones."""
    names = {tuple(name.split("/")) for name in packed.namelist()}
    tops = {parts[0] for parts in names if not parts[0].endswith((".dist-info", ".data"))}
    modules = set()
    for top in tops:
        if f"{top}/__init__.py" in packed.namelist() or top.endswith((".py", ".so")):
            modules.add(top.split(".")[0])
        else:
            modules |= {f"{top}.{p[1].split('.')[0]}" for p in names if p[0] == top and len(p) > 1 and p[1]}
    return any(not found(module) for module in modules if not module.endswith(("_libs", ".libs")))


def found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):
        return False
