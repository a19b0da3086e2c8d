"""Drawing, labelling and training: seeded, split cleanly, resumable; labels lie where text is.

Everything is drawn in the font that comes with Pillow, so no font package is needed.
"""

from __future__ import annotations

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
from training.reader import fonts, shape
from training.reader.batches import DrawnBatches, labelled, prompt_ids, wanted_ids
from training.reader.files import build_tokenizer
from training.reader.labels import BACKGROUND, CLASS_OF, CLASSES
from training.reader.layout import lay_out
from training.reader.lines import Corners
from training.reader.losses import random_states
from training.reader.paths import PATH_COLOR, draw_path
from training.reader.pictures import draw_crowd, draw_picture
from training.reader.places import PLACE, constant_direction, directions, places
from training.reader.pointing import Question, cell_id, cell_of, cells_of, plain_ids, pointing_ids
from training.reader.scores import Result, figures, tidy
from training.reader.stages import STAGES, Stage
from training.reader.start import PLACE_STRENGTH, fresh_model
from training.reader.start_decoder import BACK, EVEN, RESERVED, SPREAD
from training.reader.text import draw_line, is_held_out, words
from training.reader.train import Trainer

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


def test_the_same_seed_draws_the_same_picture() -> None:
    first, second = draw_picture(7), draw_picture(7)
    assert first.lines == second.lines
    assert first.image.tobytes() == second.image.tobytes()
    assert draw_picture(8).image.tobytes() != first.image.tobytes()


def test_a_picture_says_what_its_layout_says() -> None:
    for seed in range(10):
        layout, _ = lay_out(seed)
        picture = draw_picture(seed)
        assert picture.lines == tuple(line.text for line in layout.lines)
        assert picture.corners == layout.corners


def test_lines_grow_from_one_short_one_to_four_of_24_characters() -> None:
    easy = [draw_picture(seed, level=0.0).lines for seed in range(40)]
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


def test_labels_name_the_characters_that_a_picture_shows() -> None:
    checked = 0
    for seed in range(60):
        picture = draw_picture(seed)
        if picture.width < 2 * shape.PATCH:
            continue
        _, classes, _ = labelled(picture)
        shown = set(classes[:-1].flatten().tolist()) - {BACKGROUND}
        assert shown <= {CLASS_OF[character] for character in picture.characters}
        letters = {CLASS_OF[c] for c in picture.characters if c.isalnum() and c not in "Iijl1"}
        assert letters <= shown
        checked += 1
    assert checked > 10


def test_places_run_from_left_to_right_and_from_top_to_bottom_of_a_character() -> None:
    layouts = (lay_out(seed)[0] for seed in range(400))
    layout = next(
        one
        for one in layouts
        if len(one.characters) == 1 and not one.angle and one.characters in "HMNOQWX0"
    )
    _, classes, places = labelled(layout)
    rows, cols = shape.GRID, shape.GRID
    tile = int((classes[:-1] > BACKGROUND).sum(dim=1).argmax())
    grid, where = classes[tile].view(rows, cols), places[tile].view(rows, cols, 2)
    row = int((grid > BACKGROUND).sum(dim=1).argmax())
    col = int((grid > BACKGROUND).sum(dim=0).argmax())
    across = where[row, :, 0][grid[row] > BACKGROUND]
    down = where[:, col, 1][grid[:, col] > BACKGROUND]
    for run in (across, down):
        assert len(run) > 1
        assert torch.equal(run, run.sort(descending=True).values)


def test_crowds_fill_their_tiles() -> None:
    shares = [float((labelled(draw_crowd(seed))[1][:-1] > 0).float().mean()) for seed in range(6)]
    assert float(np.mean(shares)) > 0.3


def test_questions_ask_for_everything_for_the_count_or_for_one_line() -> None:
    lines = ("Total: 12.50", "Cash", "Thank you!")
    assert Question("What does it say?").answer(lines) == "Total: 12.50\nCash\nThank you!"
    assert Question("How many lines?", -1).answer(lines) == "3"
    assert Question("Read line 2.", 2).answer(lines) == "Cash"
    assert Question("Read line 4.", 4).answer(lines) == "nothing"
    assert Question("What does it say?").answer(()) == "nothing"
    assert Question("How many lines?", -1).answer(()) == "0"


