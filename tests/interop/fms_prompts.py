"""Prompts for the Foundation Model Stack's tests, and what both sides write after them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from fms.utils.generation import generate
from PIL import Image

import smolstack.interop.fms as bridge
from smolstack.batch import Batch
from smolstack.model.vlm import VisionLanguageModel
from smolstack.processor.processor import Prompt
from smolstack.vlm import VLM


def noise(*sizes: tuple[int, int]) -> list[Image.Image]:
    """Images of (height, width) pixels that differ everywhere."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


def uneven_prompts(vlm: VLM) -> list[Prompt]:
    """Rows with one image of several tiles, no image, and two images of one tile each."""
    first, second, third = noise((60, 90), (40, 40), (30, 70))
    prepare = vlm.processor.prepare
    return [
        prepare((first, "What does it say?")),
        prepare("There is nothing written here."),
        prepare(([second, third], "Compare the two."), split=False),
    ]


def two_rows(vlm: VLM) -> Batch:
    """An image of several tiles, and one of a single tile with another question."""
    images = noise((60, 90), (40, 40))
    processor = vlm.processor
    return processor.batch(
        [
            processor.prepare((images[0], "What does it say?"), max_image_tokens=200),
            processor.prepare((images[1], "Describe the image."), split=False),
        ]
    )


def greedy(model: Any, batch: Batch, tokens: int, **options: Any) -> torch.Tensor:
    """What FMS's own generate writes after the prompts: (B, tokens)."""
    ids, extra = bridge.generation_inputs(batch)
    with torch.inference_mode():
        out: torch.Tensor = generate(
            model,
            ids,
            max_new_tokens=tokens,
            do_sample=False,
            prepare_model_inputs_hook=model.prepare_inputs_for_generation,
            extra_kwargs=extra,
            **{"use_cache": True, **options},
        )
    return out[:, ids.shape[1] :]


def own_greedy(model: VisionLanguageModel, batch: Batch, tokens: int) -> torch.Tensor:
    """The same by smolstack's model, without an end."""
    written = []
    with torch.inference_mode():
        cache = model.new_cache(batch, batch.token_ids.shape[1] + tokens)
        logits = model.prefill(batch, cache)
        for _ in range(tokens):
            written.append(logits.argmax(dim=-1))
            logits = model.decode_one_token(written[-1], cache)
    return torch.stack(written, dim=1)
