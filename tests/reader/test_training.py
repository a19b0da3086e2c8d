"""Drawing, labelling and training: seeded, split cleanly, resumable; labels lie where text is.

Everything is drawn in the font that comes with Pillow, so no font package is needed.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont
from torch import Tensor
from training.reader import fonts, shape
from training.reader.batches import (
    ReaderBatch,
    Room,
    labelled,
    make_batch,
    normalized,
    prompt_ids,
    wanted,
)
from training.reader.drawn import DrawnBatches
from training.reader.files import build_tokenizer
from training.reader.images import draw_crowd, draw_image
from training.reader.labels import (
    BACKGROUND,
    CLASS_OF,
    CLASSES,
    FINAL,
    FIRST,
    GAP,
    LAST,
    OFF,
    WHERE,
)
from training.reader.layout import lay_out
from training.reader.lines import Corners, open_font, set_line
from training.reader.losses import (
    EDGE_SCALE,
    TURN,
    answer_logits,
    answering_loss,
    naming_loss,
    random_states,
)
from training.reader.muon import orthogonal
from training.reader.paths import PATH_COLOR, draw_path
from training.reader.places import (
    NEXT,
    PLACE,
    PLACE_STRENGTH,
    constant_direction,
    directions,
    places,
)
from training.reader.plan import Plan
from training.reader.pointing import (
    Cell,
    Question,
    cell_id,
    cell_of,
    plain_answer,
    pointing_answer,
)
from training.reader.scores import Result, figures, tidy
from training.reader.start import fresh_model
from training.reader.start_decoder import BACK, EVEN, READERS, RESERVED, SPREAD
from training.reader.targets import Box, Spot, View, spots_of
from training.reader.text import draw_line, is_held_out, words
from training.reader.train import ROOM, Trainer

from smolstack.model.decoder import TextAttention, TextLayer, rotate
from smolstack.model.layers import split_heads


@pytest.fixture(autouse=True)
def only_pillows_font(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Both splits have one family, Pillow's own."""
    font = ImageFont.load_default(20)
    assert isinstance(font, ImageFont.FreeTypeFont)
    assert isinstance(font.path, BytesIO)
    path = tmp_path_factory.getbasetemp() / "own.ttf"
    path.write_bytes(font.path.getvalue())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fonts, "families", lambda split: {"Pillow's own": [str(path)]})
        yield


def test_the_same_seed_draws_the_same_image() -> None:
    first, second = draw_image(7), draw_image(7)
    assert first.lines == second.lines
    assert first.image.tobytes() == second.image.tobytes()
    assert draw_image(8).image.tobytes() != first.image.tobytes()


def test_an_image_says_what_its_layout_says() -> None:
    for seed in range(10):
        layout, _ = lay_out(seed)
        image = draw_image(seed)
        assert image.lines == tuple(line.text for line in layout.lines)
        assert image.corners == layout.corners


def test_lines_grow_from_one_short_one_to_four_of_24_characters() -> None:
    easy = [draw_image(seed, level=0.0).lines for seed in range(40)]
    hard = [lay_out(seed)[0].lines for seed in range(200)]
    assert max(map(len, easy)) == 1
    assert max(len(line) for lines in easy for line in lines) <= 8
    assert max(map(len, hard)) == shape.MAX_LINES
    assert max(len(line.text) for lines in hard for line in lines) > 16
    assert any(not lines for lines in hard)


def test_splits_share_no_family_no_word_and_no_other_string() -> None:
    assert not set(fonts.TRAIN) & set(fonts.HELD_OUT)
    trained, kept = words("train"), words("held-out")
    assert not set(trained[0] + trained[1]) & set(kept[0] + kept[1])
    rng = random.Random(0)
    for split in ("train", "held-out"):
        for _ in range(100):
            line = draw_line(rng, split, 6)
            if line.isdigit() and len(line) > 1:
                assert is_held_out(line) == (split == "held-out")


def test_lines_hold_known_characters_and_no_idle_spaces() -> None:
    rng = random.Random(1)
    for _ in range(300):
        line = draw_line(rng, "train", 24)
        assert 1 <= len(line) <= 24
        assert line == " ".join(line.split())
        assert set(line) <= {*shape.CHARACTERS, " "}
        assert line not in {"c", "C", "O", "o", "l", "I", ".", "-"}


