"""Quality of each precision: the bundled reader's answers, and a preset's logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from smolstack.bench.studies.drawn import character_error_rate, drawn_numbers, exact_share
from smolstack.bench.studies.kept import Kept, Row
from smolstack.bench.workload import QUESTION, Workload
from smolstack.vlm import VLM, load

IMAGES = 400
AT_ONCE = 16
READER, LOGITS = "quality of the bundled reader", "quality of logits"
FORCED = 256  # number of forced tokens
REFERENCE = "float32"


def study(workload: Workload, kept: Kept | None = None) -> dict[str, list[Row]]:
    """Compare every precision of the workload with float32."""
    kept = kept or Kept()
    for title, measured in ((READER, reader), (LOGITS, logits)):
        left = [d for d in _with_reference(workload) if not kept.has(title, precision=d)]
        if left:
            for row in measured(workload, left):
                kept.add(title, [row])
    return kept.tables


def reader(workload: Workload, dtypes: Sequence[str]) -> Iterator[Row]:
    """Yield exact matches and character error rate of precisions on drawn numbers."""
    images = drawn_numbers(IMAGES)
    truths = [image.text for image in images]
    expected = _read(REFERENCE, images)
    for dtype in dtypes:
        answers = expected if dtype == REFERENCE else _read(dtype, images)
        yield {
            "precision": dtype,
            "images": len(truths),
            "exact": exact_share(answers, truths),
            "points lost": 100 * (exact_share(expected, truths) - exact_share(answers, truths)),
            "character error rate": character_error_rate(answers, truths),
            "same answer as float32": exact_share(answers, expected),
        }


def logits(workload: Workload, dtypes: Sequence[str]) -> Iterator[Row]:
    """Yield differences of precisions' logits on an image and forced tokens, read as in
    generation: the prompt in one pass, then one token at a time.
    """
    expected = _forced_logits(workload, REFERENCE)
    spread = float(expected.std())
    best = expected.topk(2, dim=-1).values
    for dtype in dtypes:
        scores = expected if dtype == REFERENCE else _forced_logits(workload, dtype)
        yield {
            "preset": workload.preset.name,
            "precision": dtype,
            "tokens": len(scores),
            "largest difference": float((scores - expected).abs().max()),
            "mean difference": float((scores - expected).abs().mean()),
            "spread of float32's logits": spread,
            "float32's lead, median": float((best[:, 0] - best[:, 1]).median()),
            "top-1 agreement": float(
                (scores.argmax(dim=-1) == expected.argmax(dim=-1)).float().mean()
            ),
        }


def _with_reference(workload: Workload) -> list[str]:
    return list(dict.fromkeys((REFERENCE, *workload.dtypes)))


def _read(dtype: str, images: list[Any]) -> list[str]:
    """Return the bundled reader's answers."""
    vlm = load(dtype=dtype)
    return read_all(vlm, images)


def read_all(vlm: VLM, images: list[Any], **tiling: Any) -> list[str]:
    """Return answers to "What does it say?" about each image, in batches."""
    answers: list[str] = []
    for start in range(0, len(images), AT_ONCE):
        prompts = [(p.image, QUESTION) for p in images[start : start + AT_ONCE]]
        found = vlm.ask_many(prompts, max_new_tokens=40, **tiling)
        answers += [answer.text for answer in found]
    return answers


def _forced_logits(workload: Workload, dtype: str) -> Tensor:
    """Return logits (tokens, V) for a prompt with an image followed by fixed random tokens."""
    vlm = load(workload.folder, dtype=dtype)
    model, scene = vlm.model, workload.scenes[0]
    prompt = vlm.processor.prepare((str(scene.path), QUESTION), split=scene.split)
    batch = vlm.processor.batch([prompt])
    count = min(FORCED, workload.config.text.max_positions - batch.token_ids.shape[1] - 1)
    forced = workload.ids(count)[0]
    with torch.inference_mode():
        cache = model.new_cache(batch, batch.token_ids.shape[1] + count)
        scores = [model.prefill(batch, cache)]
        scores += [model.decode_one_token(token[None], cache) for token in forced]
        return torch.cat(scores).float()
