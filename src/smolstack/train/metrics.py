"""metrics.jsonl, with one line per step and per evaluation, and its plot."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

from smolstack.errors import ConfigError
from smolstack.output_files import atomic_file

METRICS, PLOT = "metrics.jsonl", "loss.png"


class Metrics:
    """The run's log: appended line by line, truncated to the checkpoint when a run is resumed.

    Args:
        folder: the run's folder.
        keep: number of steps (over all stages) whose lines are kept; later lines are removed.
        tensorboard: write TensorBoard files as well.
    """

    def __init__(self, folder: Path, keep: int, *, tensorboard: bool = False) -> None:
        self.path = folder / METRICS
        kept = [line for line in read_metrics(self.path) if line["step"] <= keep]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = self.path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "tensorboard = true needs the package tensorboard "
                    "(pip install 'smolstack[tensorboard]')"
                ) from None
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=keep + 1)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and flush it."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._board is not None:
            for name, value in line.items():
                if isinstance(value, (int, float)) and name not in ("step", "stage"):
                    self._board.add_scalar(name, value, line["step"])

    def close(self) -> None:
        """Close the file, ignoring errors: every line is already flushed."""
        with suppress(OSError):
            self._file.close()
        if self._board is not None:
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without an incomplete last line from a killed process."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def plot(folder: Path) -> Path | None:
    """Draw the run's losses into loss.png; None if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    lines = read_metrics(folder / METRICS)
    steps = [line for line in lines if "loss" in line]
    evaluated = [line for line in lines if "evaluation_loss" in line]
    answered = [line for line in evaluated if "character_error_rate" in line]
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    at, losses = [line["step"] for line in steps], [line["loss"] for line in steps]
    axes.plot(at, losses, color="#9db4d0", linewidth=0.8, label="loss of a step")
    axes.plot(at, _smooth(losses), color="#1f4e8c", linewidth=1.8, label="smoothed")
    _line(axes, evaluated, "evaluation_loss", "o-", color="#c2571a", label="evaluation loss")
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    for before, after in pairwise(steps):
        if before["stage"] != after["stage"]:
            axes.axvline(before["step"], color="#888888", linewidth=0.8, linestyle=":")
    handles, labels = axes.get_legend_handles_labels()
    if answered:
        right = axes.twinx()
        right.set(ylabel="share", ylim=(0, 1.02))
        _line(right, answered, "exact", "s--", color="#2e7d32", label="answers exact")
        _line(
            right,
            answered,
            "character_error_rate",
            "^--",
            color="#8e2430",
            label="character error rate",
        )
        more = right.get_legend_handles_labels()
        handles, labels = handles + more[0], labels + more[1]
    axes.legend(handles, labels, loc="center right", fontsize=8, framealpha=0.9)
    with atomic_file(folder / PLOT) as beside:
        figure.savefig(beside, format="png")
    return folder / PLOT


def _line(axes: Any, lines: list[dict[str, Any]], key: str, style: str, **look: str) -> None:
    at, values = [line["step"] for line in lines], [line[key] for line in lines]
    axes.plot(at, values, style, markersize=4, linewidth=1, **look)


def _smooth(values: list[float], weight: float = 0.95) -> list[float]:
    """Return an exponential moving average that starts at the first value, without bias."""
    smoothed, total, count = [], 0.0, 0.0
    for value in values:
        total, count = total * weight + value, count * weight + 1
        smoothed.append(total / count)
    return smoothed
