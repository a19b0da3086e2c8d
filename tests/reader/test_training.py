"""Drawing and labelling: seeded, split cleanly, and labels lie where the characters are."""

from __future__ import annotations

import numpy as np
import pytest
from training.reader import fonts, shape
from training.reader.batches import BACKGROUND, DrawnBatches, answer_ids, patch_labels, prompt_ids
from training.reader.files import build_tokenizer
from training.reader.pictures import draw_picture, is_held_out

pytestmark = pytest.mark.skipif(
    not fonts.families("train") or not fonts.families("held-out"),
    reason="the font packages of training/reader/fonts.py are not installed",
)


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = draw_picture(7), draw_picture(7)
    assert first.text == second.text
    assert first.image.tobytes() == second.image.tobytes()
    assert draw_picture(8).image.tobytes() != first.image.tobytes()


def test_splits_share_no_family_and_no_number() -> None:
    assert not set(fonts.TRAIN) & set(fonts.HELD_OUT)
    trained = [draw_picture(seed).text for seed in range(60)]
    kept = [draw_picture(seed, "held-out").text for seed in range(60)]
    assert not any(is_held_out(text) for text in trained)
    assert all(is_held_out(text) for text in kept if len(text) > 1)


def test_labels_name_the_characters_that_a_picture_shows() -> None:
    for seed in range(20):
        picture = draw_picture(seed, empty=0.0)
        if picture.digit_width < shape.PATCH:
            continue
        shown = set(np.unique(patch_labels(picture)[:-1])) - {BACKGROUND}
        assert shown == {1 + fonts.DIGITS.index(character) for character in picture.text}


def test_batches_predict_the_answer_after_the_prompt() -> None:
    batch = DrawnBatches(10, 1, crowd=2)[0]
    pictures, tiles = len(batch.texts), batch.picture_tiles
    assert tiles // pictures in (3, 5)  # two tiles or four, and the whole picture
    assert batch.tiles.shape == (tiles + 2, 3, shape.TILE, shape.TILE)
    assert batch.patch_labels.shape == (tiles + 2, shape.GRID**2)
    images = (batch.token_ids == shape.IDS[shape.IMAGE]).sum(dim=1)
    assert images.tolist() == [shape.TOKENS_PER_TILE * tiles // pictures] * pictures
    for row, text in enumerate(batch.texts):
        answer = answer_ids(text)
        assert batch.labels[row, : len(answer)].tolist() == list(answer)
        following = batch.token_ids[row, batch.start + 1 : batch.start + 1 + len(answer)]
        assert following.tolist() == list(answer)


def test_a_byte_is_its_own_token() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.encode(" 4711é<end_of_utterance>").ids == [
        *" 4711é".encode(),
        shape.IDS[shape.END],
    ]
    assert tokenizer.decode(list(" 4711é".encode())) == " 4711é"
    assert tokenizer.get_vocab_size() == shape.VOCABULARY
    assert prompt_ids(shape.QUESTION, (1, 2))[0] == shape.IDS[shape.START]
