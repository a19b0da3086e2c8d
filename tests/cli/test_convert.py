"""smolstack convert: a PDF file in, a document out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pdfs import document

Run = Callable[..., Any]


@pytest.fixture
def report(tmp_path: Path) -> Path:
    return document(tmp_path / "report.pdf", [(100, 50), (60, 80)])


def table(path: Path, rows: list[tuple[str, str | None, str | None, str | None]]) -> Path:
    """Pages as a bulk job leaves them: name, answer, why it ended, error."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = ("id", "path", "question", "answer", "finish_reason", "error")
    columns = list(zip(*((name, None, "q", *rest) for name, *rest in rows), strict=True))
    pq.write_table(
        pa.table({n: pa.array(c, pa.string()) for n, c in zip(names, columns, strict=True)}), path
    )
    return path


TEXT = "<doctag><text><loc_1><loc_1><loc_9><loc_9>Good page.</text></doctag>"


def test_a_document_is_written_and_its_pages_counted(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("docling_core")
    bad = TEXT.replace("<loc_1>", "<loc_9>")
    out, pages = (
        tmp_path / "report.md",
        table(
            tmp_path / "pages.parquet",
            [
                ("a.png", TEXT, "stop", None),
                ("b.png", TEXT, "length", None),
                ("c.png", TEXT, "repetition", None),
                ("d.png", bad, "stop", None),
                ("e.png", None, None, "no image"),
            ],
        ),
    )
    result = run("convert", pages, "--out", out)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == f"{out}: 5 pages\n"
    assert result.stderr.splitlines() == [
        "e.png: not read: no image",
        "b.png: its reading was cut off; what was read is kept",
        "c.png: its reading went round in circles; what was read is kept",
        "d.png: 1 box is empty, inverted or off the page, and left out",
    ]
    assert out.read_text() == "Good page.\n\n" * 3 + "Good page.\n"
    again = run("convert", pages, "--out", out)
    assert again.exit_code == 2
    assert "exists already" in again.stderr
    told = json.loads(run("convert", pages, "--out", out, "--restart", "--json").stdout)
    assert told["pages"] == 5
    assert told["unread"] == {"e.png": "no image"}
    assert told["cut"] == {"b.png": "length", "c.png": "repetition"}
    assert told["remarks"] == [["d.png", "1 box is empty, inverted or off the page, and left out"]]


def test_no_document_is_a_failure_that_names_the_pages(
    refuses: Run, report: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.pdf").write_text("no document")
    options = ["--model", tiny_folder, "--max-new-tokens", 4]
    said = refuses("convert", tmp_path, "--out", tmp_path / "report.doctags", *options)
    assert "document elements: report.pdf#page=1, report.pdf#page=2" in said
    report.unlink()
    said = refuses("convert", tmp_path, "--out", tmp_path / "none.doctags", *options)
    assert "no page could be read: bad.pdf; the first: " in said
    assert "cannot be read as a PDF file" in said
    assert not list(tmp_path.glob("*.doctags"))


def test_a_suffix_that_is_no_format_is_refused(refuses: Run, report: Path, tmp_path: Path) -> None:
    assert "expected one of .md" in refuses("convert", report, "--out", tmp_path / "a.docx")
