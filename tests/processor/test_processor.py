"""The processor: whole prompts in, one padded batch out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from PIL import Image

import smolstack
from smolstack.errors import ConfigError, ContextLengthError, ImageError, PromptError
from smolstack.processor.settings import ImageSettings
from smolstack.processor.tiles import open_image


def test_a_batch_holds_every_image_in_reading_order(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    batch = tiny_vlm.processor([(images[:2], "Compare."), "Hello", (images[2], "And this?")])
    # 100x40 becomes 128x51 and 4x2 tiles, 90x90 4x4 tiles, 30x120 1x4 tiles; one whole each.
    assert batch.tiles_per_image == (9, 17, 5)
    assert batch.images_per_sequence == (2, 0, 1)
    assert batch.tiles_per_sequence == (26, 0, 5)
    assert batch.tiles.shape == (31, 3, 32, 32)
    image_tokens = (batch.token_ids == tiny_vlm.config.image_token_id).sum(dim=1)
    assert image_tokens.tolist() == [26 * 4, 0, 5 * 4]


def test_padding_stands_on_the_left_and_is_masked(tiny_vlm: smolstack.VLM) -> None:
    batch = tiny_vlm.processor(["A long question about nothing", "Hi"])
    assert batch.attention_mask[0].all()
    padding = int((~batch.attention_mask[1]).sum())
    assert padding > 0
    assert not batch.attention_mask[1, :padding].any()
    assert batch.token_ids[1, :padding].tolist() == [2] * padding


def test_one_chat_may_be_given_as_its_messages(tiny_vlm: smolstack.VLM) -> None:
    chat = [{"role": "user", "content": "Hi"}]
    assert (
        tiny_vlm.processor(chat).token_ids.tolist() == tiny_vlm.processor(["Hi"]).token_ids.tolist()
    )


def test_splitting_can_be_switched_off(tiny_vlm: smolstack.VLM, images: list[Image.Image]) -> None:
    assert tiny_vlm.processor([(images[0], "?")], split=False).tiles_per_image == (1,)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "expected a list of prompts"),
        ("Hi", "expected a list of prompts"),
        ([("a.png",)], r"expected \(images, text\)"),
        ([[{"role": "user", "content": [{"type": "image"}]}]], "1 image parts without an image"),
        (
            [("a.png", [{"role": "user", "content": "Hi"}])],
            "0 image parts .* 1 images were given",
        ),
        ([7], r"expected \(images, text\) or a chat"),
        (["Where is <image>?"], "the prompt has 1 <image> placeholders for 0 images"),
    ],
)
def test_prompts_of_another_form_are_refused(
    tiny_vlm: smolstack.VLM, inputs: Any, words: str
) -> None:
    with pytest.raises(PromptError, match=words):
        tiny_vlm.processor(inputs)


def test_a_prompt_longer_than_the_context_is_refused(tiny_vlm: smolstack.VLM) -> None:
    with pytest.raises(ContextLengthError, match=r"the prompt has \d+ tokens .* 512"):
        tiny_vlm.processor(["why? " * 600])


def test_a_plan_counts_the_tokens_of_the_whole_prompt(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    plan = tiny_vlm.plan(images[0], "What does it say?")
    batch = tiny_vlm.processor([(images[0], "What does it say?")])
    assert plan.prompt_tokens == batch.token_ids.shape[1]
    assert plan.visual_tokens == 36
    assert plan == tiny_vlm.plan((100, 40), "What does it say?")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"size": None}, "size is None, expected"),
        ({"size": {"height": 3, "width": 4}}, "size is"),
        ({"max_image_size": {"longest_edge": "big"}}, "max_image_size is"),
        ({"resample": 9}, "resample is 9"),
        ({"image_mean": [0.5]}, "image_mean is"),
    ],
)
def test_preprocessing_that_cannot_be_followed_is_refused(
    change: Mapping[str, Any], words: str
) -> None:
    good = ImageSettings(64, 32).to_hf()
    assert ImageSettings.from_hf(good) == ImageSettings(64, 32)
    with pytest.raises(ConfigError, match=words):
        ImageSettings.from_hf({**good, **change})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("data:image/png;base64," + "A" * 5000, "found a data URL of 5,022 characters, expected"),
        ("DATA:,x", "found a data URL of 7 characters"),
        ("iVBOR" * 1000, r"a text of 5,000 characters ('iVBORiVB"),
        ("a/" + "b" * 300 + ".png", "is too long for a file name"),
        ("HTTPS://example.org/a.png", "is a URL; images are read from files"),
    ],
    ids=lambda value: value[:20],
)
def test_what_is_no_file_s_name_is_not_repeated(given: str, said: str) -> None:
    with pytest.raises(ImageError) as caught:
        open_image(given)
    assert said in str(caught.value)
    assert len(str(caught.value)) < 300