def test_labels_name_the_characters_that_an_image_shows() -> None:
    checked = 0
    for seed in range(60):
        image = draw_image(seed)
        if image.width < 2 * shape.PATCH:
            continue
        _, classes, *_ = labelled(image)
        shown = set(classes[:-1].flatten().tolist()) - {BACKGROUND}
        assert shown <= {CLASS_OF[character] for character in image.characters}
        letters = {CLASS_OF[c] for c in image.characters if c.isalnum() and c not in "Iijl1"}
        assert letters <= shown
        checked += 1
    assert checked > 10


def test_places_run_from_left_to_right_and_from_top_to_bottom_of_a_character() -> None:
    layouts = ((seed, lay_out(seed)[0]) for seed in range(400))
    seed = next(
        seed
        for seed, one in layouts
        if len(one.characters) == 1 and not one.angle and one.characters in "HMNOQWX0"
    )
    _, classes, places, _ = labelled(draw_image(seed))
    rows, cols = shape.GRID, shape.GRID
    tile = int((classes[:-1] > BACKGROUND).sum(dim=1).argmax())
    grid, where = classes[tile].view(rows, cols), places[tile].view(rows, cols, WHERE)
    row = int((grid > BACKGROUND).sum(dim=1).argmax())
    col = int((grid > BACKGROUND).sum(dim=0).argmax())
    across = where[row, :, 0][grid[row] > BACKGROUND]
    down = where[:, col, 1][grid[:, col] > BACKGROUND]
    for run in (across, down):
        assert len(run) > 1
        assert torch.equal(run, run.sort(descending=True).values)


def test_the_first_and_the_last_character_of_each_line_are_marked() -> None:
    layouts = ((seed, lay_out(seed)[0]) for seed in range(400))
    seed, layout = next(
        (seed, one)
        for seed, one in layouts
        if len(one.lines) == 3 and min(one.lengths) > 2 and not one.angle
    )
    _, classes, places, _ = labelled(draw_image(seed))
    for which, at in ((FIRST, 0), (LAST, -1)):
        marked = places[..., which] > 0
        assert bool((classes[marked] != BACKGROUND).all())
        ends = {CLASS_OF[line.characters[at]] for line in layout.lines}
        assert set(classes[:-1][marked[:-1]].tolist()) == ends


def test_the_last_character_of_all_and_those_before_a_space_are_marked() -> None:
    layouts = ((seed, lay_out(seed)[0]) for seed in range(400))
    seed, layout = next(
        (seed, one) for seed, one in layouts if len(one.lines) == 2 and sum(one.gaps) == 2
    )
    _, classes, places, _ = labelled(draw_image(seed))
    final = places[..., FINAL] > 0
    assert set(classes[:-1][final[:-1]].tolist()) == {CLASS_OF[layout.characters[-1]]}
    spaced = places[:-1][..., GAP] > 0
    before = [one for one, gap in zip(layout.characters, layout.gaps, strict=True) if gap]
    assert set(classes[:-1][spaced].tolist()) == {CLASS_OF[one] for one in before}


def test_each_patch_says_which_cells_show_the_lines_next_character() -> None:
    """On every tile of a line of unlike characters: there, or OFF in the tile on its right."""
    layouts = ((seed, lay_out(seed)[0]) for seed in range(4000))
    seed, layout = next(
        (seed, one)
        for seed, one in layouts
        if len(one.lines) == 1 and len(set(one.characters)) == len(one.characters) > 8
    )
    follows = dict(itertools.pairwise(layout.characters))
    _, classes, places, following = labelled(draw_image(seed))
    side = shape.GRID
    checked = off = 0
    for tile, patch in (classes[:-1] > BACKGROUND).nonzero().tolist():
        character = shape.CHARACTERS[int(classes[tile, patch]) - 1]
        first_row, last_row, first, last = following[tile, patch].tolist()
        if character not in follows or first < 0:
            continue
        shown_on = tile + int(places[tile, patch, OFF])
        off += shown_on - tile
        rows = slice(first_row * shape.SCALE, (last_row + 1) * shape.SCALE)
        shown = classes[shown_on].view(side, side)[rows, first : last + 1]
        assert CLASS_OF[follows[character]] in shown
        checked += 1
    assert checked > 20
    assert off > 0


def test_characters_start_where_the_line_before_them_ends() -> None:
    path = next(iter(fonts.families("train").values()))[0]
    for em in (11, 40):
        line = set_line("AVATAR To. Wave 11,5", path, em)
        font = open_font(path, em)
        lengths = [font.getlength(line.text[:index]) for index in range(len(line.text))]
        assert line.starts == pytest.approx(lengths)


def test_crowds_fill_their_tiles() -> None:
    shares = [float((labelled(draw_crowd(seed))[1][:-1] > 0).float().mean()) for seed in range(6)]
    assert float(np.mean(shares)) > 0.3


