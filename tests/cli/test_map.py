"""``smolstack map``: many images in, one file out, and one line that says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.cli.conftest import Run

import smolstack
from smolstack.bulk import job, local_engine


@pytest.fixture
def photos(tmp_path: Path, images: list[Image.Image]) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, image in enumerate(images):
        image.save(folder / f"{number}.png")
    (folder / "bad.jpg").write_bytes(b"no image")
    return folder


def test_a_folder_becomes_a_table(
    run: Run, photos: Path, tiny_folder: Path, tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    result = run(
        "map", photos, "-q", "What?", "-q", "Who?", "--out", out, "--max-new-tokens", 3,
        "--model", tiny_folder,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out}: 8 rows about 4 images, 1 of them with an error\n"
    assert result.stderr == ""
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["id"], row["question"]) for row in found[:3]] == [
        ("0.png", "What?"),
        ("0.png", "Who?"),
        ("1.png", "What?"),
    ]
    answer = tiny_vlm.ask(photos / "0.png", "What?", max_new_tokens=3)
    assert found[0]["answer"] == answer.text


def test_the_answer_may_be_held_to_a_form(
    run: Run, photos: Path, tiny_folder: Path, tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    pytest.importorskip("llguidance")
    out, common = tmp_path / "a.jsonl", ["--model", tiny_folder, "--max-new-tokens", 4]
    run("map", photos, "-q", "What?", "--regex", "[0-9]{3}", "--out", out, *common)
    answers = [json.loads(line)["answer"] for line in out.read_text().splitlines()]
    assert all(answer.isdigit() and len(answer) == 3 for answer in answers[:3])
    out = tmp_path / "b.jsonl"
    run("map", photos, "-q", "Cat?", "-q", "Dog?", "--choice", "yes", "--choice", "no", "-o", out,
        *common)  # fmt: skip
    for row in (json.loads(line) for line in out.read_text().splitlines()[:6]):
        answer = tiny_vlm.ask(photos / row["id"], row["question"], choices=["yes", "no"])
        assert answer.probabilities is not None
        assert row["answer"] == answer.text
        assert row["probability"] == pytest.approx(answer.probabilities[answer.text], abs=1e-4)


def test_embeddings_and_the_summary_as_json(
    run: Run, photos: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "e.parquet"
    result = run("map", photos, "--embed", "mean", "-o", out, "--model", tiny_folder, "--json")
    summary = {"images": 4, "rows": 4, "bad_images": 1, "kept": 0}
    assert json.loads(result.stdout) == {"out": str(out), **summary}


def test_ctrl_c_says_how_to_go_on(
    run: Run, photos: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.csv"
    command = ("map", photos, "-q", "What?", "-o", out, "--model", tiny_folder, "--batch-rows", 1,
               "--max-new-tokens", 2)  # fmt: skip
    whole = local_engine.run_locally

    def interrupted(*arguments: Any, done: Any, **others: Any) -> None:
        def once(rows: int) -> None:
            done(rows)
            raise KeyboardInterrupt

        whole(*arguments, done=once, **others)

    with monkeypatch.context() as patch:
        patch.setattr(job, "run_locally", interrupted)
        result = run(*command)
    assert result.exit_code == 130
    assert "1 of 4 images are done and kept" in result.stderr
    assert not out.exists()
    assert run(*command).stdout == (
        f"{out}: 4 rows about 4 images (1 by an earlier run), 1 of them with an error\n"
    )


def test_mistakes_are_one_sentence(refuses: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.csv"
    assert "found no question" in refuses("map", photos, "--out", out)
    assert "expected one of .parquet" in refuses(
        "map", photos, "-q", "?", "--out", tmp_path / "a.b"
    )
    assert "found nothing" in refuses("map", tmp_path / "none", "-q", "?", "--out", out)
    assert "use engine ray" in refuses("map", photos, "-q", "?", "--out", out, "--workers", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos"]
