"""Many images in, one file out: complete, in order, and with the answers of ``ask``."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tests.bulk.conftest import BAD, Job, rows

import smolstack
from smolstack.bulk import Progress
from smolstack.cli.map_progress import Lines
from smolstack.errors import BulkError, GenerationError

ROOT = Path(__file__).parents[2]
ORDER = ["1.png", "2.png", "4.png", "5.png", "7.png", *BAD, "more/0.png", "more/3.png"]


def test_every_image_of_a_folder_gets_the_answer_of_ask(
    job: Job, photos: Path, tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    summary = job(photos, window=4)
    found = rows(tmp_path / "answers.parquet")
    assert [row["id"] for row in found] == [*ORDER, "more/6.png"]
    assert [row["row"] for row in found] == list(range(10))
    for row in found:
        if row["id"] in BAD:
            continue
        answer = tiny_vlm.ask(row["path"], "What?", max_new_tokens=4)
        assert row["answer"] == answer.text
        assert row["finish_reason"] == answer.finish_reason
        assert row["prompt_tokens"] == answer.usage.prompt_tokens
        assert row["visual_tokens"] == answer.usage.visual_tokens
        assert row["completion_tokens"] == answer.usage.completion_tokens
        assert row["error"] is None
    assert (summary.images, summary.rows, summary.bad_images, summary.kept) == (10, 10, 2, 0)
    assert not (tmp_path / "answers.parquet.parts").exists()


def test_a_bad_image_is_a_row_that_says_why(job: Job, photos: Path, tmp_path: Path) -> None:
    job(photos)
    bad = {row["id"]: row for row in rows(tmp_path / "answers.parquet") if row["error"]}
    assert set(bad) == set(BAD)
    assert "is not an image in a supported format" in bad["broken.png"]["error"]
    assert "truncated" in bad["cut.png"]["error"]
    assert all(row["answer"] is None and row["finish_reason"] is None for row in bad.values())


def test_several_questions_encode_an_image_once_and_answer_as_ask_does(
    job: Job,
    photos: Path,
    tiny_vlm: smolstack.VLM,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encoded = []
    encode = type(tiny_vlm.model).encode_tiles

    def counting(model: Any, tiles: torch.Tensor, **options: Any) -> torch.Tensor:
        encoded.append(tiles.shape[0])
        return encode(model, tiles, **options)

    monkeypatch.setattr(type(tiny_vlm.model), "encode_tiles", counting)
    questions = ["What?", "What is it that this image shows?", "Where was it?"]
    summary = job(photos, questions, batch_rows=3)
    tiles = sum(encoded)
    found = rows(tmp_path / "answers.parquet")
    assert summary.rows == len(found) == 30
    assert [row["question"] for row in found] == questions * 10
    good = [row for row in found if row["error"] is None]
    assert tiles == sum(tiny_vlm.plan(row["path"]).tiles for row in good) / 3
    for row in good:
        expected = tiny_vlm.ask(row["path"], row["question"], max_new_tokens=4)
        assert row["answer"] == expected.text
        assert row["prompt_tokens"] == expected.usage.prompt_tokens


def test_batching_changes_no_answer(
    job: Job, numbers: Path, reader: smolstack.VLM, tmp_path: Path
) -> None:
    sampling: dict[str, Any] = {"temperature": 1.5, "seed": 5, "max_new_tokens": 12}
    questions = ["What does it say?", "How much?"]
    answers = []
    for number, limits in enumerate(({"batch_rows": 1}, {"batch_tokens": 500}, {"window": 3})):
        out = tmp_path / f"{number}.parquet"
        job(numbers, questions, out=out, model=reader, **sampling, **limits)
        answers.append([row["answer"] for row in rows(out)])
    alone = [
        reader.ask(path, question, **sampling).text
        for path in sorted(numbers.iterdir())
        for question in questions
    ]
    assert answers[0] == answers[1] == answers[2] == alone
    assert len(set(alone)) >= 10


def test_an_image_too_large_for_the_context_is_a_row_with_an_error(
    job: Job, photos: Path, tiny_vlm: smolstack.VLM, tmp_path: Path
) -> None:
    small = tiny_vlm.plan(photos / "5.png", "why?").prompt_tokens
    large = max(
        tiny_vlm.plan(path, "why?").prompt_tokens or 0 for path in photos.glob("[1247].png")
    )
    assert small is not None
    words = (512 - large) * "why? "  # some images still fit, with room for an answer
    while (tiny_vlm.plan(photos / "5.png", words).prompt_tokens or 0) > 505:
        words = words[: -len("why? ")]
    job(photos, words, out=tmp_path / "a.jsonl", max_new_tokens=2)
    found = {row["id"]: row for row in rows(tmp_path / "a.jsonl") if row["id"] not in BAD}
    for row in found.values():
        fits = (tiny_vlm.plan(row["path"], words).prompt_tokens or 0) < 512
        assert (row["error"] is None) == (row["answer"] is not None) == fits
        assert fits or "context is 512" in row["error"]
    assert len({row["error"] is None for row in found.values()}) == 2


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_the_suffix_of_the_output_is_its_format(
    job: Job, photos: Path, tmp_path: Path, suffix: str
) -> None:
    expected = tmp_path / "expected.parquet"
    job(photos, out=expected)
    out = tmp_path / f"answers{suffix}"
    job(photos, out=out)
    if suffix != ".csv":
        assert rows(out) == rows(expected)
        return
    with out.open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert [row["answer"] or None for row in found] == [row["answer"] for row in rows(expected)]
    assert list(found[0]) == list(rows(expected)[0])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_are_the_visual_tokens_or_their_mean(
    job: Job, photos: Path, tiny_vlm: smolstack.VLM, tmp_path: Path, dtype: str
) -> None:
    whole, mean = tmp_path / "tokens.parquet", tmp_path / "mean.parquet"
    job(photos, out=whole, embed="tokens", embed_dtype=dtype)
    job(photos, out=mean, embed="mean", embed_dtype=dtype)
    averages = {row["id"]: row["embedding"] for row in rows(mean)}
    for row in rows(whole):
        if row["id"] in BAD:
            assert row["embedding"] is None
            assert averages[row["id"]] is None
            continue
        visual = tiny_vlm.encode(row["path"])
        tokens = visual.tokens.flatten(0, 1).numpy()
        close = 2e-3 if dtype == "float16" else 1e-5
        np.testing.assert_allclose(np.array(row["embedding"]), tokens, atol=close, rtol=close)
        average = np.array(averages[row["id"]])
        np.testing.assert_allclose(average, tokens.mean(0), atol=close, rtol=close)
        assert (row["rows"], row["cols"]) == (visual.rows, visual.cols)
        assert row["visual_tokens"] == len(visual) == len(row["embedding"])
    kind = {"float32": "float", "float16": "halffloat"}[dtype]
    assert str(pq.read_schema(mean).field("embedding").type) == (
        f"fixed_size_list<element: {kind}>[48]"
    )


def test_a_million_inputs_are_not_held(job: Job, photos: Path, monkeypatch: Any) -> None:
    """However long the input, the images that are planned and not answered yet are few."""
    from smolstack.bulk.tasks import Questions

    planned, most, answered = 0, 0, 0
    plan, work = Questions.plan, Questions.work

    def counting_plan(task: Any, row: Any) -> int:
        nonlocal planned, most
        planned += 1
        most = max(most, planned - answered)
        return plan(task, row)

    def counting_work(task: Any, loaded: Any) -> Any:
        nonlocal answered
        answered += len(loaded.rows) + len(loaded.errors)
        return work(task, loaded)

    monkeypatch.setattr(Questions, "plan", counting_plan)
    monkeypatch.setattr(Questions, "work", counting_work)
    job([photos / "5.png"] * 120, window=10, max_new_tokens=1)
    assert planned == answered == 120
    assert most <= 40


@pytest.mark.parametrize("page", ["README.md", "docs/bulk.md"])
def test_the_line_that_a_page_gives_duckdb_reads_the_result(
    job: Job, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, page: str
) -> None:
    duckdb = pytest.importorskip("duckdb")
    (line,) = re.findall(r'^duckdb -c "(.*)"$', (ROOT / page).read_text("utf-8"), re.M)
    job(photos)
    monkeypatch.chdir(tmp_path)
    read = duckdb.sql(line).fetchall()
    assert read == [(r["id"], r["answer"]) for r in rows(Path("answers.parquet")) if not r["error"]]


def test_what_makes_no_sense_is_refused_before_any_work(
    job: Job, photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(BulkError, match=r"answers\.txt has the suffix '\.txt', expected one of"):
        job(photos, out=tmp_path / "answers.txt")
    with pytest.raises(BulkError, match="found no question"):
        job(photos, [])
    with pytest.raises(BulkError, match="found questions and embed"):
        job(photos, embed="mean", questions="What?")
    with pytest.raises(BulkError, match="embed is 'all', expected one of"):
        job(photos, embed="all")
    with pytest.raises(BulkError, match="lists, which CSV cannot hold"):
        job(photos, embed="mean", out=tmp_path / "a.csv")
    with pytest.raises(BulkError, match="batch_rows is 0"):
        job(photos, batch_rows=0)
    with pytest.raises(GenerationError, match="temperature"):
        job(photos, temperature=-1.0)
    with pytest.raises(BulkError, match=r"the folder .* does not exist"):
        job(photos, out=tmp_path / "nowhere" / "a.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BulkError, match="empty: found no images"):
        job(tmp_path / "empty")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_a_log_gets_the_rate_and_the_time_left_now_and_then() -> None:
    said: list[str] = []
    now = [100.0]
    tell = Lines(said.append, clock=lambda: now[0], every=30)
    for seconds, done in ((0, 1000), (10, 1100), (30, 1300), (40, 1400), (70, 1700), (90, 2000)):
        now[0] = 100.0 + seconds
        tell(Progress(done=done, kept=1000, total=9300))
    assert said == [
        "1,300 of 9,300 images, 10.0/s, 0:13:20 left",
        "1,700 of 9,300 images, 10.0/s, 0:12:40 left",
    ]