def test_what_is_left_of_a_batch_is_full_of_text() -> None:
    batch = DrawnBatches(2, 8, 4, tiles=40)[0]
    assert len(batch.tiles) == len(batch.patch_labels) == 40
    crowded = batch.patch_labels[batch.asked_tiles :]
    assert len(crowded) > 10
    assert float((crowded != BACKGROUND).float().mean()) > 0.3


def one_group(size: int = 8, seed: int = 0, *, full: float = 0.0) -> ReaderBatch:
    """Images with a question, whose answers point."""
    drawn = DrawnBatches(1, size, 1, full=full)
    groups = (drawn._group(10_000 * number, 1.0) for number in itertools.count(seed))
    group = next(one for one in groups if one.points)
    return make_batch([group], [labelled(image) for image in group.images])


def test_questions_ask_for_everything_for_the_count_or_for_one_line() -> None:
    lines = ("Total: 12.50", "Cash", "Thank you!")
    assert Question("What does it say?").answer(lines) == "Total: 12.50\nCash\nThank you!"
    assert Question("How many lines?", -1).answer(lines) == "3"
    assert Question("Read line 2.", 2).answer(lines) == "Cash"
    assert Question("Read line 4.", 4).answer(lines) == "nothing"
    assert Question("What does it say?").answer(()) == "nothing"
    assert Question("How many lines?", -1).answer(()) == "0"


def spot(row: int, *cols: int) -> Spot:
    """A character that cells of one row of the tiles show, the first its middle."""
    box = Box(range(row, row + 1), range(min(cols), max(cols) + 1), (row, cols[0]))
    return Spot({View.TILES: box}, View.TILES)


def test_an_answer_points_at_the_cell_of_each_character_before_it_reads_it() -> None:
    spots = [[spot(0, 0), spot(0, 2), spot(0, 2)], [spot(3, 1)]]
    points = [cell_id(Cell(*cell)) for cell in ((0, 0), (0, 2), (3, 1))]
    end = shape.IDS[shape.END]
    start = (*b" ", shape.IDS[shape.POINT])
    lines = ("a bc", "d")
    right = shape.IDS[shape.RIGHT]
    first = [points[0], *b"a ", points[1], *b"b", right, *b"c"]
    everything = pointing_answer(Question("What does it say?"), lines, spots).ids
    assert everything == (*start, *first, *b"\n", points[2], *b"d", end)
    assert pointing_answer(Question("", 1), lines, spots).ids == (*start, *first, end)
    second = pointing_answer(Question("Read line 2.", 2), lines, spots).ids
    assert second == (*start, points[0], points[2], *b"d", end)
    third = pointing_answer(Question("Read line 3.", 3), lines, spots).ids
    assert third == (*start, points[0], points[2], *b"nothing", end)
    count = pointing_answer(Question("How many lines?", -1), lines, spots).ids
    assert count == (*start, points[0], points[2], *b"2", end)
    assert pointing_answer(Question(""), (), []).ids == (*start, *b"nothing", end)


def test_every_cell_that_shows_a_character_is_right_and_the_one_named_is_one_of_them() -> None:
    lines, spots = ("ab",), [[spot(0, 1, 2), spot(0, 2, 3)]]
    right, (one, two, three) = shape.IDS[shape.RIGHT], (cell_id(Cell(0, col)) for col in (1, 2, 3))
    seen = set()
    for seed in range(200):
        answer = pointing_answer(Question(""), lines, spots, random.Random(seed))
        named = answer.ids[2], answer.ids[4]
        assert set(answer.goals[2]) == {one, two}
        assert set(answer.goals[4]) == ({three, right} if named[0] == two else {two, three})
        assert [len(answer.goals[at]) for at in (0, 1, 3, 5)] == [1] * 4
        seen.add(named)
    assert seen == {(one, two), (one, three), (two, right), (two, three)}


def test_the_loss_does_not_care_which_of_the_right_cells_is_pointed_at() -> None:
    batch = one_group(seed=3, full=1.0)
    chosen = batch.goals.amax(dim=-1) >= shape.FIRST_CELL
    assert int((batch.goals[chosen] >= 0).sum(dim=1).max()) > 1
    found = []
    for which in (0, -1):
        last = (batch.goals >= 0).sum(dim=1, keepdim=True) - 1
        said = batch.goals.gather(1, last if which else torch.zeros_like(last))
        logits = torch.zeros(len(said), shape.VOCABULARY).scatter(1, said, 20.0)
        loss, right = answering_loss(logits, batch)
        assert right == {"answers": 1.0, "characters": 1.0, "cells": 1.0}
        found.append(float(loss))
    assert found == pytest.approx([0.0, 0.0], abs=1e-4)