def test_an_answer_points_at_the_cell_of_each_character_before_it_reads_it() -> None:
    cells = [[(0, 0), (0, 2), (0, 2)], [(3, 1)]]
    points = [cell_id(cell) for line in cells for cell in line]
    end = shape.IDS[shape.END]
    start = (*b" ", shape.IDS[shape.POINT])
    lines = ("a bc", "d")
    right = shape.IDS[shape.RIGHT]
    first = [points[0], *b"a ", points[1], *b"b", right, *b"c"]
    everything = pointing_ids(Question("What does it say?"), lines, cells)
    assert everything == (*start, *first, *b"\n", points[3], *b"d", end)
    assert pointing_ids(Question("", 1), lines, cells) == (*start, *first, end)
    second = pointing_ids(Question("Read line 2.", 2), lines, cells)
    assert second == (*start, points[0], points[3], *b"d", end)
    third = pointing_ids(Question("Read line 3.", 3), lines, cells)
    assert third == (*start, points[0], points[3], *b"nothing", end)
    count = pointing_ids(Question("How many lines?", -1), lines, cells)
    assert count == (*start, points[0], points[3], *b"2", end)
    assert pointing_ids(Question(""), (), []) == (*start, *b"nothing", end)


def test_a_token_names_the_cell_that_it_was_made_for() -> None:
    for cell in ((0, 0), (3, 17), (shape.SIDE - 1, shape.SIDE - 1)):
        assert cell_of(cell_id(cell)) == cell
    others = [*b"4711 ", shape.IDS[shape.RIGHT], shape.IDS[shape.POINT], shape.IDS[shape.END]]
    assert [cell_of(token) for token in others] == [None] * len(others)


