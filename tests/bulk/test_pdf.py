"""PDF files among the images of a job: a row for each page."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from tests.pdfs import document, locked

from smolstack.bulk.inputs import open_input

from .conftest import Job, rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    document(folder / "more" / "report.pdf", [(100, 50), (60, 80), (40, 40)])
    Image.new("RGB", (40, 30), "white").save(folder / "a.png")
    (folder / "bad.pdf").write_text("no document")
    return folder


def test_every_page_is_a_row(job: Job, folder: Path, tmp_path: Path) -> None:
    summary = job(folder)
    found = rows(tmp_path / "answers.parquet")
    assert [row["id"] for row in found] == [
        "a.png",
        "bad.pdf",
        *(f"more/report.pdf#page={number}" for number in (1, 2, 3)),
    ]
    assert [row["row"] for row in found] == list(range(5))
    assert "cannot be read as a PDF file" in found[1]["error"]
    assert found[4]["path"] == f"{folder}/more/report.pdf#page=3"
    assert all(row["answer"] is not None for row in found if row["id"] != "bad.pdf")
    assert (summary.images, summary.bad_images) == (5, 1)


@pytest.mark.parametrize("pages", [(), (2,)])
def test_a_list_names_files_or_pages(folder: Path, pages: tuple[int, ...]) -> None:
    path = str(folder / "more" / "report.pdf")
    given = [f"{path}#page={number}" for number in pages] or [path]
    source = open_input([str(folder / "a.png"), *given, b"bytes"])
    assert source.rows is not None
    found = list(source.rows())
    assert [row.path for row in found[1:-1]] == [f"{path}#page={n}" for n in pages or (1, 2, 3)]
    assert [row.index for row in found] == list(range(len(found)))


def test_a_glob_finds_them(folder: Path) -> None:
    source = open_input(str(folder / "**" / "*.pdf"))
    assert source.rows is not None
    assert [row.error is None for row in source.rows()] == [False, True, True, True]


def test_a_locked_file_is_a_row_with_what_to_do_and_pages_with_its_password(
    job: Job, tmp_path: Path
) -> None:
    path = locked(tmp_path / "locked.pdf", b"open")
    source = open_input(path)
    assert source.rows is not None
    (row,) = source.rows()
    assert row.error is not None
    assert "is locked; give its password (--password" in row.error
    source = open_input(path, password="open")
    assert source.rows is not None
    assert [row.id for row in source.rows()] == [f"{path}#page=1"]
    summary = job(path, password="open")
    assert (summary.images, summary.bad_images) == (1, 0)
    assert rows(tmp_path / "answers.parquet")[0]["error"] is None
