"""Published checkpoints, with the keys and values of their own files, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tests.published import folders
from tests.published.checkpoints import LANGUAGE_MODELS
from tests.published.forms import Published

import smolstack
from smolstack.interop.reference import load_model, load_processor

PIXELS, LOGITS = 1e-6, 1e-4
QUESTION = "What does it say, in 2 or 31 words?"


def image() -> Image.Image:
    random = np.random.default_rng(4)
    small = random.integers(0, 256, (5, 19, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((190, 48))


def chat(picture: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": parts}]


def theirs_of(folder: Path, model_type: str, messages: Any, *, split: bool) -> Any:
    processor = load_processor(folder, model_type)
    return processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"do_image_splitting": split},
    )


def assert_same(folder: Path, model_type: str) -> None:
    """Ids and pixels, split and whole, and logits are transformers' own."""
    vlm = smolstack.load(folder, dtype="float32")
    messages = chat(image())
    for split in (True, False):
        theirs = theirs_of(folder, model_type, messages, split=split)
        ours = vlm.processor([messages], split=split)
        assert ours.token_ids.tolist() == theirs["input_ids"].tolist()
        assert ours.tiles.shape == theirs["pixel_values"][0].shape
        assert (ours.tiles - theirs["pixel_values"][0]).abs().max() <= PIXELS
    with torch.inference_mode():
        logits, expected = vlm.model(ours), load_model(folder)(**theirs).logits
    assert expected.std() > 0.1
    assert (logits - expected).abs().max() <= LOGITS


@pytest.mark.parametrize("published", LANGUAGE_MODELS, ids=lambda one: one.repository)
def test_a_published_checkpoint_is_transformers_to_the_logits(
    published: Published, tmp_path: Path
) -> None:
    assert_same(folders.write(published, tmp_path / "model"), published.config["model_type"])
