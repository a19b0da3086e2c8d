"""Results as tables, as Markdown, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.table import Table

from smolstack.bench.timing import OURS, Result

_SHORT = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}


def table(results: Sequence[Result], limits: Mapping[str, float]) -> Table:
    """Return one row per contender and case; rates are shown with their share of the machine's
    limit.
    """
    out = Table(box=None, padding=(0, 2), title_justify="left")
    for name in ("case", "contender"):
        out.add_column(name, no_wrap=True)
    for name in ("median", "least–most", "rate", "of limit"):
        out.add_column(name, justify="right", no_wrap=True)
    out.add_column("times smolstack", justify="right")  # four precisions wrap where they must
    for case, group in _by_case(results):
        for index, result in enumerate(group):
            rate, share = _rate(result, limits)
            out.add_row(
                "" if index else case,
                result.contender,
                amount(result.median, result.unit),
                f"{amount(result.fastest, result.unit)}–{amount(result.slowest, result.unit)}",
                rate,
                share,
                _ratios(result),
                style="" if result.name == OURS else "dim",
            )
    return out


def rows_table(title: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of a study as a table."""
    out = Table(box=None, padding=(0, 2), title=title, title_justify="left")
    for name in rows[0]:
        out.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        out.add_row(*(_cell(name, value) for name, value in row.items()))
    return out


def to_dict(
    results: Sequence[Result],
    studies: Mapping[str, Sequence[Mapping[str, Any]]],
    machine: Mapping[str, Any],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """Return everything as plain data; times in seconds, memory in bytes."""
    return {
        "machine": dict(machine),
        "limits": dict(limits),
        "results": [asdict(result) for result in results],
        "studies": {name: [dict(row) for row in rows] for name, rows in studies.items()},
    }


def from_dict(data: Mapping[str, Any]) -> list[Result]:
    """Return the results of :func:`to_dict`."""
    return [Result(**result) for result in data["results"]]


def markdown(
    results: Sequence[Result],
    studies: Mapping[str, Sequence[Mapping[str, Any]]],
    limits: Mapping[str, float],
) -> str:
    """Return Markdown tables: one per case, one per study."""
    lines: list[str] = []
    for case, group in _by_case(results):
        lines += [f"**{case}**", "", "| contender | median | range | rate | times smolstack |"]
        lines += ["|---|---|---|---|---|"]
        for r in group:
            rate, share = _rate(r, limits)
            rate = f"{rate} ({share})" if share else rate
            span = f"{amount(r.fastest, r.unit)}–{amount(r.slowest, r.unit)}"
            lines.append(
                f"| {r.contender} | {amount(r.median, r.unit)} | {span} | {rate} | {_ratios(r)} |"
            )
        lines.append("")
    for title, rows in studies.items():
        lines += [f"**{title}**", "", "| " + " | ".join(rows[0]) + " |"]
        lines.append("|" + "---|" * len(rows[0]))
        lines += ["| " + " | ".join(_cell(*pair) for pair in row.items()) + " |" for row in rows]
        lines.append("")
    return "\n".join(lines)


def machine_line(machine: Mapping[str, Any], limits: Mapping[str, float]) -> str:
    """Describe processor, threads, measured limits and versions in one line."""
    said = [f"{machine['processor']} ({', '.join(machine['instructions'])})"]
    said += [f"{machine['threads']} threads", f"kernels: {machine['kernels']}"]
    if limits:
        rates = (
            f"{_SHORT.get(name, name)} {limits[name]:.0f}" for name in limits if name != "read"
        )
        said.append(f"matrix products {', '.join(rates)} GFLOP/s")
        said.append(f"memory {limits['read']:.0f} GB/s")
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return f"{'; '.join(said)}; {versions}"


def amount(value: float, unit: str) -> str:
    """Format with three significant figures: seconds in µs, ms or s, bytes in MiB or GiB."""
    if unit == "B":
        return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"
    if value < 0.001:
        return f"{value * 1e6:.3g} µs"
    return f"{value * 1e3:.3g} ms" if value < 0.9995 else f"{value:.3g} s"


def _by_case(results: Sequence[Result]) -> Iterator[tuple[str, list[Result]]]:
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(result.case, []).append(result)
    return iter(groups.items())


def _ratios(result: Result) -> str:
    """Return a contender's median relative to smolstack's, for each of smolstack's precisions."""
    if result.name == OURS:
        return ""
    return ", ".join(
        f"{_SHORT.get(name, name)} {ratio:.2f}×".strip() for name, ratio in result.ratios.items()
    )


def _rate(result: Result, limits: Mapping[str, float]) -> tuple[str, str]:
    """Return a contender's rate relative to the limit that it is closer to: arithmetic or
    memory.
    """
    rate, share = "", 0.0
    limit = limits.get({"int4": "int8"}.get(result.precision, result.precision), 0.0)
    if result.flops and limit:
        rate, share = f"{result.gflops:.0f} GFLOP/s", result.gflops / limit
    if result.bytes_read and limits.get("read"):
        read = result.gigabytes / limits["read"]
        if read > share:
            rate, share = f"{result.gigabytes:.1f} GB/s", read
    return rate, f"{share:.0%}" if rate else ""


def _cell(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    if name in ("exact", "top-1 agreement", "character error rate") or name.startswith("same"):
        return f"{value:.1%}"
    if name == "perplexity":
        return f"{value:.2f}"
    if name.endswith("bytes"):
        return amount(value, "B")
    if "seconds" in name:
        return amount(value, "s")
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
