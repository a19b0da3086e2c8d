"""The project's performance targets, as ratios of medians in one run, and whether they are met.

A peer is represented by its fastest form in a precision; smolstack by the named precision, or by
the best of its own if none is named.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from smolstack.bench.report import amount
from smolstack.bench.timing import OURS, Result

Results: TypeAlias = Sequence[Result]
Studies: TypeAlias = Mapping[str, Sequence[Mapping[str, Any]]]
OWN_PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")


@dataclass(frozen=True)
class Race:
    """smolstack must be ``least`` times as fast as a peer (or need so much less memory).

    A precision of None is the best of all.
    """

    case: str
    peer: str
    peer_precision: str | None
    least: float
    precision: str | None = None

    def describe(self) -> str:
        own, theirs = (
            f"{name} {'best precision' if precision is None else precision}".strip()
            for name, precision in ((OURS, self.precision), (self.peer, self.peer_precision))
        )
        return f"{self.case}: {own} against {theirs}"

    def measured(self, results: Results) -> float | None:
        """How many times as fast, or None where one of them did not run."""
        own, other = (
            OWN_PRECISIONS if precision is None else (precision,)
            for precision in (self.precision, self.peer_precision)
        )
        ours = _least(results, self.case, OURS, own)
        theirs = _least(results, self.case, self.peer, other)
        return None if ours is None or theirs is None else theirs / ours


@dataclass(frozen=True)
class Bound:
    """smolstack must stay below a number."""

    case: str
    most: float
    precision: str = ""

    def measured(self, results: Results) -> float | None:
        return _least(results, self.case, OURS, (self.precision,))


_TRANSFORMERS = "transformers"


def _races() -> Iterator[Race]:
    vision = "vision, 1 tile"
    yield Race(vision, "openvino", "bfloat16", 1, "bfloat16")
    yield Race(vision, "onnxruntime", "int8", 1.2, "int8")
    yield Race(vision, _TRANSFORMERS, "bfloat16", 2, "int8")
    for context in (100, 1200):
        decode = f"decode, after {context} tokens"
        yield Race(decode, "llama.cpp", "int8", 1, "int8")
        yield Race(decode, "llama.cpp", "int4", 1, "int4")
        yield Race(decode, _TRANSFORMERS, "bfloat16", 6, "int8")
    yield Race("prefill, 1188 tokens", _TRANSFORMERS, "bfloat16", 1.5)
    for tiles in ("1 tile", "5 tiles", "13 tiles", "17 tiles"):
        yield Race(f"images, {tiles}", _TRANSFORMERS, "", 1.6, "")
    for tiles in ("1 tile", "5 tiles", "17 tiles"):
        for precision in ("float32", "bfloat16"):
            yield Race(f"connector, {tiles}", _TRANSFORMERS, precision, 1, precision)
    for tiles, bfloat16, float32 in (("1 tile", 4, 6), ("17 tiles", 2.5, 4)):
        case = f"{tiles}, 64 tokens"
        yield Race(f"ask, {case}", _TRANSFORMERS, "bfloat16", bfloat16)
        yield Race(f"ask, {case}", _TRANSFORMERS, "float32", float32)
        yield Race(f"memory, {case}", _TRANSFORMERS, "bfloat16", 1)
    for stage in ("connector", "lora"):
        for case, least in (("first epoch", 1.5), ("later epochs", 3.5), ("peak memory", 1)):
            yield Race(f"train {stage}, {case}", _TRANSFORMERS, None, least)


RACES = tuple(_races())
BOUNDS = (Bound("import", 0.15), Bound("load", 0.3, "bfloat16"))
LOST_POINTS = 0.5  # percentage points of the reader's exact answers, in int8
BATCH, BATCH_GAIN = 16, 4.0
# Limits of a precision's distance from float32: (study, precision, column, most). For a checkpoint
# made by bench/real_model.py and the included texts and images.
QUALITY = (
    ("quality of text", "int8", "KL to float32", 0.005),
    ("quality of text", "int4", "KL to float32", 0.25),
    ("quality of images with outliers", "int8", "relative error of visual tokens", 0.03),
)


def reached(results: Results, studies: Studies) -> list[dict[str, Any]]:
    """Return every target with results: name, target, measured, met."""
    rows = []
    for race in RACES:
        ratio = race.measured(results)
        if ratio is not None:
            # Compare the two decimals that are shown.
            met = round(ratio, 2) >= race.least
            rows.append(_row(race.describe(), f"≥ {race.least:g}×", f"{ratio:.2f}×", met))
    for bound in BOUNDS:
        took = bound.measured(results)
        if took is not None:
            what = f"{bound.case} {bound.precision}".strip()
            target = f"< {amount(bound.most, 's')}"
            rows.append(_row(what, target, amount(took, "s"), took < bound.most))
    for measure in (_reader_target, _quality_targets, _batch_target):
        rows += measure(studies)
    return rows


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the targets as a table; empty if there are none."""
    if not rows:
        return ""
    lines = ["**Targets**", "", "| what | target | measured | met |", "|---|---|---|---|"]
    lines += [
        f"| {r['what']} | {r['target']} | {r['measured']} | {'yes' if r['met'] else '**no**'} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _reader_target(studies: Studies) -> Iterator[dict[str, Any]]:
    for row in studies.get("quality of the bundled reader", ()):
        if row["precision"] == "int8":
            lost = row["points lost"]
            yield _row(
                "exact answers of the reader lost in int8",
                f"≤ {LOST_POINTS:g} points",
                f"{lost:.2f} points",
                lost <= LOST_POINTS,
            )


def _quality_targets(studies: Studies) -> Iterator[dict[str, Any]]:
    for study, precision, column, most in QUALITY:
        for row in studies.get(study, ()):
            if row["by"] == OURS and row["precision"] == precision:
                what = f"{study}, {precision}: {column}"
                yield _row(what, f"≤ {most:g}", f"{row[column]:.2g}", row[column] <= most)


def _batch_target(studies: Studies) -> Iterator[dict[str, Any]]:
    rows = [row for row in studies.get("growth", ()) if row["over"] == "batch"]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        taken = {row["count"]: row["seconds"] for row in rows if row["precision"] == precision}
        if BATCH in taken and 1 in taken:
            gain = BATCH * taken[1] / taken[BATCH]
            yield _row(
                f"tokens a second of {BATCH} sequences against one, {precision}",
                f"≥ {BATCH_GAIN:g}×",
                f"{gain:.1f}×",
                gain >= BATCH_GAIN,
            )


def _row(what: str, target: str, measured: str, met: bool) -> dict[str, Any]:
    return {"what": what, "target": target, "measured": measured, "met": met}


def _least(results: Results, case: str, name: str, precisions: Sequence[str]) -> float | None:
    """Return the smallest median among a contender's forms in some precisions."""
    found = [r for r in results if r.case == case and r.name == name]
    return min((r.median for r in found if r.precision in precisions), default=None)
