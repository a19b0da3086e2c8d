"""Studies: precisions against float32, growth, budgets; on a model that takes no time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from smolstack.bench import plots
from smolstack.bench.studies import budget, drawn, growth, quality
from smolstack.bench.workload import Workload


def test_the_drawn_numbers_are_always_the_same_and_stand_in_their_images() -> None:
    first, again = drawn.drawn_numbers(12), drawn.drawn_numbers(12)
    assert [d.text for d in first] == [d.text for d in again]
    for one, other in zip(first, again, strict=True):
        assert one.image.tobytes() == other.image.tobytes()
        pixels = np.asarray(one.image).astype(int)
        ink = np.abs(pixels - pixels[0, 0]).sum(axis=2) > 100
        rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
        # Whole: the number touches no edge; and it fills its part of the width.
        assert rows[0] > 0
        assert rows[-1] < one.image.height - 1
        assert columns[0] > 0
        assert columns[-1] < one.image.width - 1
        assert 1 <= len(one.text) <= 6


def test_character_errors_are_counted_per_character_of_the_truth() -> None:
    assert drawn.character_error_rate(["4711", "12"], ["4711", "12"]) == 0
    assert drawn.character_error_rate(["471", "123"], ["4711", "12"]) == pytest.approx(2 / 6)
    assert drawn.character_error_rate(["nothing"], ["8"]) == 7
    assert drawn.exact_share(["4711", "13"], ["4711", "12"]) == 0.5


def test_every_precision_is_held_against_float32(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "IMAGES", 3)
    monkeypatch.setattr(quality, "FORCED", 12)
    found = quality.study(tiny)
    for rows in found.values():
        assert [row["precision"] for row in rows] == ["float32", "int8"]
    exact, other = found["quality of logits"]
    assert exact["largest difference"] == exact["mean difference"] == 0
    assert exact["top-1 agreement"] == 1
    assert exact["tokens"] == 13
    assert 0 < other["mean difference"] < other["largest difference"]
    assert 0.5 < other["top-1 agreement"] <= 1
    own = found["quality of the bundled reader"][0]
    assert own["points lost"] == 0
    assert own["same answer as float32"] == 1


def test_growth_is_measured_beside_what_is_expected_and_drawn(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(growth, "TILES", (1, 2))
    monkeypatch.setattr(growth, "CONTEXTS", (20, 40, 100_000))
    monkeypatch.setattr(growth, "BATCHES", (1, 2, 4))
    rows = growth.study(replace(tiny, dtypes=("float32",)))["growth"]
    counts = {row["work"]: [r["count"] for r in rows if r["work"] == row["work"]] for row in rows}
    assert counts == {
        "vision tower and connector": [1, 2],
        "prefill": [20, 40],  # as far as the model's context goes
        "one more token": [20, 40],
        "32 tokens for each sequence": [1, 2, 4],
    }
    for row in rows:
        assert row["seconds"] > 0
        assert row["peak bytes"] > 2**20
    tiles = [row for row in rows if row["over"] == "tiles"]
    # Twice the tiles, twice the work.
    assert tiles[1]["expected seconds"] == pytest.approx(2 * tiles[0]["expected seconds"])
    files = plots.draw([], {"growth": rows}, {}, tmp_path / "growth.png")
    assert files == [tmp_path / "growth.png"]
    assert files[0].read_bytes().startswith(b"\x89PNG")


def test_what_is_expected_is_the_nearest_curve_of_its_form() -> None:
    counts = (1, 2, 4, 8)
    prompts = [3 * n + 2 * n**2 for n in counts]
    assert growth.fitted(counts, prompts, (1, 2)) == pytest.approx(prompts)
    # No part of a cost is negative; what grows faster than its form lies above it in the end.
    squares = [float(n**2) for n in counts]
    assert growth.fitted(counts, squares, (0, 1))[-1] < squares[-1]


def test_the_reader_is_asked_with_every_budget_that_changes_a_plan(
    tiny: Workload, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(budget, "IMAGES", 2)
    rows = budget.study(tiny)["budget of the bundled reader"]
    own = [row for row in rows if row["precision"] == "float32"]
    budgets = [row["max_image_tokens"] for row in own]
    spent = [row["visual tokens, mean"] for row in own]
    assert budgets == sorted(set(budgets))
    assert spent == sorted(set(spent))
    assert all(mean <= most for mean, most in zip(spent, budgets, strict=True))
    assert all(0 <= row["exact"] <= 1 and row["seconds per image"] > 0 for row in rows)
    plots.draw([], {"budget of the bundled reader": rows}, {}, tmp_path / "budget.png")
    assert (tmp_path / "budget.png").read_bytes().startswith(b"\x89PNG")
