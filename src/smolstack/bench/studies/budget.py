"""Accuracy and time of the bundled reader over the visual token budget."""

from __future__ import annotations

from time import perf_counter

from smolstack.bench.studies.drawn import character_error_rate, drawn_numbers, exact_share
from smolstack.bench.studies.kept import Kept, Row
from smolstack.bench.studies.quality import read_all
from smolstack.bench.workload import Workload
from smolstack.vlm import load

IMAGES = 200
TITLE = "budget of the bundled reader"


def study(workload: Workload, kept: Kept | None = None) -> dict[str, list[Row]]:
    """Run the reader with every budget that changes a plan, per precision."""
    images = drawn_numbers(IMAGES, seed=1)
    truths = [image.text for image in images]
    kept = kept or Kept()
    for dtype in workload.dtypes:
        vlm = load(dtype=dtype)
        per_tile = vlm.config.tokens_per_tile
        most = max(vlm.plan(image.image).tiles for image in images)
        seen = None
        for budget in range(per_tile, most * per_tile + 1, per_tile):
            plans = [vlm.plan(p.image, max_image_tokens=budget) for p in images]
            if plans == seen:
                continue
            seen = plans
            if kept.has(TITLE, precision=dtype, max_image_tokens=budget):
                continue
            vlm.clear_caches()
            began = perf_counter()
            answers = read_all(vlm, images, max_image_tokens=budget)
            row = {
                "precision": dtype,
                "max_image_tokens": budget,
                "visual tokens, mean": sum(p.visual_tokens for p in plans) / len(plans),
                "images": len(truths),
                "exact": exact_share(answers, truths),
                "character error rate": character_error_rate(answers, truths),
                "seconds per image": (perf_counter() - began) / len(plans),
            }
            kept.add(TITLE, [row])
    return kept.tables