def test_where_no_answer_points_no_share_of_cells_is_told() -> None:
    drawn = DrawnBatches(1, 4, 1)
    groups = (drawn._group(10_000 * number, 1.0) for number in itertools.count())
    group = next(one for one in groups if not one.points)
    batch = make_batch([group], [labelled(image) for image in group.images])
    logits = torch.zeros(len(batch.at), shape.VOCABULARY).scatter(1, batch.goals[:, :1], 20.0)
    loss, right = answering_loss(logits, batch)
    assert loss.item() == pytest.approx(0.0, abs=1e-4)
    assert right["cells"].isnan()
    assert float(right["characters"]) == float(right["answers"]) == 1.0


def test_where_lines_begin_and_end_counts_more_than_what_they_say() -> None:
    """The more a kind of token counts, the more the loss grows where it alone is wrong."""
    newline, point = ord("\n"), shape.IDS[shape.POINT]
    batches = (one_group(seed=seed, full=1.0) for seed in itertools.count())
    batch = next(one for one in batches if newline in one.goals[:, 0])
    first = batch.goals[:, 0]
    right = torch.zeros(len(first), shape.VOCABULARY).scatter(1, batch.goals[:, :1], 20.0)
    before = batch.token_ids.flatten()[batch.at]

    def spoilt(which: Tensor) -> float:
        logits = right.clone()
        logits[int(which.nonzero()[0])] = 0.0
        return answering_loss(logits, batch)[0].item()

    begins, breaks = spoilt(before == point), spoilt(first == newline)
    ends = spoilt(first == shape.IDS[shape.END])
    spells = spoilt((first < 256) & (first > 32) & (before >= shape.FIRST_CELL))
    assert ends == pytest.approx(breaks, rel=1e-3)
    assert ends == pytest.approx(TURN * spells, rel=0.1)
    assert begins > 2 * spells


def test_a_tower_that_forgets_where_its_patches_stand_is_told_so() -> None:
    batch = one_group(12, full=1.0)
    known = directions(shape.CONFIG.vision.hidden_size - PLACE)
    own = PLACE_STRENGTH * places(shape.GRID)
    states = random_states(batch, known, own, torch.Generator().manual_seed(0))
    forgetful = states.clone()
    forgetful[..., -PLACE:] = 0
    kept, shares = naming_loss(states, batch, known)
    lost, same = naming_loss(forgetful, batch, known)
    assert shares == same
    assert lost.item() > kept.item() + 0.1


def test_a_wrong_name_in_the_middle_of_a_character_where_it_is_read_costs_most() -> None:
    batch = one_group(12)
    known = directions(shape.CONFIG.vision.hidden_size - PLACE)
    states = torch.zeros(*batch.patch_labels.shape, shape.CONFIG.vision.hidden_size)
    said = known[batch.patch_labels.clamp(min=0)]
    states[..., : known.shape[1]] = 20 * said
    kept, _ = naming_loss(states, batch, known)
    off = batch.patch_places[..., :FIRST].abs().amax(dim=-1)  # 0 in the middle, 1 at an edge
    shown = batch.patch_labels > BACKGROUND

    def cost_of_missing(where: Tensor) -> float:
        wrong = states.clone()
        tile, patch = where.nonzero()[0].tolist()
        wrong[tile, patch] *= -1
        return naming_loss(wrong, batch, known)[0].item() - kept.item()

    middle = cost_of_missing(shown & (off < 0.3))
    edge = cost_of_missing(shown & (off > 0.9))
    background = cost_of_missing(batch.patch_labels == BACKGROUND)
    assert middle > 2 * edge > 2 * background > 0


def test_to_miss_that_lines_go_on_costs_as_much_as_to_miss_that_they_are_over() -> None:
    batch = one_group(12, full=1.0)
    known = directions(shape.CONFIG.vision.hidden_size - PLACE)
    says_final = known[CLASSES + FINAL]
    last, final = batch.patch_places[..., LAST] > 0, batch.patch_places[..., FINAL]
    states = random_states(batch, known, torch.zeros(shape.GRID**2, PLACE), torch.Generator())
    said = states[..., : known.shape[1]]
    said += (final * EDGE_SCALE - said @ says_final)[..., None] * says_final  # now it errs nowhere
    kept, _ = naming_loss(states, batch, known)

    def cost_of_missing(where: Tensor, change: float) -> float:
        wrong = states.clone()
        tile, patch = where.nonzero()[0].tolist()
        wrong[tile, patch, : known.shape[1]] += change * EDGE_SCALE * says_final
        return naming_loss(wrong, batch, known)[0].item() - kept.item()

    missed_end = cost_of_missing(last & (final > 0), -1.0)
    missed_line = cost_of_missing(last & (final == 0), 1.0)
    assert missed_end > 1e-4
    assert missed_line == pytest.approx(missed_end, rel=0.1)


