"""Plots of a run (matplotlib): roofline, growth, token budgets, and quality of precisions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smolstack.bench.timing import OURS, Result
from smolstack.errors import ConfigError
from smolstack.output_files import atomic_file

_COLOURS = {"float32": "#777777", "bfloat16": "#1f6fb4", "int8": "#d0662b", "int4": "#2c8a4b"}
_MARKS = {OURS: "o", "transformers": "s", "onnxruntime": "^", "openvino": "D", "llama.cpp": "v"}
_DOTS = 120  # per inch
QUALITY = "quality of text"  # the study that is drawn
_EXACT = 1e-5  # nats: smaller KL values are drawn here, because a logarithmic axis has no 0


def draw(
    results: Sequence[Result],
    studies: Mapping[str, Sequence[Mapping[str, Any]]],
    limits: Mapping[str, float],
    path: Path,
) -> list[Path]:
    """Draw all available plots: into ``path``, and next to it if there are several.

    Raises:
        ConfigError: matplotlib is not installed, or no measurement can be drawn.
    """
    _figure()
    kinds: list[tuple[str, Any]] = []
    counted = [result for result in results if result.flops and result.bytes_read]
    if counted:
        kinds.append(("roofline", lambda: roofline(counted, limits)))
    if "growth" in studies:
        kinds.append(("growth", lambda: growth(studies["growth"])))
    for name, rows in studies.items():
        if name.startswith("budget"):
            kinds.append(("budget", lambda rows=rows: budget(rows)))
        if name == QUALITY and rows:
            kinds.append(("quality", lambda rows=rows: quality(rows)))
    if not kinds:
        raise ConfigError(
            "nothing to plot, expected one of vision, prefill, decode, connector, growth, budget, "
            "quality with --model"
        )
    written = []
    for kind, make in kinds:
        own = path if len(kinds) == 1 else path.with_name(f"{path.stem}-{kind}{path.suffix}")
        with atomic_file(own) as beside:
            make().savefig(beside, dpi=_DOTS)
        written.append(own)
    return written


def check_plot(path: Path) -> None:
    """Check that a plot could be written, before anything is measured.

    Raises:
        ConfigError: matplotlib is not installed, it does not know the suffix, or there is no such
            folder.
    """
    known = _figure().canvas.get_supported_filetypes()
    if path.suffix[1:].lower() not in known:
        found = path.suffix or "nothing"
        raise ConfigError(f"{path} ends in {found}, expected one of .{', .'.join(sorted(known))}")
    if not path.parent.is_dir():
        raise ConfigError(f"{path}: the folder {path.parent} does not exist")


def roofline(results: Sequence[Result], limits: Mapping[str, float]) -> Any:
    """Rates over operations per byte of weights, under the machine's limits (Williams 2009)."""
    figure = _figure(9, 6)
    axes = figure.add_subplot()
    intensity = [result.flops / result.bytes_read for result in results]
    low, high = min(intensity) / 2, max(intensity) * 2
    for name, colour in _COLOURS.items():
        if limits.get(name):
            knee = limits[name] / limits["read"]
            axes.plot([knee, high], [limits[name]] * 2, color=colour, lw=1, ls="--")
            axes.text(high, limits[name], f"{name} ", ha="right", va="bottom", color=colour)
    top = max(limits.get(name, 0) for name in _COLOURS)
    axes.plot([low, top / limits["read"]], [low * limits["read"], top], color="black", lw=1)
    axes.text(low, low * limits["read"], f" memory {limits['read']:.0f} GB/s", va="bottom")
    for result, x in zip(results, intensity, strict=True):
        axes.plot(
            x,
            result.gflops,
            _MARKS.get(result.name, "x"),
            color=_COLOURS.get(result.precision, "black"),
            markersize=9 if result.ours else 6,
            alpha=0.9 if result.ours else 0.55,
        )
    _name_cases(axes, results)
    for name in dict.fromkeys(result.name for result in results):
        axes.plot([], [], _MARKS.get(name, "x"), color="black", label=name)
    for name in dict.fromkeys(result.precision for result in results):
        axes.plot([], [], "s", color=_COLOURS.get(name, "black"), label=name)
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="operations per byte of weights",
        ylabel="10⁹ operations a second",
    )
    axes.legend(fontsize=8, loc="lower right")
    axes.grid(alpha=0.2)
    return figure


def _name_cases(axes: Any, results: Sequence[Result]) -> None:
    """Label each case next to smolstack's fastest result."""
    for case in dict.fromkeys(result.case for result in results):
        own = [result for result in results if result.case == case and result.ours]
        if own:
            best = max(own, key=lambda result: result.gflops)
            place = (best.flops / best.bytes_read, best.gflops)
            axes.annotate(
                case, place, (6, -10), textcoords="offset points", fontsize=7, color="#333333"
            )


