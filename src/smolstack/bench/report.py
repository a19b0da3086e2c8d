"""Results as a table for people and as JSON for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from smolstack.bench.timing import OURS, Result


def table(results: Sequence[Result], limits: Mapping[str, float]) -> Table:
    """One row per contender and case; rates stand beside their share of the machine's limit."""
    out = Table(box=None, padding=(0, 2), title_justify="left")
    for name in ("case", "contender"):
        out.add_column(name, no_wrap=True)
    for name in ("median", "fastest–slowest", "rate", "of limit", "smolstack is"):
        out.add_column(name, justify="right", no_wrap=True)
    for result in results:
        rate, share = _rate(result, limits)
        ours = result.contender == OURS
        out.add_row(
            result.case if ours else "",
            result.contender,
            duration(result.median),
            f"{duration(result.fastest)}–{duration(result.slowest)}",
            rate,
            share,
            "" if ours else f"{result.ratio:.2f}× as fast",
            style="" if ours else "dim",
        )
    return out


def to_dict(
    results: Sequence[Result], machine: Mapping[str, Any], limits: Mapping[str, float]
) -> dict[str, Any]:
    """Everything, as plain data; times in seconds."""
    return {
        "machine": dict(machine),
        "limits": dict(limits),
        "results": [asdict(result) for result in results],
    }


def markdown(results: Sequence[Result]) -> str:
    """A table for docs/benchmarks.md."""
    lines = ["| case | contender | median | range | smolstack is |", "|---|---|---|---|---|"]
    for r in results:
        ratio = "" if r.contender == OURS else f"{r.ratio:.2f}× as fast"
        span = f"{duration(r.fastest)}–{duration(r.slowest)}"
        lines.append(f"| {r.case} | {r.contender} | {duration(r.median)} | {span} | {ratio} |")
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """Three significant figures, in ms or s."""
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s"


def _rate(result: Result, limits: Mapping[str, float]) -> tuple[str, str]:
    if result.gflops:
        share = result.gflops / limits["matmul_gflops"]
        return f"{result.gflops:.0f} GFLOP/s", f"{share:.0%}"
    if result.gigabytes:
        share = result.gigabytes / limits["read_gigabytes"]
        return f"{result.gigabytes:.1f} GB/s", f"{share:.0%}"
    return "", ""