def test_a_token_names_the_cell_that_it_was_made_for() -> None:
    cells = [Cell(0, 0), Cell(3, 17), Cell(shape.SIDE - 1, 2 * shape.SIDE - 1)]
    cells += [Cell(0, 0, View.WHOLE), Cell(shape.CELLS - 1, 15, View.WHOLE)]
    assert [cell_of(cell_id(cell)) for cell in cells] == cells
    assert cell_id(Cell(3, 17)) == shape.IDS["<cell_4_18>"]
    assert cell_id(Cell(3, 6, View.WHOLE)) == shape.IDS["<whole_4_7>"]
    others = [*b"4711 ", shape.IDS[shape.RIGHT], shape.IDS[shape.POINT], shape.IDS[shape.END]]
    assert [cell_of(token) for token in others] == [None] * len(others)


def test_a_path_is_drawn_over_the_cells_that_an_answer_names() -> None:
    image = Image.new("RGB", (shape.EDGE, shape.TILE), "white")
    path = draw_path(image, [*b" ", cell_id(Cell(1, 2)), *b"a", cell_id(Cell(1, 20)), *b"b"], "ab")
    red = [
        (x // 8, y // 16)
        for x in range(image.width)
        for y in range(image.height)
        if path.getpixel((x, y)) == PATH_COLOR
    ]
    assert set(red) == {(column, 1) for column in range(2, 21)}


def test_a_cell_of_the_whole_is_drawn_as_large_as_what_it_shows() -> None:
    image = Image.new("RGB", (shape.EDGE, shape.TILE), "white")
    path = draw_path(image, [cell_id(Cell(2, 2, View.WHOLE))], "a")  # one of 8 by 16
    box = [
        (x, y)
        for x in range(image.width)
        for y in range(image.height)
        if path.getpixel((x, y)) == PATH_COLOR
    ]
    assert (min(box), max(box)) == ((48, 32), (71, 47))


def test_a_reader_of_answers_does_not_see_where_they_point() -> None:
    tokenizer = build_tokenizer()
    for seed in range(20):
        image = draw_image(seed, full=0.5)
        ids = wanted(Question("What does it say?"), image).ids
        assert max(ids) >= shape.FIRST_CELL or not image.lines
        assert tokenizer.decode(list(ids)) == f" {image.text or shape.NOTHING}"


def box(left: float, top: float, right: float, bottom: float) -> Corners:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def test_a_small_character_is_shown_by_the_cell_of_its_middle() -> None:
    lines = [[box(2, 2, 10, 14), box(132, 2, 140, 14)], [box(4, 114, 10, 124)]]
    found = spots_of((384, 128), (1, 3), lines)
    assert [[one.boxes[View.TILES].middle for one in line] for line in found] == [
        [(0, 0), (0, 17)],
        [(7, 0)],
    ]
    assert all(set(one.boxes) == {View.TILES} for line in found for one in line)
    half = [[box(*(part / 2 for pair in (b[0], b[2]) for part in pair)) for b in lines[0]]]
    assert spots_of((192, 64), (1, 3), half)[0] == found[0]


def test_a_large_character_is_read_on_the_tile_of_the_whole_a_middling_one_on_either() -> None:
    (large,), (middling,) = (
        spots_of((384, 384), (3, 3), [[box(100, 100, 100 + width, 100 + 1.4 * width)]])[0]
        for width in (90, 40)
    )
    assert (set(large.boxes), large.best) == ({View.WHOLE}, View.WHOLE)
    assert large.boxes[View.WHOLE].middle == (3, 6)  # 145 / 24 across
    assert set(middling.boxes) == {View.TILES, View.WHOLE}
    assert middling.boxes[View.TILES].cols == range(14, 17)  # of 8 pixels, about 120


def test_a_line_is_pointed_at_in_its_middle_but_a_full_stop_where_it_stands() -> None:
    high, low, dot = box(0, 2, 10, 30), box(20, 14, 30, 46), box(40, 28, 44, 31)
    found = spots_of((384, 128), (1, 3), [[high, low, dot]])[0]
    rows = [one.boxes[View.TILES].rows for one in found]  # the line's middle is at 24 ± 8.8
    assert rows == [range(0, 2), range(0, 3), range(1, 2)]


def test_a_tilted_line_is_pointed_at_along_its_middle() -> None:
    corners = [box(30 * at, 5 * at, 30 * at + 20, 5 * at + 28) for at in range(12)]
    line = [((a, b), (c, b + 20 / 6), (c, d + 20 / 6), (a, d)) for (a, b), _, (c, d), _ in corners]
    found = spots_of((384, 128), (1, 3), [line])[0]
    middles = [one.boxes[View.TILES].middle[0] for one in found]
    assert middles == [int((5 * at + 14 + 10 / 6) / 16) for at in range(12)]


def test_muon_steps_along_an_orthogonal_matrix() -> None:
    for size in ((8, 24), (24, 8)):
        values = torch.linalg.svdvals(orthogonal(torch.randn(size)))
        assert float(values.min()) > 0.5
        assert float(values.max()) < 1.5


def test_batches_predict_the_answer_after_the_prompt() -> None:
    batch = DrawnBatches(3, 12, 4)[0]
    length = batch.token_ids.shape[1]
    assert batch.tiles.shape == (batch.asked_tiles, 3, shape.TILE, shape.TILE)
    assert bool((batch.token_ids.flatten()[batch.images] == shape.IDS[shape.IMAGE]).all())
    for row, tokens in enumerate(batch.token_ids):
        images = int((tokens == shape.IDS[shape.IMAGE]).sum()) // shape.TOKENS_PER_TILE
        assert images in {4, 7, 10}  # 1x3, 2x3 or 3x3 tiles, and the whole image
        of_row = batch.at // length == row
        at, goals = batch.at[of_row] % length, batch.goals[of_row]
        assert tokens[at[0]] == ord(":")  # of "Assistant:"
        assert bool((tokens[at + 1][:, None] == goals).any(dim=1).all())
        assert goals[-1, 0] == shape.IDS[shape.END]


def test_images_of_unlike_shapes_are_asked_together_as_each_would_be_alone() -> None:
    drawn = DrawnBatches(1, 8, 1)
    groups = [drawn._group(10_000 * number, 1.0) for number in range(3)]
    assert len({image.size for group in groups for image in group.images}) > 1
    model = fresh_model(0).eval()

    def logits(*together: int) -> Tensor:
        chosen = [groups[which] for which in together]
        images = [labelled(image) for group in chosen for image in group.images]
        batch = make_batch(chosen, images)
        with torch.no_grad():
            return answer_logits(model, model.vision(normalized(batch.tiles)), batch)

    alone = torch.cat([logits(which) for which in range(3)])
    assert torch.allclose(logits(0, 1, 2), alone, atol=1e-3)


def test_in_a_room_of_its_size_a_batch_says_the_same_and_what_does_not_fit_is_not_asked() -> None:
    drawn = DrawnBatches(1, 12, 1)
    groups = [drawn._group(10_000 * number, 1.0) for number in range(2)]
    images = [labelled(image) for group in groups for image in group.images]
    free, narrow = make_batch(groups, images), make_batch(groups[:1], images)
    chats = len(groups[0].images)
    model = fresh_model(0).eval()
    with torch.no_grad():
        states = model.vision(normalized(free.tiles))

    def loss(batch: ReaderBatch) -> float:
        with torch.no_grad():
            return answering_loss(answer_logits(model, states, batch), batch)[0].item()

    large = make_batch(groups, images, Room(20, 1000, 600, 40))
    small = make_batch(groups, images, Room(chats + 1, 1000, 600, 40))
    assert large.token_ids.shape == (20, 1000)
    assert large.goals.shape == (600, 40)
    assert loss(large) == pytest.approx(loss(free), rel=1e-4)
    assert loss(small) == pytest.approx(loss(narrow), rel=1e-4)
    assert loss(small) != pytest.approx(loss(free), rel=1e-4)


def test_a_byte_is_its_own_token() -> None:
    tokenizer = build_tokenizer()
    expected = [*" 4711é".encode(), shape.IDS[shape.END]]
    assert tokenizer.encode(" 4711é<end_of_utterance>").ids == expected
    assert plain_answer("4711é").ids == tuple(expected)
    assert tokenizer.decode(list(" 4711é".encode())) == " 4711é"
    assert tokenizer.get_vocab_size() == shape.VOCABULARY
    assert prompt_ids(shape.QUESTION, (1, 3))[0] == shape.IDS[shape.START]


def test_the_longest_chat_fits_into_the_context() -> None:
    longest = len(prompt_ids("How many lines of text are there?", (3, 3)))
    answer = 2 * shape.MAX_LINES * (shape.MAX_LENGTH + 1) + 1  # a cell before each character
    assert longest + answer <= shape.CONFIG.text.max_positions
    assert longest + answer + 3 <= ROOM.length  # a space, "<point>", and the end


def test_a_patchs_constant_is_no_characters_direction() -> None:
    width = shape.CONFIG.vision.hidden_size
    even = constant_direction(width)
    known = directions(width - PLACE)
    assert len(known) == CLASSES + WHERE + NEXT
    assert float(even.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float((known @ even[:-PLACE]).abs().max()) < 1e-5
    assert torch.allclose(known @ known.T, torch.eye(len(known)), atol=1e-5)


def test_made_up_states_say_what_the_tower_is_taught_to_say() -> None:
    """But for the share of them that is wrong on purpose."""
    batch = one_group(24, full=1.0)
    known = directions(shape.CONFIG.vision.hidden_size - PLACE)
    own = PLACE_STRENGTH * places(shape.GRID)
    states = random_states(batch, known, own, torch.Generator().manual_seed(0))
    _, shares = naming_loss(states, batch, known)
    assert shares["patches"] > 0.9
    assert shares["next"] > 0.85


def fresh_scores(layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """How much each head of a fresh decoder's layer looks at what, from (T, D): (heads, T, T)."""
    model = fresh_model(0)
    attention = [m for m in model.decoder.modules() if isinstance(m, TextAttention)][layer]
    tokens, count = tokens[None], len(tokens)
    cos, sin = model.decoder.angles(0, count, None, tokens)
    query = rotate(split_heads(attention.query(tokens), 4), cos, sin)
    key = rotate(split_heads(attention.key(tokens), 2), cos, sin).repeat_interleave(2, dim=1)
    scores = (query @ key.transpose(-1, -2))[0] / math.sqrt(query.shape[-1])
    hidden = torch.ones(count, count).triu(1) > 0
    return scores.masked_fill(hidden, -math.inf).softmax(dim=-1).detach()


def test_a_fresh_decoder_looks_back_by_a_few_tokens() -> None:
    tokens = torch.randn(100, shape.CONFIG.text.hidden_size)
    tokens[:, :RESERVED] = 0
    tokens[:, 0] = EVEN
    for head, back in zip(fresh_scores(0, tokens), BACK[0], strict=False):
        assert head.diagonal(-back).mean().item() > 0.25


def test_a_fresh_decoder_looks_at_the_last_marker_and_at_the_cell_pointed_at_last() -> None:
    tokens = fresh_model(0).decoder.embedding.weight.detach()
    marker, cell = shape.IDS["<row_1_col_2>"], cell_id(Cell(2, 9))
    tile = [shape.IDS[shape.IMAGE]] * shape.TOKENS_PER_TILE
    start = [shape.IDS[name] for name in (shape.START, "<row_1_col_1>")]
    chat = [*start, *tile, marker, *tile, cell_id(Cell(0, 0)), *b"a"]
    scores = fresh_scores(0, tokens[torch.tensor([*chat, cell, *b"b"])] / SPREAD)
    assert scores[2, -1, chat.index(marker)].item() > 0.9
    assert scores[3, -1, len(chat)].item() > 0.6


def test_a_fresh_decoder_looks_at_the_visual_token_of_the_cell_pointed_at() -> None:
    """After what random layers make of a prompt of three tiles.

    In its last layer one head does so for the left half of what a token shows, one for the right,
    to read it; in the one before, after a character, to go on to the next.
    """
    drawn = (one_group(4, seed) for seed in itertools.count())
    strips = (one for one in drawn if one.asked_tiles == 4 * len(one.token_ids))
    batch = next(strips)  # one row of three tiles, and the whole
    known = directions(shape.CONFIG.vision.hidden_size - PLACE)
    places_of = PLACE_STRENGTH * places(shape.GRID)
    states = random_states(batch, known, places_of, torch.Generator().manual_seed(0))
    model, chat = fresh_model(0), batch.token_ids.clone()
    cells = [(row, col) for row in range(shape.CELLS) for col in range(3 * shape.GRID)]
    spots = (chat[0] == shape.IDS[shape.IMAGE]).nonzero().flatten()
    visual = model.connector(states, (shape.GRID, shape.GRID)).view(len(chat), len(spots), -1)[:1]
    found, of_its_half, of_the_other, going_on = [], [], [], []
    with torch.no_grad():
        for row, col in cells[::7]:
            prompt = chat[:1, : batch.at[0] + 1]
            pointed = torch.tensor([[cell_id(Cell(row, col)), ord("a")]])
            ids = torch.cat([prompt, pointed], dim=1)
            stream = model.decoder.embedding(ids).index_copy(1, spots, visual)
            cos, sin = model.decoder.angles(0, ids.shape[1], None, stream)
            for layer in list(model.decoder.layers)[:2]:
                stream = layer(stream, cos, sin, None, None)
            third = model.decoder.layers[2]
            assert isinstance(third, TextLayer)
            scores = fresh_scores(2, third.attention_norm(stream)[0])
            tile, within = divmod(col, shape.GRID)
            spot = spots[tile * shape.TOKENS_PER_TILE + row * shape.CELLS + within // 2]
            found.append(scores[0, -2, spot].item())
            fourth = model.decoder.layers[3]
            assert isinstance(fourth, TextLayer)
            normed = fourth.attention_norm(third(stream, cos, sin, None, None))[0]
            of_heads = fresh_scores(3, normed)[:, -2, spot]
            its, other = READERS if col % 2 == 0 else READERS[::-1]
            going_on.append(scores[[its, its, other], [-1, -2, -1], spot].tolist())
            of_its_half.append(of_heads[its].item())
            of_the_other.append(of_heads[other].item())
    assert float(np.mean(found)) > 0.7
    assert float(np.mean(of_its_half)) > 0.7
    assert float(np.mean(of_the_other)) < 0.05
    after_character, after_cell, of_the_other_half = np.mean(going_on, axis=0)
    assert after_character > 0.7
    assert after_cell < 0.05
    assert of_the_other_half < 0.05


def test_two_processes_step_by_the_mean_of_their_gradients(tmp_path: Path) -> None:
    script = tmp_path / "mean.py"
    script.write_text(
        "import torch\n"
        "from training.reader import together\n"
        "rank, count = together.join()\n"
        "weights = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1, 3))]\n"
        "for weight in weights:\n"
        "    weight.grad = torch.full_like(weight, float(10 ** rank))\n"
        "together.average_gradients(weights)\n"
        "said = str([count, *(weight.grad.tolist() for weight in weights)])\n"
        "open(f'{__file__}.{rank}', 'w').write(said)\n"
        "together.leave()\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=240,
    )
    for rank in range(2):
        said = script.with_name(f"mean.py.{rank}").read_text()
        assert said == "[2, [5.5, 5.5], [[5.5, 5.5, 5.5]]]"


SMALL = Plan(steps=2, groups=1, size=4, tiles=6)


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    straight = Trainer(whole, SMALL, seed=3)
    straight.run(workers=0)
    first = Trainer(stopped, SMALL, seed=3)
    first.step_on(0)
    first.save()
    second = Trainer(stopped, SMALL, seed=3)
    second.resume()
    assert second.step == 1
    second.run(workers=0)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name
        assert torch.equal(straight.average[name], second.average[name]), name


def test_training_begins_from_a_checkpoint_that_was_exported(tmp_path: Path) -> None:
    trainer = Trainer(tmp_path, SMALL, seed=3)
    trainer.step_on(0)
    trainer.save()
    kept = tmp_path / "reader"
    export = [sys.executable, "-m", "training.reader.export", "--folder", str(tmp_path)]
    root = Path(__file__).parents[2]
    subprocess.run([*export, "--out", str(kept)], check=True, cwd=root)
    begun = Trainer(tmp_path / "new", SMALL, seed=4, begun=kept)
    for name, value in trainer.average.items():
        assert torch.equal(begun.model.state_dict()[name], value.half().float()), name


def test_the_decoder_first_learns_apart_from_the_tower_and_then_teaches_it(tmp_path: Path) -> None:
    batch = one_group(4)

    def moved_by_answers(apart: float) -> bool:
        trainer = Trainer(tmp_path, Plan(steps=10, apart=apart))
        losses, _ = trainer.losses(batch)
        losses["answering"].backward()  # type: ignore[no-untyped-call]
        return trainer.model.vision.patch_embedding.weight.grad is not None

    assert not moved_by_answers(apart=1.0)
    assert moved_by_answers(apart=0.0)


def test_scores_count_wrong_characters_over_all_characters() -> None:
    image = draw_image(0).image
    results = [
        Result(image, "What does it say?", truth="abcd", answer="abcd"),
        Result(image, "What does it say?", truth="efgh", answer="efg"),
    ]
    assert figures(results) == {"exact": 0.5, "cer": 0.125, "images": 2}
    assert tidy(" one  two \n\n three\n") == "one two\nthree"
