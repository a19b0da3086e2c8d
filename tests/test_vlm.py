"""The public API, as a user meets it."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image

import smolstack
from smolstack.errors import (
    AlignmentError,
    ContextLengthError,
    GenerationError,
    ImageError,
    PromptError,
)
from smolstack.generation.options import AnswerOptions
from smolstack.generation.stopping import RepetitionRule


@pytest.fixture
def image(images: list[Image.Image]) -> Image.Image:
    return images[0]


def test_an_answer_says_what_it_used_and_why_it_ended(
    tiny_vlm: smolstack.VLM, image: Image.Image
) -> None:
    answer = tiny_vlm.ask(image, "What does it say?", max_new_tokens=5)
    assert answer.finish_reason == "length"
    assert len(answer.token_ids) == answer.usage.completion_tokens == 5
    assert answer.usage.tiles == 9
    assert answer.usage.visual_tokens == 36
    assert answer.usage.prompt_tokens == tiny_vlm.plan(image, "What does it say?").prompt_tokens
    assert answer.timings.total > 0
    assert answer.to_dict()["usage"]["tiles"] == 9


def test_every_form_of_an_image_gives_the_same_answer(
    tiny_vlm: smolstack.VLM, image: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "image.png"
    image.save(path)
    forms: list[Any] = [
        image,
        path,
        str(path),
        path.read_bytes(),
        np.asarray(image),
        tiny_vlm.encode(image),
        [image],
    ]
    answers = {tiny_vlm.ask(form, "What?", max_new_tokens=6).token_ids for form in forms}
    assert len(answers) == 1


def test_a_token_budget_holds_for_plan_encode_and_ask(
    tiny_vlm: smolstack.VLM, image: Image.Image
) -> None:
    plan = tiny_vlm.plan(image, max_image_tokens=12)
    assert (plan.rows, plan.cols, plan.visual_tokens) == (1, 2, 12)
    assert len(tiny_vlm.encode(image, max_image_tokens=12)) == 12
    answer = tiny_vlm.ask(image, "What?", max_image_tokens=12, max_new_tokens=2)
    assert answer.usage.visual_tokens == 12
    small = image.resize((30, 20))
    assert tiny_vlm.ask(small, "What?", upscale=False, max_new_tokens=2).usage.tiles == 1


def test_equal_tiles_are_encoded_once_and_answers_stay(
    tiny_vlm: smolstack.VLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = Image.new("RGB", (128, 128), "white")
    page.paste((0, 0, 0), (40, 40, 50, 50))  # ink on one tile (and, smaller, on the whole)
    seen = []
    forward = type(tiny_vlm.model.vision).forward

    def counting(tower: Any, tiles: torch.Tensor, filled: Any = None) -> torch.Tensor:
        seen.append(tiles.shape[0])
        return forward(tower, tiles, filled)

    tiles = tiny_vlm.processor([(page, "?")]).tiles
    one_by_one = torch.cat([tiny_vlm.model.encode_tiles(tile[None]) for tile in tiles])
    monkeypatch.setattr(type(tiny_vlm.model.vision), "forward", counting)
    visual = tiny_vlm.encode(page).tokens
    assert tiles.shape[0] == 17
    assert sum(seen) == 3
    torch.testing.assert_close(visual, one_by_one, atol=1e-5, rtol=1e-5)


def test_pieces_of_a_stream_add_up_to_the_answer(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    stream = tiny_vlm.stream(images[:2], "Compare them.", max_new_tokens=12)
    with pytest.raises(GenerationError, match="not complete yet"):
        _ = stream.answer
    text = "".join(stream)
    assert text.strip() == stream.answer.text
    assert stream.answer.token_ids == (
        tiny_vlm.ask(images[:2], "Compare them.", max_new_tokens=12).token_ids
    )


def test_an_answer_does_not_depend_on_its_neighbours(
    tiny_vlm: smolstack.VLM, images: list[Image.Image]
) -> None:
    prompts: list[Any] = [
        (images[0], "What does it say?"),
        "Hello",
        (images[1:], "Compare."),
        (tiny_vlm.encode(images[2]), "A rather longer question about this image, please?"),
    ]
    choices: list[AnswerOptions] = [
        {"max_new_tokens": 10},
        {"max_new_tokens": 10, "temperature": 1.5, "seed": 11, "top_k": 40},
        {"max_new_tokens": 10, "repetition_penalty": 1.3},
    ]
    for options in choices:
        together = tiny_vlm.ask_many(prompts, **options)
        alone = [tiny_vlm.ask_many([prompt], **options)[0] for prompt in prompts]
        assert [a.token_ids for a in together] == [a.token_ids for a in alone]
        assert [a.text for a in together] == [a.text for a in alone]


def test_finished_answers_leave_the_batch_and_the_others_go_on(
    tiny_vlm: smolstack.VLM, images: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts: list[Any] = [(p, "What?") for p in images]
    full = [answer.token_ids for answer in tiny_vlm.ask_many(prompts, max_new_tokens=9)]
    ending = full[0][3]
    monkeypatch.setattr(tiny_vlm, "eos_token_ids", (ending,))
    cut = tiny_vlm.ask_many(prompts, max_new_tokens=9)
    for answer, whole in zip(cut, full, strict=True):
        expected = whole[: whole.index(ending) + 1] if ending in whole else whole
        assert answer.token_ids == expected
        assert answer.finish_reason == ("stop" if ending in whole else "length")


def test_a_stop_string_ends_the_answer_before_it(
    tiny_vlm: smolstack.VLM, image: Image.Image
) -> None:
    whole = tiny_vlm.ask(image, "What?", max_new_tokens=12).text
    stop = whole[6:9]
    answer = tiny_vlm.ask(image, "What?", max_new_tokens=12, stop=stop)
    assert answer.finish_reason == "stop"
    assert answer.text == whole[: whole.index(stop)].strip()


def test_special_tokens_are_left_out_unless_asked_for(
    tiny_vlm: smolstack.VLM, image: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A document model answers in special tokens; let one that this model writes be special.
    plain = tiny_vlm.ask(image, "What?", max_new_tokens=4)
    written = map(tiny_vlm.processor.tokenizer.token, plain.token_ids)
    tag = next(token for token in written if token and token.startswith("<|unused"))
    backend = tokenizers.Tokenizer.from_str(tiny_vlm.processor.tokenizer.backend.to_str())
    backend.add_special_tokens([tag])
    monkeypatch.setattr(tiny_vlm.processor.tokenizer, "backend", backend)
    without = tiny_vlm.ask(image, "What?", max_new_tokens=4)
    kept = tiny_vlm.ask(image, "What?", max_new_tokens=4, keep_special_tokens=True)
    assert without.token_ids == kept.token_ids == plain.token_ids
    assert tag in kept.text
    assert tag not in without.text


def test_circles_end_only_when_asked(tiny_vlm: smolstack.VLM, image: Image.Image) -> None:
    # Greedy answers of a random model end in circles of their own accord.
    rule = RepetitionRule(longest=40, times=2, tokens=4)
    plain = tiny_vlm.ask(image, "What?", max_new_tokens=200)
    stopped = tiny_vlm.ask(image, "What?", max_new_tokens=200, stop_on_repetition=rule)
    assert plain.finish_reason == "length"
    assert stopped.finish_reason == "repetition"
    assert plain.token_ids[: len(stopped.token_ids)] == stopped.token_ids
    assert stopped.text, "what was read is kept"


def test_a_whole_chat_is_answered(tiny_vlm: smolstack.VLM, images: list[Image.Image]) -> None:
    first = tiny_vlm.ask(images[0], "What?", max_new_tokens=4)
    chat = [
        {
            "role": "user",
            "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": "What?"}],
        },
    ]
    assert tiny_vlm.ask(messages=chat, max_new_tokens=4).token_ids == first.token_ids
    bare = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    beside = tiny_vlm.ask(images[0], messages=bare, max_new_tokens=4)
    assert beside.token_ids == first.token_ids, "images may be given beside the chat"
    chat += [
        {"role": "assistant", "content": "An image."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "And?"},
                {"type": "image", "image": tiny_vlm.encode(images[1])},
            ],
        },
    ]
    answer = tiny_vlm.ask(messages=chat, max_new_tokens=4)
    assert answer.usage.tiles == 9 + 17


def test_an_image_token_that_the_model_writes_is_an_ordinary_token(
    tiny_vlm: smolstack.VLM, image: Image.Image
) -> None:
    batch = tiny_vlm.processor([(image, "What?")])
    with torch.inference_mode():
        cache = tiny_vlm.model.new_cache(batch, batch.token_ids.shape[1] + 1)
        tiny_vlm.model.prefill(batch, cache)
        token = torch.tensor([tiny_vlm.config.image_token_id])
        logits = tiny_vlm.model.decode_one_token(token, cache)
    assert torch.isfinite(logits).all()


def test_logits_have_one_row_per_token(tiny_vlm: smolstack.VLM, image: Image.Image) -> None:
    batch = tiny_vlm.processor([(image, "What?"), "Hi"])
    assert tiny_vlm.model(batch).shape == (*batch.token_ids.shape, 904)


def test_an_answer_is_cut_where_the_context_ends(tiny_vlm: smolstack.VLM) -> None:
    prompt = "why? " * 248
    used = tiny_vlm.processor([prompt]).token_ids.shape[1]
    assert 490 < used < 512
    answer = tiny_vlm.ask(None, prompt, max_new_tokens=100)
    assert answer.finish_reason == "length"
    assert used + len(answer.token_ids) == 512
    with pytest.raises(ContextLengthError, match="context"):
        tiny_vlm.ask(None, "why? " * 600)


def test_a_batch_whose_counts_disagree_is_refused(
    tiny_vlm: smolstack.VLM, image: Image.Image
) -> None:
    from dataclasses import replace

    batch = tiny_vlm.processor([(image, "What?")])
    with pytest.raises(AlignmentError, match="counts 8 tiles, the batch holds 9"):
        tiny_vlm.model(replace(batch, tiles_per_image=(8,)))
    with pytest.raises(AlignmentError, match="counts 2 images, the batch holds 1"):
        tiny_vlm.model(replace(batch, images_per_sequence=(2,)))
    fewer = replace(batch, tiles=batch.tiles[:8], tiles_per_image=(8,))
    with pytest.raises(AlignmentError, match="sequence 0 has 36 image tokens, expected 32"):
        tiny_vlm.model(fewer)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        ({"images": "gone.png", "text": "?"}, ImageError, "found no file"),
        ({"images": 3, "text": "?"}, ImageError, "found a int"),
        ({"images": None}, PromptError, "neither text nor messages"),
        ({"images": "What?"}, PromptError, r"ask\(None, text\)"),
        ({"text": "?", "messages": []}, PromptError, "found text and messages"),
        ({"messages": []}, PromptError, "no messages"),
        ({"text": "<image>"}, PromptError, "1 <image> placeholders for 0 images"),
        ({"text": "?", "temprature": 1}, GenerationError, r"unknown options \['temprature'\]"),
        ({"text": "?", "top_p": 7}, GenerationError, "top_p is 7"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(
    tiny_vlm: smolstack.VLM, call: dict[str, Any], error: type[ValueError], words: str
) -> None:
    for method in (tiny_vlm.ask, tiny_vlm.stream):
        with pytest.raises(error, match=words) as caught:
            method(**call)
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, ValueError)


def test_half_precision_gives_finite_answers(tiny_folder: Path, image: Image.Image) -> None:
    for dtype in ("bfloat16", "float16"):
        vlm = smolstack.load(tiny_folder, dtype=dtype)
        assert len(vlm.ask(image, "What?", max_new_tokens=3).token_ids) == 3


def test_an_image_may_come_from_memory(tiny_vlm: smolstack.VLM, image: Image.Image) -> None:
    buffer = BytesIO()
    image.save(buffer, "WEBP", lossless=True)
    assert tiny_vlm.encode(buffer.getvalue()).source == image.size
