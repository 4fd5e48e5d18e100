"""Figures that need more than one part: shares of torch's matrix rate, ratios to torch's linears."""

from __future__ import annotations

from typing import Any

from gpu_sizes import SIZES

PREFILL_GOAL = 40.0  # % of the measured bf16 matrix rate, by the issue


def combine(results: dict[str, Any]) -> None:
    """Add a part `ratios` to results, with what its sources allow."""
    parts = results["parts"]
    ours, torch = parts.get("matrices", {}), parts.get("peers", {})
    decode = parts.get("decode", {})
    rate = torch.get("bf16_tflops")
    figures: list[dict[str, Any]] = []

    def figure(name: str, value: float, unit: str, goal: float | None = None) -> None:
        row: dict[str, Any] = {"name": name, "value": float(f"{value:.4g}"), "unit": unit}
        if goal is not None:
            row |= {"goal": f">= {goal:g} {unit}", "met": value >= goal}
        figures.append(row)
        print(f"  {name}: {row['value']:g} {unit}" + ("" if goal is None else f" ({row['goal']})"))

    for key, us in ours.get("matrices", {}).items():
        fmt, size, tokens = key.split()
        rows, cols = map(int, size.split("x"))
        if int(tokens) == SIZES.prompt and rate:
            share = 100 * 2 * rows * cols * SIZES.prompt / us / 1e6 / rate
            figure(f"{fmt} {size}, {tokens} tokens: of torch's bf16 rate", share, "%", PREFILL_GOAL)
        for peer in ("bf16", "int4"):
            theirs = torch.get("matrices", {}).get(f"{peer} {size} {tokens}")
            if theirs:
                figure(f"{fmt} {size}, {tokens} tokens: times faster than torch {peer}", theirs / us, "x")
    if rate and "prefill_tflops" in decode:
        share = 100 * decode["prefill_tflops"] / rate
        figure(f"whole prompt of {SIZES.prompt}: of torch's bf16 rate", share, "%", PREFILL_GOAL)
    for key, name in (
        ("bf16_linears", "torch's bf16 linears alone"),
        ("bf16_compiled", "torch.compile, bf16 linears alone"),
    ):
        theirs, mine = torch.get(f"seconds_{key}"), decode.get("seconds_step")
        if theirs and mine:
            figure(f"a decoded token, end to end: times faster than {name}", theirs / mine, "x")
    if figures:
        parts["ratios"] = {"state": "derived", "figures": figures, "checks": [], "notes": []}
