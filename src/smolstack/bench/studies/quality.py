"""Quality of each precision: the bundled reader's answers, and a preset's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from smolstack.bench.studies.drawn import character_error_rate, drawn_numbers, exact_share
from smolstack.bench.workload import QUESTION, Workload
from smolstack.vlm import VLM, load

IMAGES = 400
AT_ONCE = 16
FORCED = 256  # number of forced tokens
REFERENCE = "float32"


def study(workload: Workload) -> dict[str, list[dict[str, Any]]]:
    """Compare every precision of the workload with float32."""
    return {
        "quality of the bundled reader": reader(workload),
        "quality of logits": logits(workload),
    }


def reader(workload: Workload) -> list[dict[str, Any]]:
    """Return exact matches and character error rate on drawn numbers."""
    images = drawn_numbers(IMAGES)
    truths = [image.text for image in images]
    said = {dtype: _read(dtype, images) for dtype in _with_reference(workload)}
    return [
        {
            "precision": dtype,
            "images": len(truths),
            "exact": exact_share(answers, truths),
            "points lost": 100
            * (exact_share(said[REFERENCE], truths) - exact_share(answers, truths)),
            "character error rate": character_error_rate(answers, truths),
            "same answer as float32": exact_share(answers, said[REFERENCE]),
        }
        for dtype, answers in said.items()
    ]


def logits(workload: Workload) -> list[dict[str, Any]]:
    """Return differences of logits on an image and forced tokens, read as in generation: the
    prompt in one pass, then one token at a time.
    """
    found = {dtype: _forced_logits(workload, dtype) for dtype in _with_reference(workload)}
    expected = found[REFERENCE]
    spread = float(expected.std())
    best = expected.topk(2, dim=-1).values
    return [
        {
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
        for dtype, scores in found.items()
    ]


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