def test_a_path_is_drawn_over_the_cells_that_an_answer_names() -> None:
    image = Image.new("RGB", (shape.EDGE, shape.TILE), "white")
    path = draw_path(image, [*b" ", cell_id((1, 2)), *b"a", cell_id((1, 20)), *b"b"], "ab")
    red = [
        (x // 16, y // 16)
        for x in range(image.width)
        for y in range(image.height)
        if path.getpixel((x, y)) == PATH_COLOR
    ]
    assert set(red) == {(column, 1) for column in range(2, 21)}


def test_a_reader_of_answers_does_not_see_where_they_point() -> None:
    tokenizer = build_tokenizer()
    for seed in range(20):
        picture = draw_picture(seed, full=0.5)
        ids = wanted_ids(Question("What does it say?"), picture)
        assert max(ids) >= shape.FIRST_CELL or not picture.lines
        assert tokenizer.decode(list(ids)) == f" {picture.text or shape.NOTHING}"


def box(left: float, top: float, right: float, bottom: float) -> Corners:
    return ((left, top), (right, top), (right, bottom), (left, bottom))


def test_a_cell_is_where_the_visual_token_that_shows_the_characters_middle_stands() -> None:
    lines = [[box(0, 0, 10, 20), box(130, 4, 150, 30)], [box(4, 100, 10, 120)]]
    assert cells_of((384, 128), (1, 3), lines) == [[(0, 0), (0, 8)], [(6, 0)]]
    assert cells_of((192, 64), (1, 3), lines) == [[(1, 0), (1, 17)], [(7, 0)]]


def test_a_shaken_cell_shows_the_character_too() -> None:
    line = [box(20 * at, 10 - at, 20 * at + 18, 40 + at) for at in range(19)]
    (exact,), (shaken,) = (
        cells_of((384, 128), (1, 3), [line], rng) for rng in (None, random.Random(2))
    )
    moved = [pair for pair in zip(line, shaken, exact, strict=True) if pair[1] != pair[2]]
    assert 1 <= len(moved) <= 9
    for corners, (row, col), _ in moved:
        assert corners[0][0] < 16 * (col + 1)
        assert corners[2][0] > 16 * col
        assert corners[0][1] < 16 * (row + 1)
        assert corners[2][1] > 16 * row


def test_a_line_stays_in_its_row_of_cells_while_its_characters_show_there() -> None:
    high, low, dot = box(0, 2, 10, 26), box(20, 12, 30, 28), box(40, 25, 44, 28)
    assert cells_of((384, 128), (1, 3), [[high, low, dot]]) == [[(0, 0), (1, 1), (1, 2)]]
    assert cells_of((384, 128), (1, 3), [[low, high, dot]]) == [[(1, 1), (1, 0), (1, 2)]]


def test_batches_predict_the_answer_after_the_prompt() -> None:
    for index in range(4):
        batch = DrawnBatches(12, 4, crowd=2)[index]
        pictures, tiles = len(batch.token_ids), batch.picture_tiles
        assert tiles // pictures in {4, 7, 10}  # 1x3, 2x3 or 3x3 tiles, and the whole picture
        assert batch.tiles.shape == (tiles + 2, 3, shape.TILE, shape.TILE)
        assert batch.patch_labels.shape == (tiles + 2, shape.GRID**2)
        images = (batch.token_ids == shape.IDS[shape.IMAGE]).sum(dim=1)
        assert images.tolist() == [shape.TOKENS_PER_TILE * tiles // pictures] * pictures
        for tokens, labels in zip(batch.token_ids, batch.labels, strict=True):
            length = int((labels >= 0).sum())
            assert labels[length - 1] == shape.IDS[shape.END]
            following = tokens[batch.start + 1 : batch.start + 1 + length]
            same = following == labels[:length]
            assert float(same.float().mean()) > 0.7  # some cells are another that shows the same
            assert bool((following[~same] >= shape.FIRST_CELL).all())


def test_a_byte_is_its_own_token() -> None:
    tokenizer = build_tokenizer()
    expected = [*" 4711é".encode(), shape.IDS[shape.END]]
    assert tokenizer.encode(" 4711é<end_of_utterance>").ids == expected
    assert plain_ids("4711é") == tuple(expected)
    assert tokenizer.decode(list(" 4711é".encode())) == " 4711é"
    assert tokenizer.get_vocab_size() == shape.VOCABULARY
    assert prompt_ids(shape.QUESTION, (1, 3))[0] == shape.IDS[shape.START]


def test_the_longest_chat_fits_into_the_context() -> None:
    longest = len(prompt_ids("How many lines of text are there?", (3, 3)))
    answer = 2 * shape.MAX_LINES * (shape.MAX_LENGTH + 1) + 1  # a cell before each character
    assert longest + answer <= shape.CONFIG.text.max_positions


def test_a_patchs_constant_is_no_characters_direction() -> None:
    width = shape.CONFIG.vision.hidden_size
    even = constant_direction(width)
    known = directions(width - PLACE)
    assert len(known) == CLASSES + 2
    assert float(even.norm()) == pytest.approx(1.0, abs=1e-5)
    assert float((known @ even[:-PLACE]).abs().max()) < 1e-5
    assert torch.allclose(known @ known.T, torch.eye(len(known)), atol=1e-5)


def fresh_scores(layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """How much each head of a fresh decoder's layer looks at what, from (T, D): (heads, T, T)."""
    model = fresh_model(0)
    attention = [m for m in model.decoder.modules() if isinstance(m, TextAttention)][layer]
    tokens, count = tokens[None], len(tokens)
    cos, sin = model.decoder._angles(0, count, None, tokens)
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
    marker, cell = shape.IDS["<row_1_col_2>"], cell_id((2, 9))
    tile = [shape.IDS[shape.IMAGE]] * shape.TOKENS_PER_TILE
    chat = [shape.IDS["<row_1_col_1>"], *tile, marker, *tile, cell_id((0, 0)), *b"a"]
    scores = fresh_scores(0, tokens[torch.tensor([*chat, cell, *b"b"])] / SPREAD)
    assert scores[2, -1, chat.index(marker)].item() > 0.9
    assert scores[3, -1, len(chat)].item() > 0.6


def test_a_fresh_decoder_looks_at_the_visual_token_of_the_cell_pointed_at() -> None:
    """In its third layer, after what two random layers make of a prompt of three tiles."""
    data = DrawnBatches(8, 20, seed=4, drawn=False, level=0.0)
    drawn = (data[index] for index in range(len(data)))
    strips = (one for one in drawn if one.picture_tiles == 4 * len(one.token_ids))
    batch = next(strips)  # one row of three tiles, and the whole
    known = directions(shape.CONFIG.vision.hidden_size - PLACE)
    places_of = PLACE_STRENGTH * places(shape.GRID)
    states = random_states(batch, known, places_of, torch.Generator().manual_seed(0))
    model, chat = fresh_model(0), batch.token_ids.clone()
    cells = [(row, col) for row in range(shape.CELLS) for col in range(3 * shape.CELLS)]
    spots = (chat[0] == shape.IDS[shape.IMAGE]).nonzero().flatten()
    visual = model.connector(states, (shape.GRID, shape.GRID)).view(len(chat), len(spots), -1)[:1]
    found = []
    with torch.no_grad():
        for row, col in cells[::7]:
            prompt = chat[:1, : batch.start + 1]
            ids = torch.cat([prompt, torch.tensor([[cell_id((row, col))]])], dim=1)
            stream = model.decoder.embedding(ids).index_copy(1, spots, visual)
            cos, sin = model.decoder._angles(0, ids.shape[1], None, stream)
            for layer in list(model.decoder.layers)[:2]:
                stream = layer(stream, cos, sin, None, None)
            third = model.decoder.layers[2]
            assert isinstance(third, TextLayer)
            scores = fresh_scores(2, third.attention_norm(stream)[0])
            tile, within = divmod(col, shape.CELLS)
            spot = spots[tile * shape.TOKENS_PER_TILE + row * shape.CELLS + within]
            found.append(scores[0, -1, spot].item())
    assert float(np.mean(found)) > 0.7


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


def small(name: str, steps: int = 2) -> Stage:
    """A stage of a few tiny steps."""
    stage = next(stage for stage in STAGES if stage.name == name)
    size = {"batch": 4 if stage.batch else 0, "crowd": 2 if stage.crowd else 0}
    return Stage(**{**vars(stage), **size, "steps": steps})


def test_a_stopped_stage_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for folder in (whole, stopped):
        folder.mkdir()
    straight = Trainer(whole, small("name"), seed=3)
    straight.run(workers=0)
    first = Trainer(stopped, small("name"), seed=3)
    first.step_on(0)
    first.save()
    second = Trainer(stopped, small("name"), seed=3)
    second.resume()
    assert second.step == 1
    second.run(workers=0)
    for name, value in straight.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_the_whole_starts_from_the_tower_that_names_and_the_decoder_that_spells(
    tmp_path: Path,
) -> None:
    trained = {}
    for name in ("name", "spell"):
        trainer = Trainer(tmp_path, small(name, steps=1), seed=0)
        trainer.run(workers=0)
        trained[name] = trainer.average
    whole = Trainer(tmp_path, small("whole"), seed=0).model.state_dict()
    for name, value in whole.items():
        taught_by = "name" if name.startswith("vision.") else "spell"
        assert torch.equal(value, trained[taught_by][name]), name
    fresh = Trainer(tmp_path / "none", small("whole"), seed=0).model.state_dict()
    changed = {name.split(".")[0] for name in whole if not torch.equal(whole[name], fresh[name])}
    assert changed == {"vision", "connector", "decoder"}


def test_scores_count_wrong_characters_over_all_characters() -> None:
    image = draw_picture(0).image
    results = [
        Result(image, "What does it say?", truth="abcd", answer="abcd"),
        Result(image, "What does it say?", truth="efgh", answer="efg"),
    ]
    assert figures(results) == {"exact": 0.5, "cer": 0.125, "pictures": 2}
    assert tidy(" one  two \n\n three\n") == "one two\nthree"
