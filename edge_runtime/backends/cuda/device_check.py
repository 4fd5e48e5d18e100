"""Which device code of an engine runs on a GPU, answered before anything is read or allocated."""

from __future__ import annotations

from collections.abc import Sequence

from edge_runtime.backends.cuda.driver import DeviceFacts
from edge_runtime.engine.manifest import DeviceCodeEntry
from edge_runtime.engine.probe import newest_ptx
from edge_runtime.engine.profile import capability_of
from edge_runtime.errors import DeviceMismatch

TEGRA = {53, 62, 72, 87, 101, 110}  # sm of Jetsons: their cubins and those of other GPUs are not exchanged


def check_device(facts: DeviceFacts, entries: Sequence[DeviceCodeEntry]) -> DeviceCodeEntry:
    """The entry of an engine's device code to load on this GPU: a cubin if one runs here, else PTX.

    A cubin runs on its own sm, off Jetsons also on a later minor of the same major, with a driver of its CUDA
    major release or later; PTX on its sm and every later one, with a driver that knows its ISA. Raises
    DeviceMismatch naming both sides.
    """
    reasons: list[str] = []
    fit = [entry for entry in entries if not _unfit(facts, entry, reasons)]
    if fit:
        return max(fit, key=lambda entry: (entry.kind == "cubin", entry.sm))
    what = "; ".join(dict.fromkeys(reasons)) or "it holds none"
    old = any(_too_old(facts, entry) for entry in entries)
    do = "update the GPU's driver, or " if old else ""
    raise DeviceMismatch(
        f"no device code of the engine runs on {facts}: {what}; {do}build the engine for this machine "
        "(edge-build --profile auto)"
    )


def _unfit(facts: DeviceFacts, entry: DeviceCodeEntry, reasons: list[str]) -> bool:
    ptx = entry.kind == "ptx"
    here, made = facts.sm, entry.sm
    if ptx:
        runs = here >= made
    else:
        family = here // 10 == made // 10 and here >= made and not {here, made} & TEGRA
        runs = here == made or family
    if not runs:
        reasons.append(f"{entry.kind} is for sm_{made}{' and later' if ptx else ''}")
    elif _too_old(facts, entry):
        known = newest_ptx(facts.driver) or "older"
        reasons.append(
            f"ptx for sm_{made} is of ISA {entry.ptx} (CUDA {entry.cuda}), the driver knows {known}"
            if ptx
            else f"cubin for sm_{made} is of CUDA {entry.cuda}, the driver is for CUDA {facts.driver}"
        )
    return not runs or _too_old(facts, entry)


def _too_old(facts: DeviceFacts, entry: DeviceCodeEntry) -> bool:
    if entry.kind == "cubin":
        return capability_of(facts.driver)[0] < capability_of(entry.cuda)[0]
    known = newest_ptx(facts.driver)
    return known is None or capability_of(known) < capability_of(entry.ptx)
