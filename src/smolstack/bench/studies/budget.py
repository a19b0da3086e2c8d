"""Accuracy and time of the bundled reader over the visual token budget."""

from __future__ import annotations

from time import perf_counter
from typing import Any

from smolstack.bench.studies.drawn import character_error_rate, drawn_numbers, exact_share
from smolstack.bench.studies.quality import read_all
from smolstack.bench.workload import Workload
from smolstack.vlm import load

IMAGES = 200


def study(workload: Workload) -> dict[str, list[dict[str, Any]]]:
    """Run the reader with every budget that changes a plan, per precision."""
    images = drawn_numbers(IMAGES, seed=1)
    truths = [image.text for image in images]
    rows = []
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
            vlm.clear_caches()
            began = perf_counter()
            answers = read_all(vlm, images, max_image_tokens=budget)
            rows.append(
                {
                    "precision": dtype,
                    "max_image_tokens": budget,
                    "visual tokens, mean": sum(p.visual_tokens for p in plans) / len(plans),
                    "images": len(truths),
                    "exact": exact_share(answers, truths),
                    "character error rate": character_error_rate(answers, truths),
                    "seconds per image": (perf_counter() - began) / len(plans),
                }
            )
    return {"budget of the bundled reader": rows}