def growth(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Seconds (above) and peak memory (below) of every curve, with the expected growth."""
    works = list(dict.fromkeys((row["work"], row["over"]) for row in rows))
    figure = _figure(4 * len(works), 7)
    for place, (work, over) in enumerate(works):
        time = figure.add_subplot(2, len(works), place + 1)
        memory = figure.add_subplot(2, len(works), len(works) + place + 1)
        for dtype in dict.fromkeys(row["precision"] for row in rows):
            own = [r for r in rows if r["precision"] == dtype and r["work"] == work]
            counts = [row["count"] for row in own]
            colour = _COLOURS.get(dtype, "black")
            for axes, name, scale in ((time, "seconds", 1.0), (memory, "bytes", 2.0**30)):
                measured = "seconds" if name == "seconds" else "peak bytes"
                axes.plot(counts, [r[measured] / scale for r in own], "o-", color=colour)
                axes.plot(
                    counts, [r[f"expected {name}"] / scale for r in own], ls=":", color=colour
                )
            time.plot([], [], "o-", color=colour, label=dtype)
        time.plot([], [], ls=":", color="black", label="expected")
        time.set(xscale="log", yscale="log", title=work, ylabel="seconds")
        memory.set(xscale="log", ylim=(0, None), xlabel=over, ylabel="peak memory, GiB")
        for axes in (time, memory):
            axes.grid(alpha=0.2)
        time.legend(fontsize=8)
    return figure


def budget(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Exact answers and seconds per image over the visual token budget."""
    figure = _figure(9, 4)
    exact, seconds = figure.subplots(1, 2)
    for dtype in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == dtype]
        budgets = [row["max_image_tokens"] for row in own]
        colour = _COLOURS.get(dtype, "black")
        exact.plot(budgets, [100 * r["exact"] for r in own], "o-", color=colour, label=dtype)
        seconds.plot(budgets, [1e3 * r["seconds per image"] for r in own], "o-", color=colour)
    exact.set(xlabel="max_image_tokens", ylabel="exact answers, %", ylim=(0, 100))
    seconds.set(xlabel="max_image_tokens", ylabel="ms per image", ylim=(0, None))
    for axes in (exact, seconds):
        axes.grid(alpha=0.2)
    exact.legend(fontsize=8)
    return figure


def quality(rows: Sequence[Mapping[str, Any]]) -> Any:
    """KL to float32 over milliseconds per token, if measured, and over bytes.

    The line is the Pareto front: no other point is both closer to float32 and faster (or smaller).
    """
    axes = [("text tower, MB", "bytes of the text tower, MB", 1.0)]
    if all("seconds a token" in row for row in rows):
        axes.insert(0, ("seconds a token", "ms a token", 1e3))
    figure = _figure(6.5 * len(axes), 5)
    for index, (name, label, scale) in enumerate(axes):
        shown = figure.add_subplot(1, len(axes), index + 1)
        points = [(scale * row[name], max(row["KL to float32"], _EXACT)) for row in rows]
        front = pareto_front(points)
        shown.step(*zip(*front, strict=True), where="post", color="#999999", lw=1, zorder=0)
        for row, point in zip(rows, points, strict=True):
            ours = row["by"] == OURS
            colour = "#1f6fb4" if ours else "#d0662b"
            shown.plot(*point, _MARKS.get(row["by"], "x"), color=colour, markersize=8)
            shown.annotate(
                row["precision"],
                point,
                (6, 5),
                textcoords="offset points",
                fontsize=8,
                color=colour,
            )
        for by in dict.fromkeys(row["by"] for row in rows):
            colour = "#1f6fb4" if by == OURS else "#d0662b"
            shown.plot([], [], _MARKS.get(by, "x"), color=colour, label=by)
        shown.plot([], [], color="#999999", lw=1, label="Pareto front")
        shown.set(xscale="log", yscale="log", xlabel=label)
        shown.set_ylabel(f"KL(float32 ‖ precision), nats a token ({_EXACT:g}: that or less)")
        _plain_ticks(shown)
        shown.grid(alpha=0.2, which="both")
        shown.legend(fontsize=8, loc="upper right")
    return figure


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points that are not dominated by another, sorted by the first number."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _plain_ticks(axes: Any) -> None:
    """Use plain tick labels on a short logarithmic axis: 3, 5, 10, 20."""
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _figure(width: float = 6, height: float = 4) -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "plots need matplotlib, which is not installed: pip install 'smolstack[bench]'"
        ) from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
