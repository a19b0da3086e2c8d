"""Examples are found in folders, JSONL files and saved datasets, and bad ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.train.conftest import ANSWERS, MakeRecipe, chat, draw

from smolstack.errors import DataError
from smolstack.processor.prompt import split_messages
from smolstack.train import train
from smolstack.train.data import Example, open_source
from smolstack.train.metrics import read_metrics

QUESTION = "What does it say?"


def shape(example: Example) -> tuple[list[str], list[Any]]:
    """Texts by message and the images, as the processor would read the chat."""
    messages, images = split_messages(example.messages)
    return ["".join(p.get("text", "") for p in m["content"]) for m in messages], images


def test_the_same_examples_in_every_form(data: Path, tmp_path: Path) -> None:
    folder = open_source(data / "images", QUESTION)
    lines = open_source(data / "train.jsonl", QUESTION)
    rows = [{"file_name": f"{i}.png", "text": answer} for i, answer in enumerate(ANSWERS)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    metadata = open_source(tmp_path, QUESTION)
    assert len(folder) == len(lines) == len(metadata) == len(ANSWERS)
    for index, answer in enumerate(ANSWERS):
        image = data / "images" / f"{index}.png"
        assert shape(folder[index]) == ([QUESTION, answer], [image])
        assert shape(lines[index]) == ([QUESTION, answer], [image])
        assert shape(metadata[index]) == ([QUESTION, answer], [tmp_path / f"{index}.png"])


def test_images_may_stand_beside_the_messages(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "And now?"}, {"type": "image"}]
    answer = {"role": "assistant", "content": "two"}
    rows = [
        {"images": ["a.png", "b.png"], "messages": [{"role": "user", "content": parts}, answer]},
        {"images": ["a.png"], "messages": [{"role": "user", "content": "plain"}, answer]},
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    source = open_source(path, QUESTION)
    assert shape(source[0]) == (["And now?", "two"], [tmp_path / "a.png", tmp_path / "b.png"])
    assert shape(source[1]) == (["plain", "two"], [tmp_path / "a.png"])


def test_a_dataset_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"images": [draw(a, i)], **chat(None, a)} for i, a in enumerate(ANSWERS[:3])]
    features = datasets.Features(
        {
            "images": [datasets.Image()],
            "messages": [
                {
                    "role": datasets.Value("string"),
                    "content": [
                        {key: datasets.Value("string") for key in ("type", "text", "image")}
                    ],
                }
            ],
        }
    )
    datasets.Dataset.from_list(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    source = open_source(tmp_path / "saved", QUESTION)
    assert len(source) == 3
    texts, images = shape(source[1])
    assert texts == [QUESTION, ANSWERS[1]]
    assert isinstance(images[0], Image.Image)
    assert images[0].tobytes() == draw(ANSWERS[1], 1).tobytes()


def test_rows_in_memory_train_like_a_file(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    """A ``datasets.Dataset``, or a list of dictionaries, handed over in Python."""
    datasets = pytest.importorskip("datasets")
    lines = (data / "train.jsonl").read_text().replace("images/", f"{data}/images/")
    rows = [json.loads(line) for line in lines.splitlines()]
    table = {
        "image": [str(data / "images" / f"{i}.png") for i in range(len(ANSWERS))],
        "text": list(ANSWERS),
    }
    drawn = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
    losses = []
    for number, given in enumerate((None, rows, drawn)):
        recipe = make_recipe(output=str(tmp_path / str(number)))
        trained = train(recipe, rows=given, evaluation_rows=rows[:2], quiet=True)
        assert trained.evaluated is not None
        metrics = read_metrics(Path(recipe.output) / "metrics.jsonl")
        losses.append([line["loss"] for line in metrics if "loss" in line])
    assert losses[0] == losses[1] == losses[2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "receipts contains no rows"),
        ({"train": [], "test": []}, r"several datasets; pass one of \['train', 'test'\]"),
        (iter([{}]), "list_iterator, expected rows with a length"),
        ([{"a": 1}], r"receipts, row 0 has the keys \['a'\]"),
    ],
)
def test_rows_that_are_none_are_named(rows: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        open_source("receipts", QUESTION, rows)[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "example 1 is not valid JSON"),
        ("\n\n{", "example 1 is not valid JSON: Expecting .*: line 3, column 2"),
        ("[]", "expected an object"),
        ('{"a": 1}', r"has the keys \['a'\], expected messages, or an image"),
        ('{"file_name": "a.png", "text": ""}', "an empty answer"),
        (
            '{"file_name": "a.png", "text": "  "}',
            "remove the example, or give it an answer",
        ),
        (
            '{"image": "a.png", "conversations": [{"from": "human", "value": "<image>"}]}',
            "has conversations .*, expected messages: role",
        ),
        ('{"file_name": "a.png", "text": null}', "text None, expected text; remove the example"),
        ('{"messages": "hi"}', "expected a list"),
        ('{"text": "a", "text": "b"}', "the key 'text' more than once: line 1"),
        ('{"messages": [{"role": "user", "content": 5}]}', "content 5 in message 0, expected text"),
        (
            '{"messages": [{"role": "user", "content": {"type": "text"}}]}',
            "content .* in message 0, expected text or a list of parts",
        ),
        (
            '{"messages": [{"role": "user", "content": ["hi"]}]}',
            "a part 'hi' in message 0, expected an object",
        ),
        (
            '{"messages": [{"role": "user", "content": [null]}]}',
            "a part None in message 0, expected an object",
        ),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "more image parts"),
        ('{"images": ["a.png"], "messages": []}', "no image part"),
        ('{"file_name": "https://a/b.png", "text": "x"}', "not downloaded"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=words):
        open_source(path, QUESTION)[0]


def test_a_folder_takes_every_format_and_names_what_it_passes_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.png", "b.avif", "c.jp2", "d.heic", "e.pdf", "f.apng"):
        (tmp_path / name).write_bytes(b"")
        (tmp_path / name).with_suffix(".txt").write_text("1")
    (tmp_path / "notes.docx").write_text("")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nothing")
    assert len(open_source(tmp_path, QUESTION)) == 6
    assert caplog.messages == [
        f"{tmp_path}: passed over 1 file of other kinds (1 .docx), 1 link to nothing (gone.png)"
    ]


def test_places_without_examples_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        open_source(tmp_path / "nothing", QUESTION)
    with pytest.raises(DataError, match="contains no images"):
        open_source(tmp_path, QUESTION)
    draw("1", 1).save(tmp_path / "lonely.png")
    with pytest.raises(DataError, match=r"no \.txt file .*lonely\.png"):
        open_source(tmp_path, QUESTION)
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(DataError, match=r"expected \.jsonl"):
        open_source(tmp_path / "data.csv", QUESTION)


@pytest.mark.parametrize(
    ("asked", "answer", "words"),
    [
        ("<image>\nWhat is it?", "a dog", r'<image> in the text of message 0.*"type": "image"'),
        ("What is it?", " ", "an empty answer in message 1; remove the example"),
        ("What is it?", "it<end_of_utterance>", "<end_of_utterance> in its text; remove it"),
    ],
)
def test_what_trainers_bring_from_elsewhere_gets_a_remedy(
    make_recipe: MakeRecipe, tmp_path: Path, asked: str, answer: str, words: str
) -> None:
    draw("1", 1).save(tmp_path / "a.png")
    row = {
        "images": [str(tmp_path / "a.png")],
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }
    with pytest.raises(DataError, match=words):
        train(make_recipe(), rows=[row], quiet=True)


def test_a_truncated_image_is_found_before_training(
    make_recipe: MakeRecipe, data: Path, tmp_path: Path
) -> None:
    whole = (data / "images" / "3.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = [chat(str(data / "images" / f"{i}.png"), ANSWERS[i]) for i in range(10)]
    lines[7] = chat(str(tmp_path / "cut.png"), "345")
    recipe = make_recipe(output=str(tmp_path / "run"))
    with pytest.raises(DataError, match=r"row 7: .*cut\.png"):
        train(recipe, rows=lines, quiet=True)
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_an_answer_that_is_not_text_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    source = open_source(tmp_path, "What?")
    with pytest.raises(DataError, match=r"a\.txt cannot be read as text: 'utf-8' codec"):
        source[0]
