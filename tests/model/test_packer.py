"""Visual tokens land where the prompt says, in every row, or nothing is written."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smolstack.errors import AlignmentError
from smolstack.model.packer import locate, splice

IMAGE = 9


def test_every_row_is_filled_in_order() -> None:
    # Two tiles of two tokens in row 0, none in row 1, one tile in row 2.
    token_ids = torch.tensor([[1, 9, 9, 2, 9, 9, 3], [1, 2, 3, 4, 5, 6, 7], [0, 0, 1, 9, 9, 2, 3]])
    positions = locate(token_ids, IMAGE, [2, 0, 1], tokens_per_tile=2)
    embeddings = torch.zeros(3, 7, 1)
    visual = torch.arange(1.0, 7.0).view(3, 2, 1)
    merged = splice(embeddings, positions, visual)
    assert merged.squeeze(-1).tolist() == [
        [0, 1, 2, 0, 3, 4, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 5, 6, 0, 0],
    ]
    assert embeddings.sum() == 0, "the input must stay as it is"


def test_a_batch_without_images_needs_no_places() -> None:
    assert locate(torch.tensor([[1, 2], [3, 4]]), IMAGE, [0, 0], 4).numel() == 0


@pytest.mark.parametrize(
    ("row", "tiles", "words"),
    [
        ([1, 9, 9, 2, 9, 9], [1], r"sequence 0 has 4 image tokens, expected 2 \(1 tiles of 2"),
        ([1, 9, 9, 2, 3, 4], [2], "sequence 0 has 2 image tokens, expected 4"),
        ([1, 9, 2, 9, 3, 4], [1], "sequence 0 has a run of 1 image tokens at position 1"),
        ([1, 9, 9, 2, 3, 4], [1, 1], "tile counts for 2 of 1 sequences"),
    ],
)
def test_counts_that_differ_are_refused_naming_the_sequence(
    row: list[int], tiles: list[int], words: str
) -> None:
    with pytest.raises(AlignmentError, match=words):
        locate(torch.tensor([row]), IMAGE, tiles, tokens_per_tile=2)


def test_the_row_at_fault_is_named_even_when_the_total_is_right() -> None:
    token_ids = torch.tensor([[9, 9, 1], [9, 9, 1]])
    with pytest.raises(AlignmentError, match="sequence 0 has 2 image tokens, expected 4"):
        locate(token_ids, IMAGE, [2, 0], tokens_per_tile=2)


def test_visual_tokens_of_another_width_are_refused() -> None:
    positions = locate(torch.tensor([[9, 9]]), IMAGE, [1], 2)
    with pytest.raises(AlignmentError, match="visual tokens are 3 wide, text embeddings 4"):
        splice(torch.zeros(1, 2, 4), positions, torch.zeros(1, 2, 3))
    with pytest.raises(AlignmentError, match="4 visual tokens for 2 "):
        splice(torch.zeros(1, 2, 4), positions, torch.zeros(2, 2, 4))


@given(st.data())
def test_text_stays_and_images_keep_their_order(data: st.DataObject) -> None:
    per_tile = data.draw(st.integers(1, 3))
    tiles = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    rows = []
    for count in tiles:
        row = [1]
        for _ in range(count):
            row += [IMAGE] * per_tile + [data.draw(st.integers(2, 8))]
        rows.append(row)
    longest = max(len(row) for row in rows)
    token_ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    visual = torch.arange(sum(tiles) * per_tile, dtype=torch.float).view(-1, per_tile, 1) + 100
    merged = splice(token_ids[..., None].float(), locate(token_ids, IMAGE, tiles, per_tile), visual)
    is_place = token_ids == IMAGE
    assert merged.squeeze(-1)[is_place].tolist() == visual.flatten().tolist()
    assert torch.equal(merged.squeeze(-1)[~is_place], token_ids[~is_place].float())
